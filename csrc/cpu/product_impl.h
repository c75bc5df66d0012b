// The base product with its side path, as one matrix product of depth K + rank:
//
//   out [M, N] = [x | t] [w | rhs^T]^T + bias        x [M, K], w [N, K], t [M, rank], rhs [rank, N]
//
// 2 M N (K + rank) FLOPs. The weight comes packed in panels, which are read once per kProductRows
// rows of x, or is packed on the way; out is updated once per kChainDepth of K. The blocking is
// that of Goto and van de Geijn (ACM TOMS 34, 2008): a block of x in L2, read by one panel after
// the other, of which the part in use stays in L1. Included by kernels_impl.h.

// Longer chains of additions lose digits: at 512, the RMS error of a product with K = 512 is twice
// that of MKL. The side path is a chain of its own for the same reason.
constexpr int64_t kChainDepth = 256;

// The size of the parts into which `total` is cut if no part is larger than `most` and none is much
// smaller than the others: what a part costs to begin and to end should pay.
LORAXS_INLINE int64_t even_part(int64_t total, int64_t most) {
    const int64_t parts = (total + most - 1) / most;
    return parts > 1 ? (total + parts - 1) / parts : total;
}

static_assert(kTileMR >= 4, "four rows of w are widened where kTileMR rows of x are");

// acc += A B for A packed [depth][MR] and one panel B [depth][kPanelCols].
template <int MR>
LORAXS_INLINE void accumulate(const float* a, const float* b, int64_t depth, Vec (&acc)[MR][2]) {
    constexpr int64_t kAhead = 32 * kPanelCols;  // 2 KiB: hides a miss of L2
    for (int64_t k = 0; k < depth; ++k, a += MR, b += kPanelCols) {
        __builtin_prefetch(b + kAhead);
        const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
            const Vec x = splat(a[i]);
            acc[i][0] += x * b0;
            acc[i][1] += x * b1;
        }
    }
}

// One panel of one block of the depth: a pair of packed factors for x and w, one for t and rhs
// (side_depth 0: none), and where the sums begin and end.
struct PanelArgs {
    const float* w;
    const float* side;
    int64_t depth, side_depth;
    const float* bias;  // of the first block of the depth, or null
    bool add;           // to what `out` has: not the first block of the depth
};

// out[MR][kPanelCols] (=, +=) acc + bias.
template <int MR>
LORAXS_INLINE void put(const Vec (&acc)[MR][2], const float* bias, bool add, float* out,
                       int64_t stride) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            float* dst = out + i * stride + v * kLanes;
            Vec sum = acc[i][v];
            if (bias) sum += load(bias + v * kLanes);
            if (add) sum += load(dst);
            store(dst, sum);
        }
    }
}

// out[MR][kPanelCols] (=, +=) A B + bias for A [depth][MR], in chains of kChainDepth sums.
template <int MR>
LORAXS_INLINE void add_product(const float* a, const float* b, int64_t depth, const float* bias,
                               bool add, float* out, int64_t stride) {
    const int64_t chain = even_part(depth, kChainDepth);
    for (int64_t k = 0; k < depth; k += chain) {
        Vec acc[MR][2] = {};
        accumulate<MR>(a + k * MR, b + k * kPanelCols, min64(chain, depth - k), acc);
        put<MR>(acc, bias, add, out, stride);
        bias = nullptr;
        add = true;
    }
}

// out[MR][kPanelCols] (=, +=) A B + T S + bias, A [depth][MR] followed by T [side_depth][MR].
template <int MR>
LORAXS_INLINE void product_block(const PanelArgs& p, const float* a, float* out, int64_t stride) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) __builtin_prefetch(out + i * stride, 1);
    add_product<MR>(a, p.w, p.depth, p.bias, p.add, out, stride);
    add_product<MR>(a + p.depth * MR, p.side, p.side_depth, nullptr, true, out, stride);
}

// The same for `rows` <= MR rows.
template <int MR>
LORAXS_INLINE void product_rows(int64_t rows, const PanelArgs& p, const float* a, float* out,
                                int64_t stride) {
    if (rows == MR) return product_block<MR>(p, a, out, stride);
    if constexpr (MR > 1) product_rows<MR - 1>(rows, p, a, out, stride);
}

