// What sampling wants to know of scores: how much mass there is, and who is near the best.

#include <cmath>
#include <vector>

namespace drift::LEVEL {

struct Summary {
  // The largest score, and sums of e^(score - best) and of e^((score - best) / temperature).
  float best;
  double plain, tempered;
};

// Elements whose exponentials are summed in fp32 before fp64 takes over: top-p looks at sums
// closely, and those of a whole vocabulary would be off by a few millionths.
constexpr int64_t SUMMED = 32 * PAIRED;

template <typename T>
INLINE Summary summarise(const T* scores, int64_t count, float temperature) {
  const int64_t whole = count / PAIRED * PAIRED;
  Floats most = all(NOTHING);
  for (int64_t at = 0; at < whole; at += PAIRED) {
    const Two x = load_two(scores + at);
    most = larger(most, larger(x.first, x.second));
  }
  float best = largest(most);
  for (int64_t at = whole; at < count; ++at) {
    best = std::max(best, static_cast<float>(scores[at]));
  }
  // 1 / temperature in two parts: the first alone would be off alike for all scores.
  const float inverse = 1.0f / temperature;
  const float rest = static_cast<float>(1.0 / temperature - inverse);
  double sums[2] = {};
  for (int64_t begin = 0; begin < whole; begin += SUMMED) {
    const int64_t end = std::min(begin + SUMMED, whole);
    Floats plain = {}, tempered = {};
    for (int64_t at = begin; at < end; at += PAIRED) {
      const Two x = load_two(scores + at);
      // What cannot be drawn, at -inf, must stay a number when multiplied by both parts.
      const Floats lowest = all(-1e30f);
      const Floats first = larger(lowest, x.first - best);
      const Floats second = larger(lowest, x.second - best);
      plain += exp(first) + exp(second);
      tempered += exp(first * inverse + first * rest) + exp(second * inverse + second * rest);
    }
    sums[0] += sum(plain);
    sums[1] += sum(tempered);
  }
  for (int64_t at = whole; at < count; ++at) {
    const double below = static_cast<double>(scores[at]) - best;
    sums[0] += std::exp(below);
    sums[1] += std::exp(below / temperature);
  }
  return {best, sums[0], sums[1]};
}

struct Leader {
  int64_t id;
  float score;
};

// Those whose score over the temperature is less than `depth` below the best's.
template <typename T>
INLINE void lead(const T* scores, int64_t count, float best, float temperature, float depth,
                 std::vector<Leader>& leaders) {
  // A little deeper: what counts is the quotient, rounded.
  const float floor = best - depth * temperature * 1.001f;
  const float least = best / temperature - depth;
  for (int64_t at = 0; at < count; at += PAIRED) {
    const int64_t end = std::min(at + PAIRED, count);
    if (end - at == PAIRED) {
      const Two x = load_two(scores + at);
      if (largest(larger(x.first, x.second)) < floor) continue;
    }
    for (int64_t id = at; id < end; ++id) {
      const float score = static_cast<float>(scores[id]) / temperature;
      if (score > least) leaders.push_back({id, score});
    }
  }
}

// Of each row of `scores` [rows, vocab]: [rows, 4], fp32, with the best, the logs of the sums of
// e^score and of e^((score - best) / temperature), and how many lead, those less than `depth`
// below the best over the temperature. These leaders, row after row, each with its id
// (fp32 holds every one below 2^24) and its score over the temperature: [n, 2].
std::tuple<at::Tensor, at::Tensor> leaders(const at::Tensor& scores, double temperature,
                                           double depth) {
  TORCH_CHECK(scores.dim() == 2 && scores.size(1) > 0 && temperature > 0, "the leaders of ",
              scores.sizes(), " at temperature ", temperature);
  const int64_t rows = scores.size(0), vocab = scores.size(1);
  at::Tensor heads = at::empty({rows, 4}, scores.options().dtype(at::kFloat));
  std::vector<std::vector<Leader>> found(rows);
  by_kind(scores, [&]<typename T>() {
    const Rows<const T> from("scores", scores);
    float* to = heads.mutable_data_ptr<float>();
    in_parallel(rows, vocab, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const Summary summary = summarise(from[row], vocab, static_cast<float>(temperature));
        lead(from[row], vocab, summary.best, static_cast<float>(temperature),
             static_cast<float>(depth), found[row]);
        to[4 * row] = summary.best;
        to[4 * row + 1] = static_cast<float>(summary.best + std::log(summary.plain));
        to[4 * row + 2] = static_cast<float>(std::log(summary.tempered));
        to[4 * row + 3] = static_cast<float>(found[row].size());
      }
    });
  });
  int64_t count = 0;
  for (const auto& row : found) count += row.size();
  at::Tensor leaders = at::empty({count, 2}, scores.options().dtype(at::kFloat));
  float* to = leaders.mutable_data_ptr<float>();
  for (const auto& row : found) {
    for (const Leader& leader : row) {
      *to++ = static_cast<float>(leader.id);
      *to++ = leader.score;
    }
  }
  return {heads, leaders};
}

}  // namespace drift::LEVEL
