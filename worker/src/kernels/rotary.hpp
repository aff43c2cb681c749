// Rotary positions: x <- x * cos + swap_halves(x) * sin, with the sign of "rotate half" in sin.
#pragma once

#include "simd.hpp"
#include "tensors.hpp"

namespace drift {

// One head, in place.
template <typename T>
INLINE void rotate_head(T* x, const T* cos, const T* sin, int64_t half) {
  int64_t at = 0;
  for (; at + PAIRED <= half; at += PAIRED) {
    const Two a = load_two(x + at), b = load_two(x + half + at);
    const Two cos_a = load_two(cos + at), cos_b = load_two(cos + half + at);
    const Two sin_a = load_two(sin + at), sin_b = load_two(sin + half + at);
    store_two({a.first * cos_a.first + b.first * sin_a.first,
               a.second * cos_a.second + b.second * sin_a.second},
              x + at);
    store_two({b.first * cos_b.first + a.first * sin_b.first,
               b.second * cos_b.second + a.second * sin_b.second},
              x + half + at);
  }
  const auto turned = [](T x, T cos, T other, T sin) INLINED {
    return static_cast<T>(static_cast<float>(x) * static_cast<float>(cos) +
                          static_cast<float>(other) * static_cast<float>(sin));
  };
  for (; at < half; ++at) {
    const T a = x[at], b = x[half + at];
    x[at] = turned(a, cos[at], b, sin[at]);
    x[half + at] = turned(b, cos[half + at], a, sin[half + at]);
  }
}

template <typename T>
INLINE void rotate_token(T* x, int64_t heads, int64_t stride, const T* cos, const T* sin,
                         int64_t width) {
  for (int64_t head = 0; head < heads; ++head) rotate_head(x + head * stride, cos, sin, width / 2);
}

CLONES void rotate_some(float* x, int64_t heads, int64_t stride, const float* cos,
                        const float* sin, int64_t width) {
  rotate_token(x, heads, stride, cos, sin, width);
}

CLONES void rotate_some(c10::BFloat16* x, int64_t heads, int64_t stride, const c10::BFloat16* cos,
                        const c10::BFloat16* sin, int64_t width) {
  rotate_token(x, heads, stride, cos, sin, width);
}

// `x` [tokens, heads, head_dim] in place, by `cos` and `sin` [tokens, head_dim].
void rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  TORCH_CHECK(x.dim() == 3 && x.size(2) % 2 == 0 && x.stride(2) == 1 && cos.dim() == 2 &&
                  cos.size(0) == x.size(0) && cos.size(1) == x.size(2) &&
                  cos.sizes() == sin.sizes(),
              "a rotation of ", x.sizes(), " by ", cos.sizes(), ", ", sin.sizes());
  by_kind(x, [&]<typename T>() {
    const Rows<const T> cosines("cos", cos), sines("sin", sin);
    T* data = x.mutable_data_ptr<T>();
    in_parallel(x.size(0), x.size(1) * x.size(2), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        rotate_some(data + token * x.stride(0), x.size(1), x.stride(1), cosines[token],
                    sines[token], x.size(2));
      }
    });
  });
}

}  // namespace drift