// The transpose of a 4 x 4 block.
LORAXS_INLINE void transpose_block(const Vec4* row, Vec4* column) {
    const Vec4 low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
    const Vec4 low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
    const Vec4 high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
    const Vec4 high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
    column[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
    column[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
    column[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
    column[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

// packed[depth][4 of stride] = the transpose of four rows of floats.
LORAXS_INLINE void transpose_four(const float* const* row, int64_t depth, float* packed,
                                  int64_t stride) {
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4, packed += 4 * stride) {
        Vec4 r[4], column[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) __builtin_memcpy(&r[i], row[i] + k, sizeof r[i]);
        transpose_block(r, column);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) __builtin_memcpy(packed + c * stride, &column[c], 16);
    }
    for (; k < depth; ++k, packed += stride) {
        for (int i = 0; i < 4; ++i) packed[i] = row[i][k];
    }
}

// packed[depth][6] = the transpose of six rows of floats.
LORAXS_INLINE void transpose_six(const float* const* row, int64_t depth, float* packed) {
    transpose_four(row, depth, packed, 6);
    for (int64_t k = 0; k < depth; ++k) {
        packed[6 * k + 4] = row[4][k];
        packed[6 * k + 5] = row[5][k];
    }
}

// packed[depth][rows] = the transpose of src[m : m + rows, k : k + depth], widened; `widened` has
// room for `rows` rows of `depth`.
void pack_transposed(const ConstMatrix& src, int64_t m, int64_t rows, int64_t k, int64_t depth,
                     float* packed, float* widened) {
    const float* row[kTileMR];
    for (int64_t i = 0; i < rows; ++i) {
        if (src.dtype == DType::kFloat32) {
            row[i] = element<float>(src, m + i, k);
        } else {
            row[i] = widened + i * depth;
            with_type(src.dtype, [&](auto* tag) LORAXS_LAMBDA {
                widen(element<Element<decltype(tag)>>(src, m + i, k), widened + i * depth, depth);
            });
        }
    }
    if (rows == 6) return transpose_six(row, depth, packed);
    for (int64_t c = 0; c < depth; ++c, packed += rows) {
        for (int64_t i = 0; i < rows; ++i) packed[i] = row[i][c];
    }
}

// Where `product` puts what it packs.
struct ProductBuffers {
    float* x;        // [groups][kProductDepth + rank][kTileMR]
    float* widened;  // [kTileMR >= 4][kProductDepth]
    float* w;        // [kProductDepth][kPanelCols]: a panel packed on the way
    float* side;     // [rank][kPanelCols]
    float* bias;     // [kPanelCols]
    float* block;    // [kTileMR][kPanelCols]: the last columns of out
    float* sums;     // [kProductRows][n1 - n0]: out, where that is not float32
};

ProductBuffers product_buffers(const ProductArgs& a, int64_t rows, int64_t cols) {
    const int64_t group = kTileMR * (min64(a.depth, kProductDepth) + a.rank);
    const int64_t x = (rows + kTileMR - 1) / kTileMR * group;
    const int64_t widened = kTileMR * min64(a.depth, kProductDepth), side = a.rank * kPanelCols;
    const int64_t w = a.panels ? 0 : min64(a.depth, kProductDepth) * kPanelCols;
    const bool staged = a.out.dtype != DType::kFloat32;
    ProductBuffers b{};
    b.w = scratch(Slot::kKernel,
                  w + side + (1 + kTileMR) * kPanelCols + widened + x + (staged ? rows * cols : 0));
    b.side = b.w + w;
    b.bias = b.side + side;
    b.block = b.bias + kPanelCols;
    b.widened = b.block + kTileMR * kPanelCols;
    b.x = b.widened + widened;
    b.sums = staged ? b.x + x : nullptr;
    return b;
}

// A panel that reaches beyond the last column of out: `cols` of its columns, by way of `block`.
void product_edge(int64_t rows, const PanelArgs& p, const float* a, float* out, int64_t stride,
                  int64_t cols, float* block) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < cols; ++c) {
            block[i * kPanelCols + c] = p.add ? out[i * stride + c] : 0.0f;
        }
    }
    product_rows<kTileMR>(rows, p, a, block, kPanelCols);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < cols; ++c) out[i * stride + c] = block[i * kPanelCols + c];
    }
}

// packed[depth][kPanelCols] = columns [n, n + cols) of a row-major matrix.
void pack_columns(const ConstMatrix& src, int64_t n, int64_t depth, int64_t cols, float* packed) {
    with_type(src.dtype, [&](auto* tag) LORAXS_LAMBDA {
        pack_panel(element<Element<decltype(tag)>>(src, 0, n), src.stride, depth, cols, kPanelCols,
                   packed);
    });
}

// packed[depth][kPanelCols] = the transpose of w[n : n + cols, k : k + depth], zero beyond `cols`.
// Four rows at a time: more would push each other out of L1 where rows are 4 KiB apart.
void pack_rows_as_panel(const ConstMatrix& w, int64_t n, int64_t cols, int64_t k, int64_t depth,
                        float* packed, float* widened) {
    for (int64_t j = 0; j < kPanelCols; j += 4) {
        const float* row[4];
        for (int64_t i = 0; i < 4; ++i) {
            float* copy = widened + i * depth;
            row[i] = copy;
            if (j + i >= cols) {
                for (int64_t c = 0; c < depth; ++c) copy[c] = 0.0f;
            } else if (w.dtype == DType::kFloat32) {
                row[i] = element<float>(w, n + j + i, k);
            } else {
                with_type(w.dtype, [&](auto* tag) LORAXS_LAMBDA {
                    widen(element<Element<decltype(tag)>>(w, n + j + i, k), copy, depth);
                });
            }
        }
        transpose_four(row, depth, packed + j, kPanelCols);
    }
}

