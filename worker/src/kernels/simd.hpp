// Vectors of the compiler's own, as long as the processor's: LANES numbers at a time.
//
// This and the kernels are compiled once for each level of processors (kernels.cpp), which says
// LEVEL, the bytes of a vector (VECTOR) and how many there are (REGISTERS): longer ones would go
// through memory, and so would more of them.

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

namespace drift::LEVEL {

constexpr int64_t LANES = VECTOR / 4;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

using Floats = float __attribute__((vector_size(VECTOR)));
using Ints = int32_t __attribute__((vector_size(VECTOR)));
using Bits = uint32_t __attribute__((vector_size(VECTOR)));

// Taking 0 off changes nothing, and the compiler knows; adding it would make 0 of -0.
INLINE Floats all(float x) { return x - Floats{}; }

INLINE Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

INLINE void store(Floats x, float* to) { std::memcpy(to, &x, sizeof x); }

// 0, STEP, 2 STEP, ... in the lanes.
template <int32_t STEP, int32_t... LANE>
constexpr Ints counted(std::integer_sequence<int32_t, LANE...>) {
  return Ints{STEP * LANE...};
}

constexpr auto ALL_LANES = std::make_integer_sequence<int32_t, LANES>();
constexpr Ints IN_ORDER = counted<1>(ALL_LANES), EVEN = counted<2>(ALL_LANES);

// One of the first vector, one of the second, and so on.
template <int32_t... LANE>
constexpr Ints taking_turns(std::integer_sequence<int32_t, LANE...>) {
  return Ints{LANE / 2 + LANE % 2 * static_cast<int32_t>(LANES)...};
}

constexpr Ints IN_TURN = taking_turns(ALL_LANES);

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

// The `rest` of `row`, if there is one, with zeros behind it; and back where it may be written.
template <typename T>
struct Aside {
  T* row;
  int64_t rest;
  std::array<std::remove_const_t<T>, PAIRED> some = {};

  INLINE Aside(T* row, int64_t rest) : row(row), rest(rest) {
    if (row) std::copy_n(row, rest, some.data());
  }
  INLINE T* place() { return row ? some.data() : nullptr; }
  INLINE void back() {
    if constexpr (!std::is_const_v<T>) {
      if (row) std::copy_n(some.data(), rest, row);
    }
  }
};

template <typename Function, typename... T>
INLINE void two_aside(Function two, Aside<T>... rows) {
  two(rows.place()...);
  (rows.back(), ...);
}

// Calls `two` for two vectors after another of each of the `rows`, of `width` elements, where they
// are; a row may be missing. What is left behind the last whole ones goes aside, with zeros behind
// it, and what `two` may write comes back from there.
template <typename Function, typename... T>
INLINE void by_twos(int64_t width, Function two, T*... rows) {
  const auto at_place = [](auto* row, int64_t at) INLINED { return row ? row + at : row; };
  const int64_t whole = width / PAIRED * PAIRED;
  for (int64_t at = 0; at < whole; at += PAIRED) two(at_place(rows, at)...);
  if (whole < width) two_aside(two, Aside<T>(at_place(rows, whole), width - whole)...);
}

// fp32 from and to its own order, for two vectors in the order of those of the last argument's
// kind.
INLINE Two load_two_beside(const float* from, const float*) { return load_two(from); }
INLINE void store_two_beside(Two x, float* to, const float*) { store_two(x, to); }

INLINE Two load_two_beside(const float* from, const c10::BFloat16*) {
  const Two x = load_two(from);
  return {__builtin_shuffle(x.first, x.second, EVEN),
          __builtin_shuffle(x.first, x.second, EVEN + 1)};
}

INLINE void store_two_beside(Two x, float* to, const c10::BFloat16*) {
  store_two({__builtin_shuffle(x.first, x.second, IN_TURN),
             __builtin_shuffle(x.first, x.second, IN_TURN + static_cast<int32_t>(LANES / 2))},
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
  return __builtin_shuffle(a, b, EVEN) + __builtin_shuffle(a, b, EVEN + 1);
}

// The sums of as many vectors as there are lanes, one to a lane. Overwrites them.
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

}  // namespace drift::LEVEL
