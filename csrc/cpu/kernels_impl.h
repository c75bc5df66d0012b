// The body of the kernels, compiled once per instruction set. The including file defines
//   LORAXS_ARCH       namespace of this instruction set
//   LORAXS_LANES      floats per vector
//   LORAXS_TILE_ROWS  rows of the register block of `tile` (its columns: two vectors)
//   LORAXS_DOT_ROWS   rows of the register block of `dot` (its columns: four rows of lhs)
// and selects the instruction set. See simd.h for what may not be used here.

#include "simd.h"

namespace loraxs::LORAXS_ARCH {
namespace {

constexpr int kTileMR = LORAXS_TILE_ROWS;
constexpr int kDotMR = LORAXS_DOT_ROWS;
constexpr int kDotJR = 4;
static_assert(kDotMR <= 4, "dot_column has no case for more remaining rows");
constexpr int64_t kDotDepth = 1024;  // depth of a block of `dot`: four rows of lhs stay in L1
constexpr int64_t kStreamDepth =
    16384;  // the same for few rows: lhs is used once, long runs prefetch
constexpr int64_t kSumDepth = kLanes >= 8 ? 1024 : 64 * kLanes;  // longer sums lose digits
constexpr int64_t kStagedPad = 16;  // keeps staged rows of 4 KiB out of each other's cache sets
constexpr int64_t kPanelCols = 2 * kLanes;  // columns of a packed panel
constexpr int64_t kSumBlock = 64;           // rows of p, q that are summed before joining the total

// Calls f with a null pointer of the element type that stands for `dtype`.
template <typename F>
LORAXS_INLINE void with_type(DType dtype, const F& f) {
    switch (dtype) {
        case DType::kFloat32:
            return f(static_cast<const float*>(nullptr));
        case DType::kBFloat16:
            return f(static_cast<const BFloat16*>(nullptr));
        case DType::kFloat16:
            return f(static_cast<const Float16*>(nullptr));
    }
}

template <typename T>
LORAXS_INLINE const T* element(const ConstMatrix& m, int64_t row, int64_t col) {
    return static_cast<const T*>(m.data) + row * m.stride + col;
}

template <typename T>
LORAXS_INLINE T* element(const Matrix& m, int64_t row, int64_t col) {
    return static_cast<T*>(m.data) + row * m.stride + col;
}

LORAXS_INLINE int64_t row_at(const int64_t* rows, int64_t m) { return rows ? rows[m] : m; }

// dst[0:n] = src[0:n], widened.
template <typename T>
void widen(const T* src, float* dst, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
    if (i < n) store_some(dst + i, load_some(src + i, n - i), n - i);
}

// dst[0:n] = scale * src[0:n], rounded once.
template <typename T>
void narrow(const float* src, float scale, T* dst, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i) * splat(scale));
    if (i < n) store_some(dst + i, load_some(src + i, n - i) * splat(scale), n - i);
}

// ---- dropout ----

// All-ones where the element with this counter is kept: the first output word of Philox4x32-10
// (Salmon et al., SC'11) for the counter (low half, high half, 0, 0) is at least the threshold.
// Each 64-bit lane works on one element; only the low 32 bits of a lane mean anything in between.
LORAXS_INLINE HalfI64 philox_keep(HalfU64 counter, const Dropout& d) {
    const HalfU64 multiplier0 = HalfU64{} + 0xD2511F53u;
    const HalfU64 multiplier1 = HalfU64{} + 0xCD9E8D57u;
    uint32_t key0 = static_cast<uint32_t>(d.seed);
    uint32_t key1 = static_cast<uint32_t>(d.seed >> 32);
    HalfU64 c0 = counter, c1 = counter >> 32, c2{}, c3{};
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const HalfU64 p0 = multiply_low(c0, multiplier0);
        const HalfU64 p1 = multiply_low(c2, multiplier1);
        c0 = (p1 >> 32) ^ c1 ^ key0;
        c1 = p1;
        c2 = (p0 >> 32) ^ c3 ^ key1;
        c3 = p0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    const HalfI64 word = (HalfI64)(c0 & 0xffffffffu);
    return word >= static_cast<int64_t>(d.threshold);
}