// The panel at column n of rows [k, k + depth) of the depth.
const float* panel_of(const ProductArgs& a, const ProductBuffers& buffers, int64_t n, int64_t cols,
                      int64_t k, int64_t depth) {
    if (a.panels) return a.panels + (n / kPanelCols * a.depth + k) * kPanelCols;
    if (a.w_by_columns) {
        const int64_t offset = k * a.w.stride * (a.w.dtype == DType::kFloat32 ? 4 : 2);
        const ConstMatrix rows{static_cast<const char*>(a.w.data) + offset, a.w.dtype, a.w.stride};
        pack_columns(rows, n, depth, cols, buffers.w);
    } else {
        pack_rows_as_panel(a.w, n, cols, k, depth, buffers.w, buffers.widened);
    }
    return buffers.w;
}

// Asks for part `step` of `steps` of the memory that panel_of(n, cols, k, depth) will read. A
// column block of W is one cache line in each of many pages, which no hardware foresees.
LORAXS_INLINE void prefetch_panel(const ProductArgs& a, int64_t n, int64_t cols, int64_t k,
                                  int64_t depth, int64_t step, int64_t steps) {
    const int64_t size = a.w.dtype == DType::kFloat32 ? 4 : 2;
    const char* first = static_cast<const char*>(a.w.data);
    first += size * (a.w_by_columns ? k * a.w.stride + n : n * a.w.stride + k);
    const int64_t rows = a.w_by_columns ? depth : cols;
    const int64_t lines = ((a.w_by_columns ? cols : depth) * size + 63) / 64;  // of a row
    for (int64_t i = rows * lines * step / steps; i < rows * lines * (step + 1) / steps; ++i) {
        __builtin_prefetch(first + i / lines * a.w.stride * size + i % lines * 64, 0, 2);
    }
}

// One block of the depth, [k, k + depth), for rows [m, m + rows): out or, where that is not
// float32, its stand-in `sums` [rows][stride], whose column 0 is n0.
void product_depth(const ProductArgs& a, const ProductBuffers& buffers, int64_t m, int64_t rows,
                   int64_t n0, int64_t n1, int64_t k, int64_t depth, float* sums, int64_t stride) {
    const int64_t side_depth = k + depth == a.depth ? a.rank : 0;
    const int64_t group = kTileMR * (depth + side_depth);
    for (int64_t i = 0; i < rows; i += kTileMR) {
        const int64_t count = min64(kTileMR, rows - i);
        float* packed = buffers.x + i / kTileMR * group;
        pack_transposed(a.x, m + i, count, k, depth, packed, buffers.widened);
        if (side_depth) {
            pack_transposed(a.t, m + i, count, 0, side_depth, packed + count * depth,
                            buffers.widened);
        }
    }
    const bool biased = a.bias.data && k == 0;
    PanelArgs panel{nullptr, buffers.side, depth, side_depth, biased ? buffers.bias : nullptr,
                    k > 0};
    for (int64_t n = n0; n < n1; n += kPanelCols) {
        const int64_t cols = min64(kPanelCols, n1 - n);
        panel.w = panel_of(a, buffers, n, cols, k, depth);
        if (side_depth) pack_columns(a.rhs, n, a.rank, cols, buffers.side);
        if (biased) pack_columns(a.bias, n, 1, cols, buffers.bias);
        const int64_t next = n + kPanelCols;
        for (int64_t i = 0; i < rows; i += kTileMR) {
            const int64_t count = min64(kTileMR, rows - i);
            const float* packed = buffers.x + i / kTileMR * group;
            float* out = sums + i * stride + n - n0;
            if (!a.panels && next < n1) {
                prefetch_panel(a, next, min64(kPanelCols, n1 - next), k, depth, i / kTileMR,
                               (rows + kTileMR - 1) / kTileMR);
            }
            if (cols == kPanelCols) {
                product_rows<kTileMR>(count, panel, packed, out, stride);
            } else {
                product_edge(count, panel, packed, out, stride, cols, buffers.block);
            }
        }
    }
}

void product(const ProductArgs& a, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
    const int64_t most = a.panels ? kProductRows : kProductRowsPacking;
    const int64_t tiles = (even_part(m1 - m0, most) + kTileMR - 1) / kTileMR;
    const int64_t block = tiles * kTileMR;
    const int64_t depth = even_part(a.depth, kProductDepth);
    const ProductBuffers buffers = product_buffers(a, block, n1 - n0);
    const bool staged = buffers.sums != nullptr;
    for (int64_t m = m0; m < m1; m += block) {
        const int64_t rows = min64(block, m1 - m);
        float* sums = staged ? buffers.sums : element<float>(a.out, m, n0);
        const int64_t stride = staged ? n1 - n0 : a.out.stride;
        for (int64_t k = 0; k < a.depth; k += depth) {
            product_depth(a, buffers, m, rows, n0, n1, k, min64(depth, a.depth - k), sums, stride);
        }
        if (!staged) continue;
        with_type(a.out.dtype, [&](auto* tag) LORAXS_LAMBDA {
            for (int64_t i = 0; i < rows; ++i) {
                narrow(sums + i * stride, 1.0f, element<Element<decltype(tag)>>(a.out, m + i, n0),
                       n1 - n0);
            }
        });
    }
}
