// RMSNorm: y = s * x^, x^ = x / sqrt(mean(x^2) + eps), with s = w, applied to x^ as it is rounded
// to the kind of x, or s = 1 + w, rounded once.

#include <cmath>
#include <optional>

namespace drift::LEVEL {

struct Norm {
  double eps;
  bool one_plus;
};

// 1 / sqrt(mean(x^2) + eps).
template <typename T>
INLINE float reciprocal(const T* x, int64_t width, double eps) {
  Floats squares = {};
  const auto two = [&](const T* x) INLINED {
    const Two v = load_two(x);
    squares += v.first * v.first + v.second * v.second;
  };
  by_twos(width, two, x);
  return 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + static_cast<float>(eps));
}

// `x` as a tensor of T holds it.
INLINE Floats as_kept(Floats x, const float*) { return x; }
INLINE Floats as_kept(Floats x, const c10::BFloat16*) { return (Floats)(rounded(x) & 0xffff0000); }

template <typename T>
INLINE Two scaled(Two normed, const T* weight, bool one_plus) {
  const Two w = load_two(weight);
  if (one_plus) return {normed.first * (w.first + 1.0f), normed.second * (w.second + 1.0f)};
  return {as_kept(normed.first, weight) * w.first, as_kept(normed.second, weight) * w.second};
}

template <typename T>
INLINE void norm_row(const T* x, const T* weight, int64_t width, Norm norm, T* out) {
  const float r = reciprocal(x, width, norm.eps);
  const auto two = [&](const T* x, const T* w, T* y) INLINED {
    const Two v = load_two(x);
    store_two(scaled({v.first * r, v.second * r}, w, norm.one_plus), y);
  };
  by_twos(width, two, x, weight, out);
}

void check_weight(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 1 && weight.is_contiguous() && weight.size(0) == x.size(-1) &&
                  weight.scalar_type() == x.scalar_type(),
              "a norm's weight is ", weight.sizes(), " of ", weight.dtype(), " for ", x.sizes(),
              " of ", x.dtype());
}

// To `out`, which is shaped as `x`, [..., width].
void rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, bool one_plus,
              const at::Tensor& out) {
  check_weight(x, weight);
  TORCH_CHECK(x.sizes() == out.sizes(), "a norm of ", x.sizes(), " into ", out.sizes());
  by_kind(x, [&]<typename T>() {
    const Rows<const T> from("x", x);
    const Rows<T> to("out", out);
    in_parallel(from.count(), from.width(), [&](int64_t begin, int64_t end) {
      const T* by = weight.const_data_ptr<T>();
      for (int64_t row = begin; row < end; ++row) {
        norm_row(from[row], by, from.width(), {eps, one_plus}, to[row]);
      }
    });
  });
}

// Rows whose share of a weight's gradient is summed by itself: fixed, so that no sum depends on
// how many threads there are.
constexpr int64_t SUMMED_ROWS = 32;

// What `rms_norm_backward` reads and writes; residual and output may be missing.
template <typename T>
struct NormBackward {
  Rows<const T> x, gradient;
  std::optional<Rows<const T>> residual;
  std::optional<Rows<T>> output;
  Rows<T> by_input;
  const T* weight;
  Norm norm;
};

// With r = 1 / sqrt(mean(x^2) + eps) and g = s * dy:
//   dx = r (g - x^ * mean(g * x^))      dw = sum over rows of dy * x^
// dw of rows [begin, end) is added to `by_weight`.
template <typename T>
INLINE void norm_backward_rows(const NormBackward<T>& all_rows, int64_t begin, int64_t end,
                               float* by_weight) {
  const auto& [x_rows, gradient_rows, residual_rows, output_rows, by_rows, weight, norm] = all_rows;
  const int64_t width = x_rows.width();
  const float shift = norm.one_plus ? 1.0f : 0.0f;
  for (int64_t row = begin; row < end; ++row) {
    const T *x = x_rows[row], *gradient = gradient_rows[row];
    const T* residual = residual_rows ? (*residual_rows)[row] : nullptr;
    T *output = output_rows ? (*output_rows)[row] : nullptr, *by_input = by_rows[row];
    const float r = reciprocal(x, width, norm.eps);
    Floats products = {};
    const auto gather = [&](const T* x, const T* dy, const T* w, float* dw) INLINED {
      const Two v = load_two(x), by = load_two(dy), s = load_two(w);
      const Two sum = load_two_beside(dw, x);
      const Two product = {v.first * r * by.first, v.second * r * by.second};
      products += product.first * (s.first + shift) + product.second * (s.second + shift);
      store_two_beside({sum.first + product.first, sum.second + product.second}, dw, x);
    };
    by_twos(width, gather, x, gradient, weight, by_weight);
    const float mean = sum(products) / static_cast<float>(width);
    const auto write = [&](const T* x, const T* dy, const T* w, const T* skipped, T* y,
                           T* dx) INLINED {
      const Two v = load_two(x), by = load_two(dy), s = load_two(w);
      const Two normed = {v.first * r, v.second * r};
      Two out = {r * (by.first * (s.first + shift) - normed.first * mean),
                 r * (by.second * (s.second + shift) - normed.second * mean)};
      if (skipped != nullptr) {
        const Two more = load_two(skipped);
        out = {out.first + more.first, out.second + more.second};
      }
      if (y != nullptr) store_two(scaled(normed, w, norm.one_plus), y);
      store_two(out, dx);
    };
    by_twos(width, write, x, gradient, weight, residual, output, by_input);
  }
}

// `gradient` is that by y, shaped as x; that by x, plus `residual`, goes to `by_input`, and y again
// to `output`, both shaped as x too. Returned is that by w, [width], fp32.
at::Tensor rms_norm_backward(const at::Tensor& x, const at::Tensor& weight, double eps,
                             bool one_plus, const at::Tensor& gradient,
                             const std::optional<at::Tensor>& residual,
                             const std::optional<at::Tensor>& output,
                             const at::Tensor& by_input) {
  check_weight(x, weight);
  TORCH_CHECK(x.sizes() == gradient.sizes() && x.sizes() == by_input.sizes() &&
                  (!residual || residual->sizes() == x.sizes()) &&
                  (!output || output->sizes() == x.sizes()),
              "a norm's backward of ", x.sizes(), ", ", gradient.sizes(), ", ", by_input.sizes());
  const int64_t width = x.size(-1);
  const auto options = x.options().dtype(at::kFloat);
  at::Tensor by_weight;
  by_kind(x, [&]<typename T>() {
    NormBackward<T> all_rows = {{"x", x},        {"gradient", gradient},
                                std::nullopt,    std::nullopt,
                                {"by_input", by_input}, weight.const_data_ptr<T>(),
                                {eps, one_plus}};
    if (residual) all_rows.residual.emplace("residual", *residual);
    if (output) all_rows.output.emplace("output", *output);
    const int64_t count = all_rows.x.count(), parts = (count + SUMMED_ROWS - 1) / SUMMED_ROWS;
    at::Tensor partial = at::zeros({parts, width}, options);
    float* sums = partial.mutable_data_ptr<float>();
    in_parallel(parts, SUMMED_ROWS * width, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        norm_backward_rows(all_rows, part * SUMMED_ROWS,
                           std::min(count, (part + 1) * SUMMED_ROWS), sums + part * width);
      }
    });
    by_weight = partial.sum(0);
  });
  return by_weight;
}

}  // namespace drift::LEVEL