LORAXS_INLINE void store_kept(HalfI32 keep, float if_kept, float* out) {
    int32_t bits;
    __builtin_memcpy(&bits, &if_kept, sizeof bits);
    const HalfI32 values = keep & bits;
    __builtin_memcpy(out, &values, sizeof values);
}

LORAXS_INLINE void store_kept(HalfI32 keep, uint8_t if_kept, uint8_t* out) {
    const HalfU8 values = __builtin_convertvector(keep, HalfU8) & if_kept;
    __builtin_memcpy(out, &values, sizeof values);
}

// out[i] = kept ? if_kept : 0 for the elements (row, col + i), 0 <= i < n.
template <typename T>
void keep_row(const Dropout& d, int64_t row, int64_t col, int64_t n, T if_kept, T* out) {
    constexpr int kHalf = kLanes / 2;
    const uint64_t first =
        d.first + static_cast<uint64_t>(row) * d.stride + static_cast<uint64_t>(col);
    HalfU64 counter{};
    for (int i = 0; i < kHalf; ++i) counter[i] = first + static_cast<uint64_t>(i);
    for (int64_t i = 0; i < n; i += kLanes, counter += kLanes) {
        const HalfI32 a = __builtin_convertvector(philox_keep(counter, d), HalfI32);
        const HalfI32 b = __builtin_convertvector(philox_keep(counter + kHalf, d), HalfI32);
        T last[kLanes];
        T* dst = n - i >= kLanes ? out + i : last;
        store_kept(a, if_kept, dst);
        store_kept(b, if_kept, dst + kHalf);
        if (dst == last) __builtin_memcpy(out + i, last, sizeof(T) * (n - i));
    }
}

void keep_mask(const Dropout& d, int64_t m0, int64_t m1, int64_t cols, bool* out) {
    for (int64_t m = m0; m < m1; ++m) {
        uint8_t* row = reinterpret_cast<uint8_t*>(out) + m * cols;
        for (int64_t col = 0; col < cols; col += kDotDepth) {
            keep_row<uint8_t>(d, m, col, min64(kDotDepth, cols - col), 1, row + col);
        }
    }
}

// ---- dot ----

// acc[i][j] += sum_k x[i][k] l[j][k] for an MR x JR block.
template <typename T, int MR, int JR>
LORAXS_INLINE void dot_block(const float* x, int64_t x_stride, const T* l, int64_t l_stride,
                             int64_t depth, float* acc, int64_t acc_stride) {
    Vec sum[MR][kDotJR] = {};
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
        Vec xv[MR];
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) xv[i] = load(x + i * x_stride + k);
#pragma GCC unroll 4
        for (int j = 0; j < JR; ++j) {
            const Vec lv = load(l + j * l_stride + k);
#pragma GCC unroll 8
            for (int i = 0; i < MR; ++i) sum[i][j] += xv[i] * lv;
        }
    }
    if (k < depth) {
        Vec xv[MR];
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) xv[i] = load_some(x + i * x_stride + k, depth - k);
#pragma GCC unroll 4
        for (int j = 0; j < JR; ++j) {
            const Vec lv = load_some(l + j * l_stride + k, depth - k);
#pragma GCC unroll 8
            for (int i = 0; i < MR; ++i) sum[i][j] += xv[i] * lv;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
        Vec4 total = sum_lanes(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
        float* out = acc + i * acc_stride;
        if constexpr (JR == 4) {
            Vec4 before;
            __builtin_memcpy(&before, out, sizeof before);
            total += before;
            __builtin_memcpy(out, &total, sizeof total);
        } else {
            for (int j = 0; j < JR; ++j) out[j] += total[j];
        }
    }
}

