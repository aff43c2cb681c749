// Causal attention of tokens that follow one another, forward.
//
// Queries go in blocks, of a few tokens and all heads that share keys: their scores for all keys
// that they see, the softmax of them, and the values by these weights, all in fp32. Keys and
// values are laid out for it once, as fp32 too: keys of as many tokens as lanes side by side, so
// that a vector holds one element of each.

#include <cmath>
#include <vector>

namespace drift::LEVEL {

// Rows of a product's tile: of scores, and of what is attended, which are half as many.
constexpr int64_t SCORE_ROWS = 12;
constexpr int64_t OUT_ROWS = SCORE_ROWS / 2;
// Vectors of what is attended that go together, as many as registers hold.
constexpr int64_t OUT_VECTORS = REGISTERS / 8;
// Tokens of a block at most, and bytes of its scores if there are so many: a core's cache.
constexpr int64_t BLOCK_TOKENS = 16;
constexpr int64_t BLOCK_BYTES = 384 << 10;

INLINE int64_t up_to(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// One head's keys and values, fp32: [tokens / LANES, width, LANES] and [tokens, width], with
// zeros behind the last token and element.
struct Packed {
  const float* keys;
  const float* values;
  int64_t width;
};

template <typename T>
INLINE void pack_token(const T* key, const T* value, int64_t token, int64_t width, int64_t padded,
                float* keys, float* values) {
  float* column = keys + token / LANES * LANES * padded + token % LANES;
  for (int64_t d = 0; d < width; ++d) column[d * LANES] = static_cast<float>(key[d]);
  // In the order of two vectors, as what is attended is stored again.
  float* line = values + token * padded;
  int64_t d = 0;
  for (; d + PAIRED <= width; d += PAIRED) store_two(load_two(value + d), line + d);
  if (d < width) {
    T rest[PAIRED] = {};
    std::copy_n(value + d, width - d, rest);
    store_two(load_two(rest), line + d);
  }
}

// `SCORE_ROWS` queries by the keys of as many tokens as lanes.
INLINE void score(const float* queries, const float* keys, int64_t width, float* scores,
                  int64_t line) {
  Floats sum[SCORE_ROWS] = {};
  for (int64_t d = 0; d < width; ++d) {
    const Floats key = load(keys + d * LANES);
#pragma GCC unroll 12
    for (int64_t row = 0; row < SCORE_ROWS; ++row) sum[row] += queries[row * width + d] * key;
  }
#pragma GCC unroll 12
  for (int64_t row = 0; row < SCORE_ROWS; ++row) store(sum[row], scores + row * line);
}

// Of `scores`, [0, count), those in [first, end) to weights, the others to 0; the log of their sum,
// and the sum.
INLINE float soften(float* scores, int64_t count, int64_t first, int64_t end, float* log_sum) {
  Floats most = all(NOTHING);
  for (int64_t at = 0; at < count; at += LANES) {
    const Ints place = IN_ORDER + static_cast<int32_t>(at);
    const Ints seen = (place >= static_cast<int32_t>(first)) & (place < static_cast<int32_t>(end));
    const Floats x = seen ? load(scores + at) : all(NOTHING);
    most = larger(most, x);
    store(x, scores + at);
  }
  const float highest = largest(most);
  Floats total = {};
  for (int64_t at = 0; at < count; at += LANES) {
    const Floats weight = exp(load(scores + at) - highest);
    total += weight;
    store(weight, scores + at);
  }
  const float all_of = sum(total);
  *log_sum = highest + std::log(all_of);
  return all_of;
}

// `OUT_ROWS` rows of weights by `VECTORS` vectors of the values of tokens [0, count).
template <int64_t VECTORS>
INLINE void weigh_values(const float* weights, int64_t line, const float* values, int64_t width,
                         int64_t count, float* out) {
  Floats sum[OUT_ROWS][VECTORS] = {};
  for (int64_t token = 0; token < count; ++token) {
    Floats value[VECTORS];
#pragma GCC unroll 4
    for (int64_t v = 0; v < VECTORS; ++v) value[v] = load(values + token * width + v * LANES);
#pragma GCC unroll 6
    for (int64_t row = 0; row < OUT_ROWS; ++row) {
      const Floats weight = all(weights[row * line + token]);
#pragma GCC unroll 4
      for (int64_t v = 0; v < VECTORS; ++v) sum[row][v] += weight * value[v];
    }
  }
#pragma GCC unroll 6
  for (int64_t row = 0; row < OUT_ROWS; ++row) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < VECTORS; ++v) store(sum[row][v], out + row * width + v * LANES);
  }
}

