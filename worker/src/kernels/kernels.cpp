// The kernels as operators of libtorch's.

#include <torch/library.h>

#include "attention.hpp"
#include "causal.hpp"
#include "gate.hpp"
#include "leaders.hpp"
#include "norm.hpp"
#include "optimizer.hpp"
#include "rotary.hpp"
#include "softmax.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace drift {

// Whether this processor has sixteen lanes for fp32, and no better way to multiply bf16 than by
// vectors (AMX).
bool multiplies_by_vectors() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  const bool has_tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  return __builtin_cpu_supports("avx512f") && !has_tiles;
#else
  return false;
#endif
}

}  // namespace drift

TORCH_LIBRARY(drift, library) {
  library.def(
      "paged_attention(Tensor queries, Tensor keys, Tensor values, Tensor tables, Tensor sights, "
      "float scale) -> (Tensor, Tensor)");
  library.def(
      "causal_attention(Tensor queries, Tensor keys, Tensor values, float scale, int window, "
      "Tensor(a!) out) -> Tensor");
  library.def("multiplies_by_vectors() -> bool", &drift::multiplies_by_vectors);
  library.def("leaders(Tensor scores, float temperature, float depth) -> (Tensor, Tensor)");
  library.def(
      "rms_norm(Tensor x, Tensor weight, float eps, bool one_plus, Tensor(a!) out) -> ()");
  library.def(
      "rms_norm_backward(Tensor x, Tensor weight, float eps, bool one_plus, Tensor gradient, "
      "Tensor? residual, Tensor(a!)? output, Tensor(b!) by_input) -> Tensor");
  library.def("softmax_backward(Tensor(a!) both, float factor, int window) -> ()");
  library.def("rotate(Tensor(a!) x, Tensor cos, Tensor sin) -> ()");
  library.def("gated(Tensor gate_up, bool gelu, Tensor(a!) out) -> ()");
  library.def(
      "gated_backward(Tensor(a!) gate_up, Tensor gradient, bool gelu, Tensor(b!) activated) -> ()");
  library.def(
      "rmsprop(Tensor gradient, Tensor(a!) square_avg, Tensor(b!) values, Tensor(c!)? rounded, "
      "float alpha, float fresh, float rate, float eps) -> ()");
  library.def(
      "adamw(Tensor gradient, Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor(c!) values, "
      "Tensor(d!)? rounded, float clip, float beta1, float beta2, float keep, float rate, "
      "float unbias, float eps) -> ()");
}

TORCH_LIBRARY_IMPL(drift, CPU, library) {
  library.impl("paged_attention", &drift::paged_attention);
  library.impl("causal_attention", &drift::causal_attention);
  library.impl("leaders", &drift::leaders);
  library.impl("rms_norm", &drift::rms_norm);
  library.impl("rms_norm_backward", &drift::rms_norm_backward);
  library.impl("softmax_backward", &drift::softmax_backward);
  library.impl("rotate", &drift::rotate);
  library.impl("gated", &drift::gated);
  library.impl("gated_backward", &drift::gated_backward);
  library.impl("rmsprop", &drift::rmsprop);
  library.impl("adamw", &drift::adamw);
}