template <typename T, int JR>
LORAXS_INLINE void dot_column(const float* x, int64_t x_stride, int64_t rows, const T* l,
                              int64_t l_stride, int64_t depth, float* acc, int64_t acc_stride) {
    int64_t i = 0;
    for (; i + kDotMR <= rows; i += kDotMR) {
        dot_block<T, kDotMR, JR>(x + i * x_stride, x_stride, l, l_stride, depth,
                                 acc + i * acc_stride, acc_stride);
    }
    x += i * x_stride;
    acc += i * acc_stride;
    switch (rows - i) {
        case 1:
            return dot_block<T, 1, JR>(x, x_stride, l, l_stride, depth, acc, acc_stride);
        case 2:
            return dot_block<T, 2, JR>(x, x_stride, l, l_stride, depth, acc, acc_stride);
        case 3:
            return dot_block<T, 3, JR>(x, x_stride, l, l_stride, depth, acc, acc_stride);
    }
}

// acc[rows][columns] += x l^T for up to kDotJR columns; a running sum spans at most kSumDepth.
template <typename T>
LORAXS_INLINE void dot_columns(const float* x, int64_t x_stride, int64_t rows, const T* l,
                               int64_t l_stride, int64_t columns, int64_t depth, float* acc,
                               int64_t acc_stride) {
    for (int64_t k = 0; k < depth; k += kSumDepth, x += kSumDepth, l += kSumDepth) {
        const int64_t d = min64(kSumDepth, depth - k);
        switch (columns) {
            case 1:
                dot_column<T, 1>(x, x_stride, rows, l, l_stride, d, acc, acc_stride);
                break;
            case 2:
                dot_column<T, 2>(x, x_stride, rows, l, l_stride, d, acc, acc_stride);
                break;
            case 3:
                dot_column<T, 3>(x, x_stride, rows, l, l_stride, d, acc, acc_stride);
                break;
            default:
                dot_column<T, 4>(x, x_stride, rows, l, l_stride, d, acc, acc_stride);
                break;
        }
    }
}

// acc[rows][ranks] += x l^T over one block of the depth. 16-bit rows of l are widened once where
// they meet many rows of x. `widened` has room for kDotJR rows of kDotDepth.
template <typename T>
void dot_panel(const float* x, int64_t x_stride, int64_t rows, const T* l, int64_t l_stride,
               int64_t ranks, int64_t depth, float* acc, float* widened) {
    constexpr int64_t kStride = kDotDepth + kStagedPad;
    const bool widen_first = sizeof(T) == 2 && rows > kDotMR;
    for (int64_t j = 0; j < ranks; j += kDotJR) {
        const T* lj = l + j * l_stride;
        const int64_t columns = min64(kDotJR, ranks - j);
        if (widen_first) {
            for (int64_t i = 0; i < columns; ++i) {
                widen(lj + i * l_stride, widened + i * kStride, depth);
            }
            dot_columns(x, x_stride, rows, widened, kStride, columns, depth, acc + j, ranks);
        } else {
            dot_columns(x, x_stride, rows, lj, l_stride, columns, depth, acc + j, ranks);
        }
    }
}

// x[m : m + rows, k : k + depth] as floats, gathered and masked, into `staged`.
template <typename T>
void stage_rows(const DotArgs& a, int64_t m, int64_t rows, int64_t k, int64_t depth, float* staged,
                int64_t stride, float* keep) {
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = row_at(a.rows, m + i);
        float* dst = staged + i * stride;
        widen(element<T>(a.x, row, k), dst, depth);
        if (a.dropout) {
            keep_row<float>(*a.dropout, row, k, depth, a.dropout->scale, keep);
            for (int64_t c = 0; c < depth; ++c) dst[c] *= keep[c];
        }
    }
}

void start_sums(const DotArgs& a, int64_t rows, int64_t j0, int64_t ranks, float* acc) {
    if (!a.bias.data) {
        for (int64_t i = 0; i < rows * ranks; ++i) acc[i] = 0.0f;
        return;
    }
    with_type(a.bias.dtype, [&](auto* tag) LORAXS_LAMBDA {
        for (int64_t i = 0; i < rows; ++i) {
            widen(element<Element<decltype(tag)>>(a.bias, 0, j0), acc + i * ranks, ranks);
        }
    });
}

