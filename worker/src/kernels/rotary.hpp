// Rotary positions: x <- x * cos + swap_halves(x) * sin, with the sign of "rotate half" in sin.

namespace drift::LEVEL {

// One head, in place.
template <typename T>
INLINE void rotate_head(T* x, const T* cos, const T* sin, int64_t half) {
  const auto two = [](T* a, T* b, const T* cos_a, const T* cos_b, const T* sin_a,
                      const T* sin_b) INLINED {
    const Two x = load_two(a), y = load_two(b);
    const Two cx = load_two(cos_a), cy = load_two(cos_b), sx = load_two(sin_a);
    const Two sy = load_two(sin_b);
    store_two({x.first * cx.first + y.first * sx.first,
               x.second * cx.second + y.second * sx.second},
              a);
    store_two({y.first * cy.first + x.first * sy.first,
               y.second * cy.second + x.second * sy.second},
              b);
  };
  by_twos(half, two, x, x + half, cos, cos + half, sin, sin + half);
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
        for (int64_t head = 0; head < x.size(1); ++head) {
          rotate_head(data + token * x.stride(0) + head * x.stride(1), cosines[token],
                      sines[token], x.size(2) / 2);
        }
      }
    });
  });
}

}  // namespace drift::LEVEL