// What is attended to, and how: the first query stands at `before` among the keys, and each sees
// the last `window` of those up to its own.
struct Causal {
  int64_t group, before, window;

  int64_t end(int64_t query) const { return before + query + 1; }
  int64_t first(int64_t query) const { return std::max<int64_t>(end(query) - window, 0); }
};

// What a thread works in: `rows` of queries, of scores for `line` keys, and of what is attended.
struct Scratch {
  Scratch(int64_t rows, int64_t width, int64_t line)
      : line(line),
        queries(rows * width),
        scores(rows * line),
        out(rows * width),
        totals(rows),
        log_sums(rows) {}

  int64_t line;
  std::vector<float> queries, scores, out, totals, log_sums;
};

// What `tokens` queries from the `query`-th on get, which are token after token and head after head
// in `scratch.queries`: to `scratch.out`, and the logs of the softmax's denominators.
INLINE void attend_block(const Causal& causal, int64_t query, int64_t tokens, const Packed& packed,
                         Scratch& scratch) {
  const int64_t width = packed.width, line = scratch.line, rows = tokens * causal.group;
  // Whole vectors of keys.
  const int64_t start = causal.first(query) / LANES * LANES;
  const int64_t count = up_to(causal.end(query + tokens - 1) - start, LANES);
  float* scores = scratch.scores.data();
  for (int64_t at = 0; at < count; at += LANES) {
    for (int64_t row = 0; row < rows; row += SCORE_ROWS) {
      score(scratch.queries.data() + row * width, packed.keys + (start + at) * width, width,
            scores + row * line + at, line);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = query + row / causal.group;
    scratch.totals[row] = soften(scores + row * line, count, causal.first(token) - start,
                                 causal.end(token) - start, &scratch.log_sums[row]);
  }
  const float* values = packed.values + start * width;
  for (int64_t row = 0; row < rows; row += OUT_ROWS) {
    float* out = scratch.out.data() + row * width;
    int64_t d = 0;
    for (; d + OUT_VECTORS * LANES <= width; d += OUT_VECTORS * LANES) {
      weigh_values<OUT_VECTORS>(scores + row * line, line, values + d, width, count, out + d);
    }
    for (; d < width; d += PAIRED) {
      weigh_values<2>(scores + row * line, line, values + d, width, count, out + d);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t d = 0; d < width; d += LANES) {
      float* x = scratch.out.data() + row * width + d;
      store(load(x) / scratch.totals[row], x);
    }
  }
}

template <typename T>
INLINE void widen(const T* from, int64_t width, float scale, float* to) {
  for (int64_t d = 0; d < width; ++d) to[d] = static_cast<float>(from[d]) * scale;
}

// `from`, padded, is in the order of two vectors: the last ones are stored whole, and cut then.
template <typename T>
INLINE void narrow(const float* from, int64_t width, T* to) {
  int64_t d = 0;
  for (; d + PAIRED <= width; d += PAIRED) store_two(load_two(from + d), to + d);
  if (d < width) {
    T rest[PAIRED];
    store_two(load_two(from + d), rest);
    std::copy_n(rest, width - d, to + d);
  }
}

// A call of `causal_attention`.
template <typename T>
struct Call {
  Causal causal;
  Rows<const T> queries, keys, values;
  Rows<T> out;
  int64_t heads, kv_heads, count;
  float scale;
  // Elements of a packed row, and tokens of a packed head.
  int64_t padded, line;
  float* packed_keys;
  float* packed_values;
  float* log_sums;

  // Packs rows [begin, end) of keys and values.
  INLINE void pack(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t place = row % kv_heads * line * padded;
      pack_token(keys[row], values[row], row / kv_heads, queries.width(), padded,
                 packed_keys + place, packed_values + place);
    }
  }

  // Attends: `tokens` queries from the `query`-th on, of the heads that share `kv_head`.
  INLINE void attend(int64_t query, int64_t tokens, int64_t kv_head, Scratch& scratch) const {
    const int64_t rows = tokens * causal.group, place = kv_head * line * padded;
    const auto row_of = [&](int64_t row) INLINED {
      return (query + row / causal.group) * heads + kv_head * causal.group + row % causal.group;
    };
    for (int64_t row = 0; row < rows; ++row) {
      widen(queries[row_of(row)], queries.width(), scale, scratch.queries.data() + row * padded);
    }
    attend_block(causal, query, tokens, {packed_keys + place, packed_values + place, padded},
                 scratch);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = row_of(row);
      narrow(scratch.out.data() + row * padded, queries.width(), out[at]);
      log_sums[at % heads * count + at / heads] = scratch.log_sums[row];
    }
  }
};

