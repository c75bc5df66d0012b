// The arithmetic of the low-rank side path on plain pointers: nothing here knows torch.
//
// Three kernels carry everything:
//   dot      out = scale * X L^T        rows of X against rows of L ("shrink", and the core for few
//                                       rows)
//   tile     out = base + scale * T U   T [M, depth] times row-major U [depth, N] ("expand", and
//                                       the core)
//   product  out = X W^T + T U + bias   both of them at once, for a weight packed in panels
// plus the reduction of dR, column sums, dtype conversion and the dropout mask. Each is compiled
// for several instruction sets (kernels_*.cpp); `kernels()` picks the best set the processor has.
#pragma once

#include <cstddef>
#include <cstdint>

namespace loraxs {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// 16-bit floats are carried as bits and widened in registers.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// Row-major matrices with unit inner stride; `stride` is the distance of two rows in elements.
struct ConstMatrix {
    const void* data = nullptr;
    DType dtype = DType::kFloat32;
    int64_t stride = 0;
};
struct Matrix {
    void* data = nullptr;
    DType dtype = DType::kFloat32;
    int64_t stride = 0;
};

inline ConstMatrix as_const(const Matrix& m) { return {m.data, m.dtype, m.stride}; }

// Inverted dropout. Element (row, col) has the Philox4x32-10 counter first + row * stride + col and
// is kept iff the first output word is >= threshold = floor(p * 2^32). The stride is the width of
// the matrix that is masked, or of the larger one of which it is a part.
struct Dropout {
    uint64_t seed = 0;
    uint64_t threshold = 0;
    float scale = 1.0f;  // 1 / (1 - p)
    uint64_t first = 0;
    uint64_t stride = 0;
};

struct DotArgs {
    ConstMatrix x;                  // [M, depth]
    ConstMatrix lhs;                // [ranks, depth]
    Matrix out;                     // [M, ranks]
    const int64_t* rows = nullptr;  // if set, "row m" of x and out is row rows[m]
    int64_t depth = 0;
    float scale = 1.0f;
    const Dropout* dropout = nullptr;  // masks x
    ConstMatrix bias;                  // [1, ranks]: out = scale * (bias + x lhs^T); optional
};

struct TileArgs {
    ConstMatrix t;                  // [M, depth]
    ConstMatrix rhs;                // [depth, N]
    ConstMatrix base;               // [M, N], float32 or out's dtype; no data means zero
    Matrix out;                     // [M, N], may be base itself
    const int64_t* rows = nullptr;  // if set, "row m" of t, base and out is row rows[m]
    int64_t depth = 0;
    float scale = 1.0f;
    const Dropout* dropout = nullptr;  // masks scale * t rhs, not base
};

// The base product with its side path: out = x w^T + t rhs + bias. The weight w [N, depth] is
// packed in panels of `KernelTable::tile_cols` of its rows, float32 [ceil(N / tile_cols)][depth]
// [tile_cols], zero beyond N; or it lies as it is and is packed on the way, which costs as much as
// the product does for a few rows of x.
struct ProductArgs {
    ConstMatrix x;  // [M, depth]
    const float* panels = nullptr;
    ConstMatrix w;              // without panels: [N, depth] or, if
    bool w_by_columns = false;  // so, [depth, N]
    int64_t depth = 0;
    ConstMatrix bias;  // [1, N], optional
    ConstMatrix t;     // [M, rank]
    ConstMatrix rhs;   // [rank, N]
    int64_t rank = 0;  // 0: no side path
    Matrix out;        // [M, N]
};

struct GradCoreArgs {
    ConstMatrix p;                  // [M, rank]
    ConstMatrix q;                  // [M, rank]
    Matrix out;                     // [rank, rank] = scale * p^T q
    const int64_t* rows = nullptr;  // if set, the rows of p and q that count, in summation order
    int64_t count = 0;              // how many rows
    int64_t rank = 0;
    float scale = 1.0f;
};

struct KernelTable {
    const char* name;
    int64_t tile_cols;  // column granularity of `tile` and `product`
    int64_t tile_rows;  // row granularity of `product` and `grad_core`
    void (*dot)(const DotArgs&, int64_t m0, int64_t m1, int64_t j0, int64_t j1);
    void (*tile)(const TileArgs&, int64_t m0, int64_t m1, int64_t n0, int64_t n1);
    void (*product)(const ProductArgs&, int64_t m0, int64_t m1, int64_t n0, int64_t n1);
    void (*grad_core)(const GradCoreArgs&, int64_t i0, int64_t i1);
    void (*column_sum)(const ConstMatrix& g, int64_t m, const Matrix& out, int64_t n0, int64_t n1);
    void (*convert)(const ConstMatrix& src, const Matrix& dst, int64_t m0, int64_t m1,
                    int64_t cols);
    void (*keep_mask)(const Dropout& dropout, int64_t m0, int64_t m1, int64_t cols, bool* out);
};

// Rows of x that `dot` takes at a time, and rows of t that `tile` packs at a time.
constexpr int64_t kDotRows = 24;
constexpr int64_t kTileRows = 96;
// Rows and depth of the block of x that `product` keeps in L2 (480 KiB); a weight that is packed on
// the way is packed once per larger block, of which L3 will do.
constexpr int64_t kProductRows = 192;
constexpr int64_t kProductRowsPacking = 768;
constexpr int64_t kProductDepth = 640;

const KernelTable& kernels();

// Thread-local, 64-byte aligned, uninitialised, valid until the thread asks for the same slot
// again.
enum class Slot : int { kKernel, kCore };
float* scratch(Slot slot, size_t floats);

extern const KernelTable kGenericKernels;
#if defined(__x86_64__) && defined(__GNUC__)
#define LORAXS_X86_KERNELS 1
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

}  // namespace loraxs