void dot(const DotArgs& a, int64_t m0, int64_t m1, int64_t j0, int64_t j1) {
    const bool in_place = a.x.dtype == DType::kFloat32 && !a.rows && !a.dropout;
    const int64_t ranks = j1 - j0;
    const bool few_rows = m1 - m0 <= kDotMR;
    const int64_t max_rows = few_rows ? kDotMR : kDotRows;
    const int64_t max_depth = min64(a.depth, few_rows ? kStreamDepth : kDotDepth);
    const int64_t stride = max_depth + kStagedPad;
    float* acc = scratch(
        Slot::kKernel, max_rows * (ranks + stride) + max_depth + kDotJR * (kDotDepth + kStagedPad));
    float* staged = acc + max_rows * ranks;
    float* keep = staged + max_rows * stride;
    float* widened = keep + max_depth;
    for (int64_t m = m0; m < m1; m += kDotRows) {
        const int64_t rows = min64(kDotRows, m1 - m);
        start_sums(a, rows, j0, ranks, acc);
        for (int64_t k = 0; k < a.depth; k += max_depth) {
            const int64_t depth = min64(max_depth, a.depth - k);
            const float* x = staged;
            int64_t x_stride = stride;
            if (in_place) {
                x = element<float>(a.x, m, k);
                x_stride = a.x.stride;
            } else {
                with_type(a.x.dtype, [&](auto* tag) LORAXS_LAMBDA {
                    stage_rows<Element<decltype(tag)>>(a, m, rows, k, depth, staged, stride, keep);
                });
            }
            with_type(a.lhs.dtype, [&](auto* tag) LORAXS_LAMBDA {
                using T = Element<decltype(tag)>;
                dot_panel<T>(x, x_stride, rows, element<T>(a.lhs, j0, k), a.lhs.stride, ranks,
                             depth, acc, widened);
            });
        }
        with_type(a.out.dtype, [&](auto* tag) LORAXS_LAMBDA {
            using T = Element<decltype(tag)>;
            for (int64_t i = 0; i < rows; ++i) {
                narrow(acc + i * ranks, a.scale, element<T>(a.out, row_at(a.rows, m + i), j0),
                       ranks);
            }
        });
    }
}

// ---- tile ----

// c[MR][NV * lanes] = A B for packed A [depth][MR] and B [depth][...] with row stride b_stride.
template <typename T, int MR, int NV>
LORAXS_INLINE void tile_block(const float* a, const T* b, int64_t b_stride, int64_t depth,
                              float* c) {
    Vec sum[MR][NV] = {};
    for (int64_t k = 0; k < depth; ++k, a += MR, b += b_stride) {
        Vec bv[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) bv[v] = load(b + v * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[i][v] += splat(a[i]) * bv[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) store(c + (i * NV + v) * kLanes, sum[i][v]);
    }
}

// packed[depth][mr] = t[m : m + rows, :] transposed, zero-padded to mr rows.
template <typename T>
void pack_t(const TileArgs& a, int64_t m, int64_t rows, int64_t mr, float* packed, float* row) {
    for (int64_t i = 0; i < mr; ++i) {
        if (i < rows) {
            const T* src = element<T>(a.t, row_at(a.rows, m + i), 0);
            widen(src, row, a.depth);
            for (int64_t k = 0; k < a.depth; ++k) packed[k * mr + i] = row[k];
        } else {
            for (int64_t k = 0; k < a.depth; ++k) packed[k * mr + i] = 0.0f;
        }
    }
}

// packed[depth][width] = src[:, 0:cols], zero-padded to `width` columns (a multiple of the lanes).
template <typename T>
void pack_panel(const T* src, int64_t stride, int64_t depth, int64_t cols, int64_t width,
                float* packed) {
    for (int64_t k = 0; k < depth; ++k, src += stride, packed += width) {
        int64_t n = 0;
        for (; n + kLanes <= cols; n += kLanes) store(packed + n, load(src + n));
        if (n < cols) {
            store(packed + n, load_some(src + n, cols - n));
            n += kLanes;
        }
        for (; n < width; n += kLanes) store(packed + n, Vec{});
    }
}

// out[0:n] = base[0:n] + scale * keep[0:n] * c[0:n]; base and keep may be absent.
template <typename TBase, typename T>
LORAXS_INLINE void finish_row(const float* c, float scale, const float* keep, const TBase* base,
                              T* out, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const int64_t left = n - i;
        Vec value = load(c + i) * splat(scale);
        if (keep) value *= load(keep + i);
        if (left >= kLanes) {
            if (base) value += load(base + i);
            store(out + i, value);
        } else {
            if (base) value += load_some(base + i, left);
            store_some(out + i, value, left);
        }
    }
}