// Queries [n, heads, head_dim], keys and values [m, kv_heads, head_dim] for m >= n: the queries are
// the last n tokens'. Scores are multiplied by `scale`, and a query sees the last `window` keys up
// to its own. What is attended goes to `out`, shaped as the queries; returned is the log of the
// softmax's denominator, [heads, n], fp32.
at::Tensor causal_attention(const at::Tensor& queries, const at::Tensor& keys,
                            const at::Tensor& values, double scale, int64_t window,
                            const at::Tensor& out) {
  TORCH_CHECK(queries.dim() == 3 && keys.dim() == 3 && keys.sizes() == values.sizes() &&
                  out.sizes() == queries.sizes() && keys.size(0) >= queries.size(0) &&
                  queries.size(1) % keys.size(1) == 0 && queries.size(2) == keys.size(2) &&
                  window > 0,
              "causal attention of ", queries.sizes(), " to ", keys.sizes(), ", ", values.sizes(),
              " by ", window);
  const int64_t count = queries.size(0), heads = queries.size(1);
  const int64_t key_count = keys.size(0), kv_heads = keys.size(1), group = heads / kv_heads;
  const int64_t padded = up_to(queries.size(2), PAIRED), line = up_to(key_count, LANES) + LANES;
  const int64_t fitting = BLOCK_BYTES / (group * line * int64_t{sizeof(float)});
  const int64_t block = std::clamp<int64_t>(fitting, 1, BLOCK_TOKENS);
  const int64_t blocks = (count + block - 1) / block;

  const auto options = queries.options().dtype(at::kFloat);
  at::Tensor log_sums = at::empty({heads, count}, options);
  at::Tensor packed = at::zeros({2, kv_heads, line, padded}, options);
  float* packed_keys = packed.mutable_data_ptr<float>();
  by_kind(queries, [&]<typename T>() {
    const Call<T> call = {{group, key_count - count, window},
                          {"queries", queries},
                          {"keys", keys},
                          {"values", values},
                          {"out", out},
                          heads,
                          kv_heads,
                          count,
                          static_cast<float>(scale),
                          padded,
                          line,
                          packed_keys,
                          packed_keys + kv_heads * line * padded,
                          log_sums.mutable_data_ptr<float>()};
    in_parallel(kv_heads * key_count, padded,
                [&](int64_t begin, int64_t end) { call.pack(begin, end); });
    const int64_t threads = at::get_num_threads();
    // In turn: later blocks see more.
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(up_to(block * group, SCORE_ROWS), padded, line);
      for (int64_t thread = begin; thread < end; ++thread) {
        for (int64_t piece = thread; piece < blocks * kv_heads; piece += threads) {
          const int64_t query = piece / kv_heads * block;
          call.attend(query, std::min(block, count - query), piece % kv_heads, scratch);
        }
      }
    });
  });
  return log_sums;
}

}  // namespace drift::LEVEL
