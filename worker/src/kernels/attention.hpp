// Attention of rows that decode, over the pages of a cache.
//
// Queries are few and keys many, so it takes as long as reading keys and values, once. Each
// token's head of keys is a piece of work by itself: what comes out does not depend on what
// else is computed, or by how many threads.

#include <algorithm>
#include <cmath>
#include <vector>

namespace drift::LEVEL {

// Heads that go through keys and values together: more would not fit into registers.
constexpr int64_t TOGETHER = 4;
// And pairs of vectors of what they get.
constexpr int64_t TWOS = REGISTERS / 16;

// What a token sees of one head.
template <typename T>
struct Sight {
  const T* keys;
  const T* values;
  // Its row's pages, and from which of the row's tokens to which it sees them.
  const int64_t* pages;
  int64_t start, end;
  // Tokens of a page, elements of a head, and of all heads of a page.
  int64_t page, width, stride;

  // Calls `visit` for as many tokens in sight as lanes after another, or as their page has: which
  // they are of those in sight, how many, where `all_of` (keys or values) has the first, and where
  // it has those that stand a page further.
  template <typename Visit>
  INLINE void each(const T* all_of, Visit visit) const {
    for (int64_t token = start; token < end;) {
      const int64_t count = std::min({LANES, page - token % page, end - token});
      const T* here = place(all_of, token);
      visit(token - start, count, here, token + page < end ? place(all_of, token + page) : here);
      token += count;
    }
  }

  // Asks the memory for a token that is wanted soon.
  INLINE void fetch(const T* token) const {
    const char* bytes = reinterpret_cast<const char*>(token);
    for (int64_t at = 0; at < width * int64_t{sizeof(T)}; at += 64) {
      __builtin_prefetch(bytes + at, 0, 2);
    }
  }