// Adds the block c[rows][width] into columns [n, n + cols) of out, rows [m, m + rows).
void finish_block(const TileArgs& a, const float* c, int64_t width, int64_t m, int64_t rows,
                  int64_t n, int64_t cols) {
    alignas(64) float keep[8 * kLanes];
    with_type(a.out.dtype, [&](auto* tag) LORAXS_LAMBDA {
        using T = Element<decltype(tag)>;
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t row = row_at(a.rows, m + i);
            if (a.dropout) {
                keep_row<float>(*a.dropout, row, n, min64(width, (cols + kLanes - 1) & -kLanes),
                                a.dropout->scale, keep);
            }
            const float* mask = a.dropout ? keep : nullptr;
            T* out = element<T>(a.out, row, n);
            const float* ci = c + i * width;
            if (!a.base.data) {
                finish_row<T, T>(ci, a.scale, mask, nullptr, out, cols);
            } else if (a.base.dtype == DType::kFloat32) {
                finish_row(ci, a.scale, mask, element<float>(a.base, row, n), out, cols);
            } else {
                finish_row(ci, a.scale, mask, element<T>(a.base, row, n), out, cols);
            }
        }
    });
}

// Few rows: rhs is used once, so it is read where it lies; wide blocks hide the latency of the
// sums.
template <typename T, int MR, int NV>
LORAXS_INLINE void tile_few_rows(const TileArgs& a, int64_t m, int64_t rows, int64_t n0, int64_t n1,
                                 const float* packed_t, float* panel) {
    constexpr int64_t width = NV * kLanes;
    alignas(64) float c[MR * NV * kLanes];
    for (int64_t n = n0; n < n1; n += width) {
        const int64_t cols = min64(width, n1 - n);
        const T* rhs = element<T>(a.rhs, 0, n);
        if (cols == width) {
            tile_block<T, MR, NV>(packed_t, rhs, a.rhs.stride, a.depth, c);
        } else {
            pack_panel(rhs, a.rhs.stride, a.depth, cols, width, panel);
            tile_block<float, MR, NV>(packed_t, panel, width, a.depth, c);
        }
        finish_block(a, c, width, m, rows, n, cols);
    }
}

template <typename T>
void tile_few_rows(const TileArgs& a, int64_t m, int64_t rows, int64_t n0, int64_t n1) {
    constexpr int64_t widest = 8 * kLanes;
    float* packed_t = scratch(Slot::kKernel, a.depth * (kTileMR + 1 + widest));
    float* row = packed_t + a.depth * kTileMR;
    float* panel = row + a.depth;
    const int64_t mr = rows <= 2 ? rows : rows <= 4 ? 4 : kTileMR;
    with_type(a.t.dtype, [&](auto* tag) LORAXS_LAMBDA {
        pack_t<Element<decltype(tag)>>(a, m, rows, mr, packed_t, row);
    });
    switch (mr) {
        case 1:
            return tile_few_rows<T, 1, 8>(a, m, rows, n0, n1, packed_t, panel);
        case 2:
            return tile_few_rows<T, 2, 4>(a, m, rows, n0, n1, packed_t, panel);
        case 4:
            return tile_few_rows<T, 4, 2>(a, m, rows, n0, n1, packed_t, panel);
        default:
            return tile_few_rows<T, kTileMR, 2>(a, m, rows, n0, n1, packed_t, panel);
    }
}

