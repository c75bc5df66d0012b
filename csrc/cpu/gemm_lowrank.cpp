#include "gemm_lowrank.h"

#include <algorithm>

namespace loraxs {
namespace {

// ---- choices, by arithmetic ----

// The side path's own kernels compute in float32 and start in about a microsecond; oneDNN costs
// five to ten per call, but has the processor's 16-bit matrix instructions. So: oneDNN for 16-bit
// operands packed as such, once there is enough to do; our own kernels for everything else.
bool onednn_pays(const PackedWeight& packed, DType dtype, int64_t m, int64_t rank) {
    return packed && packed.dtype == dtype && dtype != DType::kFloat32 && m >= 64 &&
           m * rank >= 4096;
}

// Rows per block of oneDNN's base product. A block of it should still be in cache when the side
// path is added, and, where x goes through float32, the float32 copies should stay small; but each
// block is one more call that reads all of W again, so blocks have at least 256 rows.
int64_t block_rows(const LowRankProblem& p, bool through_fp32) {
    constexpr int64_t kBlockBytes = 4 << 20;
    const int64_t row_bytes = through_fp32 ? 4 * (p.n + p.k) : p.n * element_size(p.dtype);
    if (!through_fp32 && p.m * row_bytes <= 4 * kBlockBytes) return p.m;
    const int64_t rows = std::max<int64_t>(256, kBlockBytes / row_bytes / 64 * 64);
    return p.m < 2 * rows ? p.m : rows;
}

// ---- the stages ----

Tensor compute_q(const LowRankProblem& p) {
    if (!p.dropout_in && onednn_pays(p.lhs_packed, p.dtype, p.m, p.rank)) {
        return packed_linear(p.x, p.lhs_packed, std::nullopt);
    }
    Tensor q = new_tensor(p.dtype, {p.m, p.rank});
    shrink(p.x_view, p.m, p.k, p.lhs, p.rank, p.dropout_in, matrix_of(q, p.dtype));
    return q;
}

// out[first : first + count] = base + D_out(t rhs) for those rows.
void add_side_path(const LowRankProblem& p, const ConstMatrix& t, const ConstMatrix& base,
                   const Matrix& out, int64_t first, int64_t count) {
    Dropout dropout;
    if (p.dropout_out) {
        dropout = *p.dropout_out;
        dropout.first += static_cast<uint64_t>(first) * dropout.stride;
    }
    expand(rows_from(t, first), count, p.rank, p.rhs, p.n, base, p.dropout_out ? &dropout : nullptr,
           rows_from(out, first));
}

// The base product is computed block by block; each block is still in cache when the side path is
// added on its way to `out`. A single block is updated in place and becomes the output.
Tensor base_plus_side(LowRankProblem& p, const ConstMatrix& t) {
    const DType work = p.weight.dtype;
    const bool through_fp32 = work != p.dtype;
    const int64_t rows = block_rows(p, through_fp32);
    const bool whole = rows == p.m;
    const bool in_place = whole && !through_fp32;
    OptionalTensor out;
    if (!in_place) out = new_tensor(p.dtype, {p.m, p.n});
    OptionalTensor staged;
    if (through_fp32) staged = new_tensor(DType::kFloat32, {rows, p.k});
    for (int64_t first = 0; first < p.m; first += rows) {
        const int64_t count = std::min(rows, p.m - first);
        Tensor x = p.x;
        if (through_fp32) {
            convert(rows_from(p.x_view, first), matrix_of(*staged, DType::kFloat32), count, p.k);
            x = count == rows ? *staged : narrow_rows(*staged, 0, count);
        } else if (!whole) {
            x = narrow_rows(p.x, first, count);
        }
        Tensor block = packed_linear(x, p.weight, p.onednn_bias);
        const Matrix block_view = matrix_of(block, work);
        const Matrix out_view = in_place ? block_view : matrix_of(*out, p.dtype);
        add_side_path(p, t, as_const(block_view), out_view, first, count);
        if (in_place) out = block;
    }
    return *out;
}

// Whether base and, unless it has a mask of its own, side path are one product of ours.
bool own_product(const LowRankProblem& p) {
    return p.panels || (p.dense_weight.data && p.m > kStreamedRows);
}

ProductArgs product_args(const LowRankProblem& p, const Matrix& out) {
    ProductArgs args;
    args.x = p.x_view;
    args.panels = p.panels;
    args.w = p.dense_weight;
    args.w_by_columns = p.by_columns;
    args.depth = p.k;
    args.bias = p.bias;
    args.out = out;
    return args;
}

Tensor product_with_side(const LowRankProblem& p, const ConstMatrix& t) {
    Tensor out = new_tensor(p.dtype, {p.m, p.n});
    ProductArgs args = product_args(p, matrix_of(out, p.dtype));
    args.t = t;
    args.rhs = p.rhs;
    args.rank = p.rank;
    packed_product(args, p.m, p.n);
    return out;
}

// The base is computed whole, in float32 until the side path is added: by streaming a dense weight
// (oneDNN takes some twenty microseconds to start a product of any size), or as a product of ours.
Tensor float_base_plus_side(const LowRankProblem& p, const ConstMatrix& t) {
    const Tensor base = new_tensor(DType::kFloat32, {p.m, p.n});
    const Matrix base_view = matrix_of(base, DType::kFloat32);
    if (own_product(p)) {
        packed_product(product_args(p, base_view), p.m, p.n);
    } else {
        dense_linear(p.x_view, p.m, p.k, p.dense_weight, p.n, p.bias, base_view);
    }
    if (p.dtype == DType::kFloat32) {
        add_side_path(p, t, as_const(base_view), base_view, 0, p.m);
        return base;
    }
    Tensor out = new_tensor(p.dtype, {p.m, p.n});
    add_side_path(p, t, as_const(base_view), matrix_of(out, p.dtype), 0, p.m);
    return out;
}

// 16-bit operands with native matrix instructions and much to do: the expand step is oneDNN's too.
Tensor packed_base_plus_packed_side(const LowRankProblem& p, const Tensor& t) {
    const Tensor base = packed_linear(p.x, p.weight, p.onednn_bias);
    return packed_linear_add(t, base, p.rhs_packed);
}

}  // namespace

LowRankResult gemm_lowrank(LowRankProblem& p) {
    LowRankResult result{std::nullopt, compute_q(p)};
    if (!p.want_out) return result;
    if (p.m == 0) {
        result.out = new_tensor(p.dtype, {0, p.n});
        return result;
    }
    const bool packed_side = p.weight && p.weight.dtype == p.dtype && !p.dropout_out &&
                             onednn_pays(p.rhs_packed, p.dtype, p.m, p.rank);
    const DType t_dtype = packed_side ? p.dtype : DType::kFloat32;
    const Tensor t = new_tensor(t_dtype, {p.m, p.rank});
    const Matrix t_view = matrix_of(t, t_dtype);
    const ConstMatrix q_view = as_const(matrix_of(result.q, p.dtype));
    apply_core(q_view, p.m, p.cores, p.core_transposed, p.scaling, t_view);
    if (packed_side) {
        result.out = packed_base_plus_packed_side(p, t);
    } else if (own_product(p) && !p.dropout_out) {
        result.out = product_with_side(p, as_const(t_view));
    } else if (p.panels || p.dense_weight.data) {
        result.out = float_base_plus_side(p, as_const(t_view));
    } else if (p.weight) {
        result.out = base_plus_side(p, as_const(t_view));
    } else {
        result.out = new_tensor(p.dtype, {p.m, p.n});
        add_side_path(p, as_const(t_view), p.base, matrix_of(*result.out, p.dtype), 0, p.m);
    }
    return result;
}

}  // namespace loraxs