 private:
  INLINE const T* place(const T* all_of, int64_t token) const {
    return all_of + pages[token / page] * stride + token % page * width;
  }
};

// `PAIRS` times two vectors of the values from element `first` on, by `scores` over `total`.
template <int64_t HEADS, int64_t PAIRS, typename T>
INLINE void weigh(const Sight<T>& sight, const float* scores, int64_t line, const float* total,
                  int64_t first, T* out) {
  Two sum[HEADS][PAIRS] = {};
  sight.each(sight.values, [&](int64_t at, int64_t count, const T* here, const T* next) INLINED {
    for (int64_t token = 0; token < count; ++token) {
      const T* value = here + token * sight.width + first;
      if (first == 0) sight.fetch(next + token * sight.width);
      for (int64_t two = 0; two < PAIRS; ++two) {
        const Two x = load_two(value + two * PAIRED);
        for (int64_t h = 0; h < HEADS; ++h) {
          const float weight = scores[h * line + at + token];
          sum[h][two].first += weight * x.first;
          sum[h][two].second += weight * x.second;
        }
      }
    }
  });
  for (int64_t h = 0; h < HEADS; ++h) {
    for (int64_t two = 0; two < PAIRS; ++two) {
      const Two x = sum[h][two];
      store_two({x.first / total[h], x.second / total[h]},
                out + h * sight.width + first + two * PAIRED);
    }
  }
}

// What `HEADS` queries (fp32, scaled, one after another) get of what is in sight, and the log of
// the softmax's denominator. `scores` has room for as many lines of `line`: what is in sight,
// and two vectors more.
template <int64_t HEADS, typename T>
INLINE void attend(const Sight<T>& sight, const float* queries, float* scores, int64_t line,
                   T* out, float* log_sums) {
  const int64_t width = sight.width, whole = width / PAIRED * PAIRED;
  // Lanes behind the last token are to weigh 0.
  const int64_t tokens = sight.end - sight.start, last = tokens / LANES * LANES;
  Floats most[HEADS];
  for (int64_t h = 0; h < HEADS; ++h) {
    most[h] = all(NOTHING);
    store(most[h], scores + h * line + last);
    store(most[h], scores + h * line + last + LANES);
  }
  sight.each(sight.keys, [&](int64_t at, int64_t count, const T* here, const T* next) INLINED {
    Floats partial[HEADS][LANES] = {};
    for (int64_t token = 0; token < count; ++token) {
      const T* key = here + token * width;
      sight.fetch(next + token * width);
      for (int64_t d = 0; d < whole; d += PAIRED) {
        const Two k = load_two(key + d);
        for (int64_t h = 0; h < HEADS; ++h) {
          const Two q = load_two(queries + h * width + d);
          partial[h][token] += q.first * k.first + q.second * k.second;
        }
      }
      for (int64_t d = whole; d < width; ++d) {
        for (int64_t h = 0; h < HEADS; ++h) {
          partial[h][token][0] += queries[h * width + d] * static_cast<float>(key[d]);
        }
      }
    }
    for (int64_t h = 0; h < HEADS; ++h) {
      const Floats all_of = sums(partial[h]);
      const Floats score = IN_ORDER < static_cast<int32_t>(count) ? all_of : all(NOTHING);
      most[h] = larger(most[h], score);
      store(score, scores + h * line + at);
    }
  });

  float total[HEADS];
  for (int64_t h = 0; h < HEADS; ++h) {
    const float highest = largest(most[h]);
    Floats weights = {};
    for (int64_t at = 0; at < tokens; at += LANES) {
      float* score = scores + h * line + at;
      const Floats weight = exp(load(score) - highest);
      weights += weight;
      store(weight, score);
    }
    total[h] = sum(weights);
    log_sums[h] = highest + std::log(total[h]);
  }

  int64_t first = 0;
  for (; first + TWOS * PAIRED <= width; first += TWOS * PAIRED) {
    weigh<HEADS, TWOS>(sight, scores, line, total, first, out);
  }
  for (; first < whole; first += PAIRED) weigh<HEADS, 1>(sight, scores, line, total, first, out);
  for (; first < width; ++first) {
    float sum[HEADS] = {};
    sight.each(sight.values, [&](int64_t at, int64_t count, const T* here, const T*) INLINED {
      for (int64_t token = 0; token < count; ++token) {
        const float value = static_cast<float>(here[token * width + first]);
        for (int64_t h = 0; h < HEADS; ++h) sum[h] += scores[h * line + at + token] * value;
      }
    });
    for (int64_t h = 0; h < HEADS; ++h) out[h * width + first] = sum[h] / total[h];
  }
}

// What a thread works in: queries of a group as fp32, scaled, and lines of scores.
struct Room {
  std::vector<float> queries, scores;
  int64_t line;
};

template <typename T>
INLINE void attend_group(const Sight<T>& sight, const T* queries, int64_t heads, float scale,
                         Room& room, T* out, float* log_sums) {
  const int64_t width = sight.width;
  // Each head's whole vectors in the order in which keys come.
  const auto widened = [scale](const T* from, float* to) INLINED {
    const Two x = load_two(from);
    store_two({x.first * scale, x.second * scale}, to);
  };
  for (int64_t h = 0; h < heads; ++h) {
    const T* from = queries + h * width;
    float* to = room.queries.data() + h * width;
    const int64_t whole = width / PAIRED * PAIRED;
    by_twos(whole, widened, from, to);
    for (int64_t d = whole; d < width; ++d) to[d] = static_cast<float>(from[d]) * scale;
  }
  float* scores = room.scores.data();
  for (int64_t h = 0; h < heads; h += TOGETHER) {
    const float* some = room.queries.data() + h * width;
    T* to = out + h * width;
    switch (std::min(TOGETHER, heads - h)) {
      case 1: attend<1>(sight, some, scores, room.line, to, log_sums + h); break;
      case 2: attend<2>(sight, some, scores, room.line, to, log_sums + h); break;
      case 3: attend<3>(sight, some, scores, room.line, to, log_sums + h); break;
      default: attend<TOGETHER>(sight, some, scores, room.line, to, log_sums + h);
    }
  }
}

template <typename T>
void run(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
         const at::Tensor& tables, const at::Tensor& sights, double scale, at::Tensor& out,
         at::Tensor& log_sums) {
  const int64_t tokens = queries.size(0), heads = queries.size(1), width = queries.size(2);
  const int64_t kv_heads = keys.size(1), page = keys.size(2), group = heads / kv_heads;
  const int64_t pages = tables.size(1), line = pages * page + 2 * LANES;
  const int64_t threads = at::get_num_threads();
  // In turn: rows that follow one another may be of one length.
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    Room room = {std::vector<float>(group * width), std::vector<float>(TOGETHER * line), line};
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t piece = thread; piece < tokens * kv_heads; piece += threads) {
        const int64_t token = piece / kv_heads, head = piece % kv_heads;
        const T* query = queries.const_data_ptr<T>() + token * queries.stride(0) +
                         head * group * width;
        const int64_t* bounds = sights.const_data_ptr<int64_t>() + token * 2;
        const int64_t offset = head * page * width;
        const Sight<T> sight = {keys.const_data_ptr<T>() + offset,
                                values.const_data_ptr<T>() + offset,
                                tables.const_data_ptr<int64_t>() + token * pages,
                                bounds[0],
                                bounds[1],
                                page,
                                width,
                                kv_heads * page * width};
        const int64_t first = token * heads + head * group;
        attend_group(sight, query, group, static_cast<float>(scale), room,
                     out.mutable_data_ptr<T>() + first * width,
                     log_sums.mutable_data_ptr<float>() + first);
      }
    }
  });
}

