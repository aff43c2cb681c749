// x W^T + b in fp32, of weights laid out for it.
//
// With few rows it takes as long as reading the weights. They lie in panels of PAIRED outputs,
// for each input the weights of these: [panels, inputs, PAIRED]. A panel goes through in pieces
// that stay in a core's nearest cache for all rows, while the next piece is asked for.

namespace drift::LEVEL {

// Rows that are multiplied at once: sums of two vectors each, as many as registers hold.
constexpr int64_t TILE_ROWS = REGISTERS == 32 ? 12 : 6;
// Bytes of a piece of a panel.
constexpr int64_t PIECE_BYTES = 12 << 10;
// Rows that go through all panels before others do: what they are multiplied by stays in a cache.
constexpr int64_t BLOCK_ROWS = 96;

// What is multiplied: rows of x, `inputs` numbers each; where it goes, rows of `outputs`.
template <typename T>
struct Product {
  const float* x;
  const T* panels;
  const float* bias;
  float* out;
  int64_t rows, x_line, inputs, outputs;
};

// `ROWS` rows by the inputs [begin, end) of a panel, added to what came out of those before, or to
// the bias if there are none. A row's sums are taken in the same order whatever is beside it.
template <int64_t ROWS, typename T>
INLINE void multiply_tile(const Product<T>& product, int64_t row, int64_t panel, int64_t begin,
                          int64_t end) {
  const float* x = product.x + row * product.x_line;
  const T* weights = product.panels + panel * product.inputs * PAIRED;
  const T* wanted = weights + (end - begin) * PAIRED;
  Two sum[ROWS] = {};
  for (int64_t input = begin; input < end; ++input) {
    const Two w = load_two(weights + input * PAIRED);
    __builtin_prefetch(wanted + input * PAIRED);
#pragma GCC unroll 12
    for (int64_t at = 0; at < ROWS; ++at) {
      const Floats by = all(x[at * product.x_line + input]);
      sum[at].first += by * w.first;
      sum[at].second += by * w.second;
    }
  }
  const float* before = product.bias ? product.bias + panel * PAIRED : nullptr;
#pragma GCC unroll 12
  for (int64_t at = 0; at < ROWS; ++at) {
    float* out = product.out + (row + at) * product.outputs + panel * PAIRED;
    if (begin > 0) before = out;
    if (before) {
      const Two more = load_two_beside(before, weights);
      sum[at] = {more.first + sum[at].first, more.second + sum[at].second};
    }
    store_two_beside(sum[at], out, weights);
  }
}

// As `multiply_tile`, of `rows`, at most `MOST`.
template <int64_t MOST, typename T>
INLINE void multiply_rows(const Product<T>& product, int64_t row, int64_t rows, int64_t panel,
                          int64_t begin, int64_t end) {
  if constexpr (MOST > 1) {
    if (rows < MOST) return multiply_rows<MOST - 1>(product, row, rows, panel, begin, end);
  }
  multiply_tile<MOST>(product, row, panel, begin, end);
}

// All rows by the panels [first, last).
template <typename T>
INLINE void multiply_panels(const Product<T>& product, int64_t first, int64_t last) {
  constexpr int64_t PIECE = PIECE_BYTES / (PAIRED * sizeof(T));
  for (int64_t block = 0; block < product.rows; block += BLOCK_ROWS) {
    const int64_t block_end = std::min(product.rows, block + BLOCK_ROWS);
    const int64_t tiles = (block_end - block + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t panel = first; panel < last; ++panel) {
      for (int64_t begin = 0; begin < product.inputs; begin += PIECE) {
        const int64_t end = std::min(product.inputs, begin + PIECE);
        for (int64_t tile = 0, row = block; tile < tiles; ++tile) {
          // Tiles of like size: sums of few rows wait for one another.
          const int64_t rows = (block_end - row) / (tiles - tile);
          multiply_rows<TILE_ROWS>(product, row, rows, panel, begin, end);
          row += rows;
        }
      }
    }
  }
}

// `weight` [outputs, inputs], of outputs that fill panels, as `multiply_laid_out` takes it.
at::Tensor lay_out(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) % PAIRED == 0, "a weight of ", weight.sizes(),
              " in panels of ", PAIRED);
  return weight.view({-1, PAIRED, weight.size(1)}).transpose(1, 2).contiguous();
}

// Outputs of a panel.
int64_t panel_outputs() { return PAIRED; }

// `x` [rows, inputs], fp32, times the transpose of the weight that `panels` was laid out from, plus
// `bias` [outputs], fp32: [rows, outputs].
at::Tensor multiply_laid_out(const at::Tensor& x, const at::Tensor& panels,
                             const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kFloat && x.stride(1) == 1 &&
                  panels.dim() == 3 && panels.is_contiguous() && panels.size(1) == x.size(1) &&
                  panels.size(1) > 0 && panels.size(2) == PAIRED,
              "a product of ", x.sizes(), " of ", x.dtype(), " and panels ", panels.sizes());
  const int64_t count = panels.size(0), outputs = count * PAIRED;
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == outputs && bias->is_contiguous() &&
                        bias->scalar_type() == at::kFloat),
              "a bias for ", outputs, " outputs");
  at::Tensor out = at::empty({x.size(0), outputs}, x.options());
  by_kind(panels, [&]<typename T>() {
    const Product<T> product = {x.const_data_ptr<float>(),
                                panels.const_data_ptr<T>(),
                                bias ? bias->const_data_ptr<float>() : nullptr,
                                out.mutable_data_ptr<float>(),
                                x.size(0),
                                x.stride(0),
                                x.size(1),
                                outputs};
    in_parallel(count, x.size(0) * x.size(1) * PAIRED, [&](int64_t begin, int64_t end) {
      multiply_panels(product, begin, end);
    });
  });
  return out;
}

}  // namespace drift::LEVEL
