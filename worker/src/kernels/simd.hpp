// Sixteen numbers at a time, in the compiler's own vectors: it makes of them what the processor
// has, and CLONES makes it do so for several processors, of which the loader chooses.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif

// Clones are of functions; what they call must become part of them.
#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))

namespace drift {

constexpr int64_t LANES = 16;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Bits = uint32_t __attribute__((vector_size(64)));

INLINE Floats all(float x) { return Floats{} + x; }

INLINE Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

INLINE void store(Floats x, float* to) { std::memcpy(to, &x, sizeof x); }

// Two vectors' worth of neighbours. In which order these are in them is between load and store:
// bf16 is the upper half of fp32, so of each two neighbours one needs a shift, the other nothing
// but what is below it taken off.
struct Two {
  Floats first, second;
};

constexpr int64_t PAIRED = 2 * LANES;

INLINE Two load_two(const float* from) { return {load(from), load(from + LANES)}; }

INLINE Two load_two(const c10::BFloat16* from) {
  Bits bits;
  std::memcpy(&bits, from, sizeof bits);
  return {(Floats)(bits << 16), (Floats)(bits & 0xffff0000)};
}

INLINE void store_two(Two x, float* to) {
  store(x.first, to);
  store(x.second, to + LANES);
}

// fp32's bits, of which the upper half is rounded to the nearest bf16, ties to even. What is no
// number stays none.
INLINE Bits rounded(Floats x) {
  const Bits bits = (Bits)x;
  return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

INLINE void store_two(Two x, c10::BFloat16* to) {
  const Bits bits = (rounded(x.first) >> 16) | (rounded(x.second) & 0xffff0000);
  std::memcpy(to, &bits, sizeof bits);
}

// Calls `two` for two vectors after another of each of the `rows`, of `width` elements, where they
// are; a row may be missing. What is left behind the last whole ones goes aside, with zeros behind
// it, and what `two` may write comes back from there.
template <typename Function, typename... T>
INLINE void by_twos(int64_t width, Function two, T*... rows) {
  const auto at_place = [](auto* row, int64_t at) INLINED { return row ? row + at : row; };
  const int64_t whole = width / PAIRED * PAIRED, rest = width - whole;
  for (int64_t at = 0; at < whole; at += PAIRED) two(at_place(rows, at)...);
  if (rest == 0) return;
  std::tuple<std::array<std::remove_const_t<T>, PAIRED>...> aside{};
  std::apply(
      [&](auto&... some) INLINED {
        ((rows ? (void)std::copy_n(rows + whole, rest, some.data()) : (void)0), ...);
        two((rows ? static_cast<T*>(some.data()) : nullptr)...);
        const auto back = [&](auto* row, const auto& some) INLINED {
          if constexpr (!std::is_const_v<std::remove_pointer_t<decltype(row)>>) {
            if (row) std::copy_n(some.data(), rest, row + whole);
          }
        };
        (back(rows, some), ...);
      },
      aside);
}

// fp32 from and to its own order, for two vectors in the order of those of the last argument's
// kind.
INLINE Two load_two_beside(const float* from, const float*) { return load_two(from); }
INLINE void store_two_beside(Two x, float* to, const float*) { store_two(x, to); }

INLINE Two load_two_beside(const float* from, const c10::BFloat16*) {
  const Ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  const Two x = load_two(from);
  return {__builtin_shuffle(x.first, x.second, even),
          __builtin_shuffle(x.first, x.second, even + 1)};
}

INLINE void store_two_beside(Two x, float* to, const c10::BFloat16*) {
  const Ints in_turn = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  store_two({__builtin_shuffle(x.first, x.second, in_turn),
             __builtin_shuffle(x.first, x.second, in_turn + 8)},
            to);
}

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

// The compiler makes one instruction of it where no errors are asked for (-fno-math-errno).
INLINE Floats root(Floats x) {
  float lanes[LANES];
  store(x, lanes);
  for (int64_t at = 0; at < LANES; ++at) lanes[at] = std::sqrt(lanes[at]);
  return load(lanes);
}

// Of each two vectors' neighbours the sums: those of `a`, then those of `b`.
INLINE Floats pairs(Floats a, Floats b) {
  const Ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}

// The sums of sixteen vectors, one to a lane. Overwrites them.
INLINE Floats sums(Floats (&x)[LANES]) {
  for (int64_t left = LANES / 2; left > 0; left /= 2) {
    for (int64_t at = 0; at < left; ++at) {
      x[at] = pairs(x[2 * at], x[2 * at + 1]);
    }
  }
  return x[0];
}

INLINE float sum(Floats x) {
  float lanes[LANES];
  store(x, lanes);
  for (int64_t left = LANES / 2; left > 0; left /= 2) {
    for (int64_t at = 0; at < left; ++at) lanes[at] += lanes[at + left];
  }
  return lanes[0];
}

INLINE float largest(Floats x) {
  float lanes[LANES];
  store(x, lanes);
  float most = lanes[0];
  for (int64_t at = 1; at < LANES; ++at) most = lanes[at] > most ? lanes[at] : most;
  return most;
}

// e^x for x up to 88, within 2 units in the last place; 0 below -87. By powers of two, and a
// polynomial for what is left of the exponent, |r| <= ln 2 / 2 (Cephes, expf).
INLINE Floats exp(Floats x) {
  // Ordered so that what is no number stays none.
  const Floats clamped = larger(all(-87.0f), x);
  // Adding and taking off 1.5 * 2^23 rounds to whole numbers.
  const Floats magic = all(12582912.0f);
  const Floats n = (clamped * 1.44269504088896341f + magic) - magic;
  const Floats r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return x < -87.0f ? Floats{} : p * (Floats)power;
}

}  // namespace drift
