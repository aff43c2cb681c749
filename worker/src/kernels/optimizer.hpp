// RMSprop and AdamW on fp32 weights, as torch.optim has them: one pass over gradient, moments and
// weights, which are more than any cache holds.

#include <optional>

namespace drift::LEVEL {

// Weights of which each thread updates some, and where they go rounded, if anywhere.
struct Weights {
  const float* gradient;
  float* values;
  c10::BFloat16* rounded;
};

// `update` for two vectors of weights at a time: their gradient and what they are, and places of
// moments. Returned is what they become.
template <typename Update, typename... Moments>
INLINE void update_each(const Weights& weights, int64_t begin, int64_t end, Update update,
                        Moments*... moments) {
  const auto two = [&](const float* gradient, float* values, c10::BFloat16* rounded,
                       Moments*... moments) INLINED {
    store_two(update(load_two(gradient), load_two(values), moments...), values);
    if (rounded) store_two(load_two_beside(values, rounded), rounded);
  };
  c10::BFloat16* rounded = weights.rounded ? weights.rounded + begin : nullptr;
  by_twos(end - begin, two, weights.gradient + begin, weights.values + begin, rounded,
          moments + begin...);
}

// v <- alpha v + fresh g^2, w <- w - rate g / (sqrt(v) + eps).
struct RmsProp {
  float alpha, fresh, rate, eps;

  INLINE Floats moment(Floats g, Floats v) const { return v * alpha + fresh * g * g; }
  INLINE Floats weight(Floats g, Floats w, Floats v) const {
    return w - rate * g / (root(v) + eps);
  }
};

INLINE void rmsprop_some(const RmsProp& rule, const Weights& weights, float* square_avg,
                         int64_t begin, int64_t end) {
  const auto update = [&](Two g, Two w, float* at) INLINED -> Two {
    const Two old = load_two(at);
    const Two v = {rule.moment(g.first, old.first), rule.moment(g.second, old.second)};
    store_two(v, at);
    return {rule.weight(g.first, w.first, v.first), rule.weight(g.second, w.second, v.second)};
  };
  update_each(weights, begin, end, update, square_avg);
}

// g <- clip g, m <- m + (1 - beta1) (g - m), v <- beta2 v + (1 - beta2) g^2,
// w <- keep w - rate m / (sqrt(v) / unbias + eps).
struct AdamW {
  float clip, beta1, beta2, keep, rate, unbias, eps;

  INLINE Floats mean(Floats g, Floats m) const { return m + (1.0f - beta1) * (g * clip - m); }
  INLINE Floats square(Floats g, Floats v) const {
    return v * beta2 + (1.0f - beta2) * (g * clip) * (g * clip);
  }
  INLINE Floats weight(Floats w, Floats m, Floats v) const {
    return w * keep - rate * m / (root(v) / unbias + eps);
  }
};

INLINE void adamw_some(const AdamW& rule, const Weights& weights, float* exp_avg,
                       float* exp_avg_sq, int64_t begin, int64_t end) {
  const auto update = [&](Two g, Two w, float* mean, float* square) INLINED -> Two {
    const Two means = load_two(mean), squares = load_two(square);
    const Two m = {rule.mean(g.first, means.first), rule.mean(g.second, means.second)};
    const Two v = {rule.square(g.first, squares.first), rule.square(g.second, squares.second)};
    store_two(m, mean);
    store_two(v, square);
    return {rule.weight(w.first, m.first, v.first), rule.weight(w.second, m.second, v.second)};
  };
  update_each(weights, begin, end, update, exp_avg, exp_avg_sq);
}

void check_flat(const char* name, const at::Tensor& x, const at::Tensor& like,
                at::ScalarType kind) {
  TORCH_CHECK(x.dim() == 1 && x.is_contiguous() && x.numel() == like.numel() &&
                  x.scalar_type() == kind,
              name, " is ", x.sizes(), " of ", x.dtype(), " for ", like.sizes(), " weights");
}

// Of `values`, fp32, with their gradient, fp32, and where they go as bf16: all [n].
Weights weights_of(const at::Tensor& gradient, const at::Tensor& values,
                   const std::optional<at::Tensor>& rounded) {
  check_flat("values", values, values, at::kFloat);
  check_flat("gradient", gradient, values, at::kFloat);
  if (rounded) check_flat("rounded", *rounded, values, at::kBFloat16);
  return {gradient.const_data_ptr<float>(), values.mutable_data_ptr<float>(),
          rounded ? rounded->mutable_data_ptr<c10::BFloat16>() : nullptr};
}

void rmsprop(const at::Tensor& gradient, const at::Tensor& square_avg, const at::Tensor& values,
             const std::optional<at::Tensor>& rounded, double alpha, double fresh, double rate,
             double eps) {
  const Weights weights = weights_of(gradient, values, rounded);
  check_flat("square_avg", square_avg, values, at::kFloat);
  const RmsProp rule = {static_cast<float>(alpha), static_cast<float>(fresh),
                        static_cast<float>(rate), static_cast<float>(eps)};
  float* squares = square_avg.mutable_data_ptr<float>();
  in_parallel(values.numel(), 1, [&](int64_t begin, int64_t end) {
    rmsprop_some(rule, weights, squares, begin, end);
  });
}

void adamw(const at::Tensor& gradient, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
           const at::Tensor& values, const std::optional<at::Tensor>& rounded, double clip,
           double beta1, double beta2, double keep, double rate, double unbias, double eps) {
  const Weights weights = weights_of(gradient, values, rounded);
  check_flat("exp_avg", exp_avg, values, at::kFloat);
  check_flat("exp_avg_sq", exp_avg_sq, values, at::kFloat);
  const AdamW rule = {static_cast<float>(clip), static_cast<float>(beta1),
                      static_cast<float>(beta2), static_cast<float>(keep),
                      static_cast<float>(rate), static_cast<float>(unbias),
                      static_cast<float>(eps)};
  float* means = exp_avg.mutable_data_ptr<float>();
  float* squares = exp_avg_sq.mutable_data_ptr<float>();
  in_parallel(values.numel(), 1, [&](int64_t begin, int64_t end) {
    adamw_some(rule, weights, means, squares, begin, end);
  });
}

}  // namespace drift::LEVEL
