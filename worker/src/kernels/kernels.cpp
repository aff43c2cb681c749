// The kernels as operators of libtorch's: each for the least processors, and on x86 for two levels
// above them, of which the program takes the highest that the processor has.

#include <torch/library.h>

#include <tuple>

#include "tensors.hpp"

// A function becomes part of who calls it.
#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))

// First, so that what they include is compiled for all processors.
#define LEVEL least
#define VECTOR 16
#if defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif
#include "all.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_LEVELS

#include <cpuid.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#define LEVEL avx2
#define VECTOR 32
#define REGISTERS 16
#include "all.hpp"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#define LEVEL avx512
#define VECTOR 64
#define REGISTERS 32
#include "all.hpp"
#pragma GCC pop_options
#endif

namespace drift {

#ifdef HAS_LEVELS
// Whether this processor has what the level AVX2 is compiled for.
bool has_vectors() {
  // Operators are registered ahead of what else starts a program.
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

// Of functions for each level, the one for this processor.
template <typename Function>
Function* best(Function* least, Function* avx2, Function* avx512) {
  if (!has_vectors()) return least;
  const bool longer = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return longer ? avx512 : avx2;
}

#define BEST(name) drift::best(&drift::least::name, &drift::avx2::name, &drift::avx512::name)
#else
#define BEST(name) (&drift::least::name)
#endif

// Whether this processor has vectors that are worth it, and no better way to multiply (AMX).
bool multiplies_by_vectors() {
#ifdef HAS_LEVELS
  unsigned a, b, c, d;
  const bool has_tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  return has_vectors() && !has_tiles;
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
  library.def("lay_out(Tensor weight) -> Tensor");
  library.def("panel_outputs() -> int", BEST(panel_outputs));
  library.def("multiply_laid_out(Tensor x, Tensor panels, Tensor? bias) -> Tensor");
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
  library.impl("paged_attention", BEST(paged_attention));
  library.impl("causal_attention", BEST(causal_attention));
  library.impl("lay_out", BEST(lay_out));
  library.impl("multiply_laid_out", BEST(multiply_laid_out));
  library.impl("leaders", BEST(leaders));
  library.impl("rms_norm", BEST(rms_norm));
  library.impl("rms_norm_backward", BEST(rms_norm_backward));
  library.impl("softmax_backward", BEST(softmax_backward));
  library.impl("rotate", BEST(rotate));
  library.impl("gated", BEST(gated));
  library.impl("gated_backward", BEST(gated_backward));
  library.impl("rmsprop", BEST(rmsprop));
  library.impl("adamw", BEST(adamw));
}
