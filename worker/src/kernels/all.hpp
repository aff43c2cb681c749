// All kernels, once for each LEVEL.

#include "simd.hpp"

#include "attention.hpp"
#include "causal.hpp"
#include "gate.hpp"
#include "leaders.hpp"
#include "norm.hpp"
#include "optimizer.hpp"
#include "product.hpp"
#include "rotary.hpp"
#include "softmax.hpp"

#undef LEVEL
#undef VECTOR
#undef REGISTERS
