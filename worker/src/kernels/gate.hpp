// The MLP's gate: a = f(g) * u, f(g) = g s, where s is the logistic function of g (SiLU), or of
// 2 sqrt(2 / pi) (g + 0.044715 g^3): that is GELU's approximation, as (1 + tanh(x)) / 2 is the
// logistic function of 2 x.

namespace drift::LEVEL {

constexpr float SLOPE = 1.5957691216057308f;
constexpr float CUBIC = 0.044715f;

INLINE Floats logistic(Floats x) { return 1.0f / (1.0f + exp(smaller(-x, all(88.0f)))); }

// f(g), and f'(g).
struct Activated {
  Floats value, slope;
};

INLINE Activated activate(Floats g, bool gelu) {
  const Floats square = g * g;
  const Floats x = gelu ? SLOPE * (g + CUBIC * square * g) : g;
  const Floats inner = gelu ? SLOPE * (1.0f + 3.0f * CUBIC * square) : all(1.0f);
  const Floats s = logistic(x);
  return {g * s, s + g * s * (1.0f - s) * inner};
}

template <typename T>
INLINE void gate_row(const T* gate, const T* up, int64_t width, bool gelu, T* out) {
  const auto two = [gelu](const T* g, const T* u, T* to) INLINED {
    const Two gates = load_two(g), ups = load_two(u);
    store_two({activate(gates.first, gelu).value * ups.first,
               activate(gates.second, gelu).value * ups.second},
              to);
  };
  by_twos(width, two, gate, up, out);
}

// `gate_up` [rows, 2 * width], g and then u, to `out` [rows, width].
void gated(const at::Tensor& gate_up, bool gelu, const at::Tensor& out) {
  TORCH_CHECK(gate_up.dim() == 2 && out.dim() == 2 && gate_up.size(0) == out.size(0) &&
                  gate_up.size(1) == 2 * out.size(1),
              "a gate of ", gate_up.sizes(), " into ", out.sizes());
  by_kind(gate_up, [&]<typename T>() {
    const Rows<const T> from("gate_up", gate_up);
    const Rows<T> to("out", out);
    in_parallel(to.count(), to.width(), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        gate_row(from[row], from[row] + to.width(), to.width(), gelu, to[row]);
      }
    });
  });
}

// Overwrites `gate_up` with the gradient by it, given that by a, `gradient`, and writes a again
// to `activated`, both [rows, width]: du = da f(g), dg = da u f'(g).
template <typename T>
INLINE void gate_backward_row(T* gate, T* up, const T* gradient, int64_t width, bool gelu,
                              T* activated) {
  const auto two = [gelu](T* g, T* u, const T* da, T* a) INLINED {
    const Two gates = load_two(g), ups = load_two(u), by = load_two(da);
    const Activated first = activate(gates.first, gelu), second = activate(gates.second, gelu);
    store_two({first.value * ups.first, second.value * ups.second}, a);
    store_two({by.first * first.value, by.second * second.value}, u);
    store_two({by.first * ups.first * first.slope, by.second * ups.second * second.slope}, g);
  };
  by_twos(width, two, gate, up, gradient, activated);
}

void gated_backward(const at::Tensor& gate_up, const at::Tensor& gradient, bool gelu,
                    const at::Tensor& activated) {
  TORCH_CHECK(gate_up.dim() == 2 && gradient.dim() == 2 && gate_up.size(0) == gradient.size(0) &&
                  gate_up.size(1) == 2 * gradient.size(1) &&
                  gradient.sizes() == activated.sizes(),
              "a gate's backward of ", gate_up.sizes(), ", ", gradient.sizes(), ", ",
              activated.sizes());
  by_kind(gate_up, [&]<typename T>() {
    const Rows<T> x("gate_up", gate_up), to("activated", activated);
    const Rows<const T> by("gradient", gradient);
    in_parallel(to.count(), to.width(), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        gate_backward_row(x[row], x[row] + to.width(), by[row], to.width(), gelu, to[row]);
      }
    });
  });
}

}  // namespace drift::LEVEL
