// What the kernels see of tensors.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <type_traits>

namespace drift {

// Elements that are too few for a second thread: it would take as long to tell it.
constexpr int64_t GRAIN = 1 << 14;

// The rows of a tensor of two dimensions, or of three, which are counted through. A row's
// elements lie side by side.
template <typename T>
class Rows {
 public:
  Rows(const char* name, const at::Tensor& x)
      : count_(x.numel() / std::max<int64_t>(x.size(-1), 1)),
        width_(x.size(-1)),
        inner_(x.dim() == 3 ? x.size(1) : 1),
        strides_{x.stride(0), x.dim() == 3 ? x.stride(1) : 0} {
    using Kind = std::remove_const_t<T>;
    TORCH_CHECK(x.dim() == 2 || x.dim() == 3, name, " is ", x.sizes());
    TORCH_CHECK(x.stride(-1) == 1 || width_ == 1, name, " has strides ", x.strides());
    TORCH_CHECK(x.scalar_type() == c10::CppTypeToScalarType<Kind>::value, name, " is of ",
                x.dtype());
    if constexpr (std::is_const_v<T>) {
      data_ = x.const_data_ptr<Kind>();
    } else {
      data_ = x.mutable_data_ptr<Kind>();
    }
  }

  int64_t count() const { return count_; }
  int64_t width() const { return width_; }

  T* operator[](int64_t row) const {
    return data_ + row / inner_ * strides_[0] + row % inner_ * strides_[1];
  }

 private:
  T* data_;
  int64_t count_, width_, inner_, strides_[2];
};

// Calls `compute` with ranges of `count` rows of `width`, on as many threads as are worth it.
template <typename Compute>
void in_parallel(int64_t count, int64_t width, Compute compute) {
  at::parallel_for(0, count, std::max<int64_t>(GRAIN / std::max<int64_t>(width, 1), 1), compute);
}

// `function.operator()<T>()` for the kind that `x` is of.
template <typename Function>
void by_kind(const at::Tensor& x, Function function) {
  if (x.scalar_type() == at::kFloat) {
    function.template operator()<float>();
  } else {
    TORCH_CHECK(x.scalar_type() == at::kBFloat16, "there is no kernel for ", x.dtype());
    function.template operator()<c10::BFloat16>();
  }
}

}  // namespace drift
