// A softmax's weights and the gradient by its scores, as attention's backward has them.

#include <vector>

namespace drift::LEVEL {

// Of `logs`, whose multiple by `factor` is log p, those in [first, end) to p, and of `gradients`
// to p times them; the others to 0.
template <typename T>
INLINE void weigh_row(T* logs, T* gradients, int64_t count, int64_t first, int64_t end,
                      float factor) {
  const auto two = [factor](T* log, T* gradient) INLINED {
    const Two logs = load_two(log), by = load_two(gradient);
    const Two p = {exp(logs.first * factor), exp(logs.second * factor)};
    store_two(p, log);
    store_two({p.first * by.first, p.second * by.second}, gradient);
  };
  by_twos(end - first, two, logs + first, gradients + first);
  for (T* x : {logs, gradients}) {
    std::fill(x, x + first, T(0.0f));
    std::fill(x + end, x + count, T(0.0f));
  }
}

// `both` [2, heads, queries, keys], in place: logs of softmax weights p over `factor`, and gradients
// by p; then p, and gradients by scores. The last key is the last query's own, and a query sees the
// last `window` keys up to its own.
void softmax_backward(const at::Tensor& both, double factor, int64_t window) {
  TORCH_CHECK(both.dim() == 4 && both.size(0) == 2 && both.is_contiguous() &&
                  both.size(3) >= both.size(2) && window > 0,
              "a softmax's backward of ", both.sizes(), " by ", window);
  const int64_t queries = both.size(2), keys = both.size(3), rows = both.size(1) * queries;
  by_kind(both, [&]<typename T>() {
    T* logs = both.mutable_data_ptr<T>();
    T* gradients = logs + rows * keys;
    in_parallel(rows, keys, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t behind = keys - queries + row % queries + 1;
        weigh_row(logs + row * keys, gradients + row * keys, keys,
                  std::max<int64_t>(behind - window, 0), behind, static_cast<float>(factor));
      }
    });
  });
}

}  // namespace drift::LEVEL