// Many rows: t is packed once per chunk of rows, rhs once per panel and chunk.
template <typename T>
void tile_many_rows(const TileArgs& a, int64_t m, int64_t rows, int64_t n0, int64_t n1) {
    const int64_t groups = (rows + kTileMR - 1) / kTileMR;
    const int64_t group_size = a.depth * kTileMR;
    float* packed_t = scratch(Slot::kKernel, groups * group_size + a.depth * (1 + kPanelCols));
    float* row = packed_t + groups * group_size;
    float* panel = row + a.depth;
    with_type(a.t.dtype, [&](auto* tag) LORAXS_LAMBDA {
        for (int64_t g = 0; g < groups; ++g) {
            pack_t<Element<decltype(tag)>>(a, m + g * kTileMR, min64(kTileMR, rows - g * kTileMR),
                                           kTileMR, packed_t + g * group_size, row);
        }
    });
    alignas(64) float c[kTileMR * kPanelCols];
    for (int64_t n = n0; n < n1; n += kPanelCols) {
        const int64_t cols = min64(kPanelCols, n1 - n);
        pack_panel(element<T>(a.rhs, 0, n), a.rhs.stride, a.depth, cols, kPanelCols, panel);
        for (int64_t g = 0; g < groups; ++g) {
            tile_block<float, kTileMR, 2>(packed_t + g * group_size, panel, kPanelCols, a.depth, c);
            finish_block(a, c, kPanelCols, m + g * kTileMR, min64(kTileMR, rows - g * kTileMR), n,
                         cols);
        }
    }
}

void tile(const TileArgs& a, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
    with_type(a.rhs.dtype, [&](auto* tag) LORAXS_LAMBDA {
        using T = Element<decltype(tag)>;
        for (int64_t m = m0; m < m1; m += kTileRows) {
            const int64_t rows = min64(kTileRows, m1 - m);
            if (rows <= kTileMR) {
                tile_few_rows<T>(a, m, rows, n0, n1);
            } else {
                tile_many_rows<T>(a, m, rows, n0, n1);
            }
        }
    });
}

// ---- product ----

#include "product_impl.h"

// ---- dR and column sums ----

// packed[count][width] = rows [m, m + count), columns [col, col + cols) of src, zero-padded.
template <typename T>
void pack_rows(const ConstMatrix& src, const int64_t* rows, int64_t m, int64_t count, int64_t col,
               int64_t cols, int64_t width, float* packed) {
    for (int64_t i = 0; i < count; ++i, packed += width) {
        const T* row = element<T>(src, row_at(rows, m + i), col);
        widen(row, packed, cols);
        for (int64_t c = cols; c < width; ++c) packed[c] = 0.0f;
    }
}