// `queries` [tokens, heads, head_dim], of each token the pages of its row in `tables` [tokens,
// most], and in `sights` [tokens, 2] from which of the row's tokens to which it sees them; `keys`
// and `values` [pages, kv_heads, page, head_dim]. What comes out, as `queries`, and the log of the
// softmax's denominator, [tokens, heads], fp32.
std::tuple<at::Tensor, at::Tensor> paged_attention(const at::Tensor& queries,
                                                   const at::Tensor& keys,
                                                   const at::Tensor& values,
                                                   const at::Tensor& tables,
                                                   const at::Tensor& sights, double scale) {
  TORCH_CHECK(queries.dim() == 3 && keys.dim() == 4 && keys.sizes() == values.sizes(),
              "paged attention of ", queries.sizes(), " over ", keys.sizes(), ", ",
              values.sizes());
  const int64_t tokens = queries.size(0), heads = queries.size(1), width = queries.size(2);
  TORCH_CHECK(heads % keys.size(1) == 0 && width == keys.size(3) && queries.stride(2) == 1 &&
                  queries.stride(1) == width && keys.is_contiguous() && values.is_contiguous(),
              "paged attention of ", queries.sizes(), " by ", queries.strides(), " over ",
              keys.sizes());
  TORCH_CHECK(keys.dtype() == queries.dtype() && values.dtype() == queries.dtype(),
              "paged attention of ", queries.dtype(), " over ", keys.dtype());
  TORCH_CHECK(tables.dim() == 2 && tables.size(0) == tokens && tables.is_contiguous() &&
                  sights.is_contiguous() && sights.numel() == 2 * tokens,
              "paged attention of ", tokens, " tokens by ", tables.sizes(), ", ", sights.sizes());
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t* bounds = sights.const_data_ptr<int64_t>() + token * 2;
    TORCH_CHECK(0 <= bounds[0] && bounds[0] < bounds[1] &&
                    bounds[1] <= tables.size(1) * keys.size(2),
                "token ", token, " sees from ", bounds[0], " to ", bounds[1]);
  }
  const int64_t* table = tables.const_data_ptr<int64_t>();
  TORCH_CHECK(std::all_of(table, table + tables.numel(),
                          [&](int64_t page) { return 0 <= page && page < keys.size(0); }),
              "a page beyond the ", keys.size(0), " there are");

  at::Tensor out = at::empty(queries.sizes(), queries.options());
  at::Tensor log_sums = at::empty({tokens, heads}, queries.options().dtype(at::kFloat));
  if (queries.scalar_type() == at::kFloat) {
    run<float>(queries, keys, values, tables, sights, scale, out, log_sums);
  } else {
    TORCH_CHECK(queries.scalar_type() == at::kBFloat16, "paged attention of ", queries.dtype());
    run<c10::BFloat16>(queries, keys, values, tables, sights, scale, out, log_sums);
  }
  return {out, log_sums};
}

}  // namespace drift::LEVEL