// Rows [i0, i1) of out. Every element is a sum over blocks of kSumBlock rows, in order: its bits do
// not depend on how rows of `out` are shared among threads.
void grad_core(const GradCoreArgs& a, int64_t i0, int64_t i1) {
    const int64_t rank = a.rank;
    const int64_t groups = (i1 - i0 + kTileMR - 1) / kTileMR;
    const int64_t panels = (rank + kPanelCols - 1) / kPanelCols;
    const int64_t padded = panels * kPanelCols;
    float* total =
        scratch(Slot::kKernel, groups * kTileMR * (padded + kSumBlock) + kSumBlock * kPanelCols);
    float* packed_p = total + groups * kTileMR * padded;
    float* packed_q = packed_p + groups * kTileMR * kSumBlock;
    for (int64_t i = 0; i < groups * kTileMR * padded; ++i) total[i] = 0.0f;
    alignas(64) float c[kTileMR * kPanelCols];
    for (int64_t m = 0; m < a.count; m += kSumBlock) {
        const int64_t count = min64(kSumBlock, a.count - m);
        with_type(a.p.dtype, [&](auto* tag) LORAXS_LAMBDA {
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t i = i0 + g * kTileMR;
                pack_rows<Element<decltype(tag)>>(a.p, a.rows, m, count, i, min64(kTileMR, i1 - i),
                                                  kTileMR, packed_p + g * kTileMR * kSumBlock);
            }
        });
        for (int64_t j = 0; j < rank; j += kPanelCols) {
            with_type(a.q.dtype, [&](auto* tag) LORAXS_LAMBDA {
                pack_rows<Element<decltype(tag)>>(
                    a.q, a.rows, m, count, j, min64(kPanelCols, rank - j), kPanelCols, packed_q);
            });
            for (int64_t g = 0; g < groups; ++g) {
                tile_block<float, kTileMR, 2>(packed_p + g * kTileMR * kSumBlock, packed_q,
                                              kPanelCols, count, c);
                for (int64_t i = 0; i < kTileMR; ++i) {
                    float* sum = total + (g * kTileMR + i) * padded + j;
                    for (int64_t n = 0; n < kPanelCols; ++n) sum[n] += c[i * kPanelCols + n];
                }
            }
        }
    }
    with_type(a.out.dtype, [&](auto* tag) LORAXS_LAMBDA {
        for (int64_t i = i0; i < i1; ++i) {
            narrow(total + (i - i0) * padded, a.scale, element<Element<decltype(tag)>>(a.out, i, 0),
                   rank);
        }
    });
}

// out[0, n0:n1] = sum of the rows of g, in blocks so that rounding errors grow like those of a
// tree.
void column_sum(const ConstMatrix& g, int64_t m, const Matrix& out, int64_t n0, int64_t n1) {
    constexpr int64_t kBlockRows = 64;
    const int64_t cols = n1 - n0;
    float* total = scratch(Slot::kKernel, 3 * cols);
    float* block = total + cols;
    float* row = block + cols;
    for (int64_t n = 0; n < cols; ++n) total[n] = 0.0f;
    for (int64_t i0 = 0; i0 < m; i0 += kBlockRows) {
        for (int64_t n = 0; n < cols; ++n) block[n] = 0.0f;
        for (int64_t i = i0; i < min64(m, i0 + kBlockRows); ++i) {
            with_type(g.dtype, [&](auto* tag) LORAXS_LAMBDA {
                widen(element<Element<decltype(tag)>>(g, i, n0), row, cols);
            });
            for (int64_t n = 0; n < cols; ++n) block[n] += row[n];
        }
        for (int64_t n = 0; n < cols; ++n) total[n] += block[n];
    }
    with_type(out.dtype, [&](auto* tag) LORAXS_LAMBDA {
        narrow(total, 1.0f, element<Element<decltype(tag)>>(out, 0, n0), cols);
    });
}

void convert(const ConstMatrix& src, const Matrix& dst, int64_t m0, int64_t m1, int64_t cols) {
    for (int64_t m = m0; m < m1; ++m) {
        if (dst.dtype == DType::kFloat32) {
            with_type(src.dtype, [&](auto* tag) LORAXS_LAMBDA {
                widen(element<Element<decltype(tag)>>(src, m, 0), element<float>(dst, m, 0), cols);
            });
        } else {
            with_type(dst.dtype, [&](auto* tag) LORAXS_LAMBDA {
                narrow(element<float>(src, m, 0), 1.0f, element<Element<decltype(tag)>>(dst, m, 0),
                       cols);
            });
        }
    }
}

}  // namespace

constexpr KernelTable table(const char* name) {
    return {name,    kPanelCols, kTileMR,    dot,     tile,
            product, grad_core,  column_sum, convert, keep_mask};
}

}  // namespace loraxs::LORAXS_ARCH
