// The ops of the library: schemas, argument checks, registration. No arithmetic.
#include <array>
#include <cmath>
#include <tuple>

#include "gemm_lowrank.h"

namespace loraxs {
namespace {

// The per-row core selection as it comes in; see Cores.
struct RowGroups {
    const OptionalTensor& ids;
    const OptionalTensor& order;
    const OptionalTensor& offsets;
};

// The kernels index memory with these, so they are checked entry by entry: M steps against the
// M * rank * (K + N) of the products.
void check_groups(const int64_t* ids, const int64_t* order, const int64_t* offsets, int64_t n,
                  int64_t m) {
    LORAXS_CHECK(offsets[0] == 0 && offsets[n + 1] == m, "offsets: expected to run from 0 to ", m,
                 ", got ", offsets[0], " to ", offsets[n + 1]);
    for (int64_t segment = 0; segment <= n; ++segment) {
        const int64_t begin = offsets[segment], end = offsets[segment + 1];
        LORAXS_CHECK(begin <= end && end <= m, "offsets: expected ascending values up to ", m,
                     ", got ", begin, " before ", end);
        int64_t previous = -1;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = order[i];
            // Ascending rows with the segment's own id: together, every row occurs exactly once.
            LORAXS_CHECK(row > previous && row < m, "order: expected ascending rows below ", m,
                         " within an adapter, got ", row, " after ", previous);
            LORAXS_CHECK(ids[row] == segment - 1, "ids: row ", row, " has adapter ", ids[row],
                         ", but order and offsets say ", segment - 1);
            previous = row;
        }
    }
}

Cores parse_cores(const Tensor& r, const RowGroups& groups, int64_t rank, int64_t m,
                  DType x_dtype) {
    check_cpu(r, "R");
    Cores cores;
    cores.rank = rank;
    const bool per_row = r.dim() == 3;
    LORAXS_CHECK((per_row || r.dim() == 2) && r.size(r.dim() - 1) == rank &&
                     r.size(r.dim() - 2) == rank && r.is_contiguous(),
                 "R: expected a contiguous tensor of shape [", rank, ", ", rank, "] or [n, ", rank,
                 ", ", rank, "], got ", shape_string(r));
    const DType dtype = float_dtype(r, "R");
    check_operand_dtype(dtype, "R", x_dtype);
    cores.r = {r.const_data_ptr(), dtype, rank};
    const bool any = groups.ids || groups.order || groups.offsets;
    const bool all = groups.ids && groups.order && groups.offsets;
    LORAXS_CHECK(per_row ? all : !any,
                 "ids, order, offsets: expected all three with R of three dimensions and none "
                 "with R of two; R has shape ",
                 shape_string(r));
    if (!per_row) return cores;
    cores.n = r.size(0);
    const int64_t* ids = int64_vector(*groups.ids, "ids", m);
    cores.order = int64_vector(*groups.order, "order", m);
    cores.offsets = int64_vector(*groups.offsets, "offsets", cores.n + 2);
    check_groups(ids, cores.order, cores.offsets, cores.n, m);
    return cores;
}

// `seed` is [key]; element (row, col) of the masked matrix then has the counter
// (row_offset + row) * cols + col. Or it is [key, first, stride], where the matrix is part of a
// wider one, as the columns of a tensor-parallel rank are; the counter is then
// first + (row_offset + row) * stride + col.
Dropout parse_dropout(const OptionalTensor& seed, int64_t row_offset, int64_t cols, double p) {
    LORAXS_CHECK(p >= 0.0 && p <= 1.0, "dropout_p: expected a value in [0, 1], got ", p);
    LORAXS_CHECK(row_offset >= 0, "row_offset: expected a value >= 0, got ", row_offset);
    Dropout dropout;
    dropout.threshold = static_cast<uint64_t>(std::floor(std::ldexp(p, 32)));
    dropout.scale = p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f;
    if (p == 0.0) return dropout;
    LORAXS_CHECK(seed.has_value(), "seed: expected a tensor, because dropout_p is ", p);
    check_cpu(*seed, "seed");
    const bool whole = seed->numel() == 1;
    LORAXS_CHECK((whole || seed->numel() == 3) && seed->is_contiguous() &&
                     seed->scalar_type() == torch::headeronly::ScalarType::Long,
                 "seed: expected one or three int64 elements, got shape ", shape_string(*seed),
                 " of ", torch::headeronly::toString(seed->scalar_type()));
    const int64_t* values = static_cast<const int64_t*>(seed->const_data_ptr());
    const int64_t first = whole ? 0 : values[1], stride = whole ? cols : values[2];
    LORAXS_CHECK(first >= 0 && stride >= cols, "seed: expected a first counter >= 0 and at least ",
                 cols, " counters for each row, got ", first, " and ", stride);
    dropout.seed = static_cast<uint64_t>(values[0]);
    dropout.stride = static_cast<uint64_t>(stride);
    dropout.first =
        static_cast<uint64_t>(first) + static_cast<uint64_t>(row_offset) * dropout.stride;
    return dropout;
}

ConstMatrix parse_basis(const Tensor& t, const char* name, DType x_dtype) {
    const ConstMatrix view = contiguous_matrix(t, name);
    check_operand_dtype(view.dtype, name, x_dtype);
    return view;
}

// A and Bt with the sizes they imply.
struct Bases {
    ConstMatrix a, bt;
    int64_t rank = 0, k = 0, n = 0;
};

Bases parse_bases(const Tensor& a, const Tensor& bt, DType x_dtype) {
    Bases bases{parse_basis(a, "A", x_dtype), parse_basis(bt, "Bt", x_dtype)};
    bases.rank = a.size(0);
    bases.k = a.size(1);
    bases.n = bt.size(1);
    LORAXS_CHECK(bases.rank >= 1 && bases.k >= 1 && bases.n >= 1 && bt.size(0) == bases.rank,
                 "A, Bt: expected shapes [r, in] and [r, out], got ", shape_string(a), " and ",
                 shape_string(bt));
    return bases;
}

// x (or dY) with its view; `cols` is what A (or Bt) says it must have.
void set_input(LowRankProblem& p, const Tensor& x, const char* name) {
    p.x = x;
    p.x_view = row_major(p.x, name);
    p.dtype = p.x_view.dtype;
    p.m = p.x.size(0);
}

void check_columns(const Tensor& x, const char* name, int64_t cols) {
    LORAXS_CHECK(x.size(1) == cols, name, ": expected ", cols, " columns, got shape ",
                 shape_string(x));
}

// The weight of the base product: in panels (three dimensions), packed by oneDNN (told by its
// layout), or dense.
void set_weight(LowRankProblem& p, const OptionalTensor& weight, const char* name) {
    if (!weight.has_value()) return;
    if (is_packed(*weight)) {
        p.weight = packed_weight(weight, name, p.n, p.k, p.dtype);
    } else if (weight->dim() == 3) {
        p.panels = panels_of(*weight, name, p.n, p.k, kernels().tile_cols);
    } else {
        check_shape(*weight, name, p.n, p.k);
        p.by_columns = p.m > kStreamedRows && !weight->is_contiguous();
        p.dense_weight =
            p.by_columns ? transposed_matrix(*weight, name) : contiguous_matrix(*weight, name);
        check_operand_dtype(p.dense_weight.dtype, name, p.dtype);
    }
}

void set_bias(LowRankProblem& p, const OptionalTensor& bias) {
    if (!bias.has_value()) return;
    LORAXS_CHECK(p.panels || p.weight || p.dense_weight.data,
                 "bias: expected None without a weight (add it to base)");
    check_vector(*bias, "bias", p.n);
    const DType dtype = float_dtype(*bias, "bias");
    LORAXS_CHECK(dtype == p.dtype, "bias: expected ", dtype_name(p.dtype), ", got ",
                 dtype_name(dtype));
    p.bias = {bias->const_data_ptr(), dtype, p.n};
    if (!p.weight) return;
    p.onednn_bias = bias;
    if (dtype != p.weight.dtype) {  // oneDNN wants it in the dtype it computes in: here, float32
        p.onednn_bias = new_tensor(DType::kFloat32, {p.n});
        convert(p.bias, matrix_of(*p.onednn_bias, DType::kFloat32), 1, p.n);
    }
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& base,
                                   const Tensor& a, const Tensor& r, const Tensor& bt,
                                   const OptionalTensor& shrink_packed,
                                   const OptionalTensor& expand_packed, const OptionalTensor& seed,
                                   int64_t row_offset, const OptionalTensor& ids,
                                   const OptionalTensor& order, const OptionalTensor& offsets,
                                   double scaling, double dropout_p) {
    LowRankProblem p;
    set_input(p, x, "x");
    const Bases bases = parse_bases(a, bt, p.dtype);
    check_columns(p.x, "x", bases.k);
    p.k = bases.k;
    p.n = bases.n;
    p.rank = bases.rank;
    p.lhs = bases.a;
    p.rhs = bases.bt;
    LORAXS_CHECK(weight.has_value() != base.has_value(),
                 "weight, base: expected exactly one of the two");
    set_weight(p, weight, "weight");
    set_bias(p, bias);
    OptionalTensor base_rows = base;  // keeps a copy alive, if row_major makes one
    if (base_rows) {
        p.base = row_major(*base_rows, "base");
        check_shape(*base_rows, "base", p.m, p.n);
        check_operand_dtype(p.base.dtype, "base", p.dtype);
    }
    p.lhs_packed = packed_weight(shrink_packed, "shrink_packed", p.rank, p.k, p.dtype);
    p.rhs_packed = packed_weight(expand_packed, "expand_packed", p.n, p.rank, p.dtype);
    p.cores = parse_cores(r, {ids, order, offsets}, p.rank, p.m, p.dtype);
    p.scaling = static_cast<float>(scaling);
    const Dropout dropout = parse_dropout(seed, row_offset, p.k, dropout_p);
    if (dropout_p > 0.0) p.dropout_in = &dropout;
    LowRankResult result = gemm_lowrank(p);
    return {*result.out, result.q};
}

Tensor core_gradient_tensor(const Tensor& p_rows, const ConstMatrix& q, const LowRankProblem& p) {
    const Cores& cores = p.cores;
    Tensor d_core = cores.per_row() ? new_tensor(cores.r.dtype, {cores.n, p.rank, p.rank})
                                    : new_tensor(cores.r.dtype, {p.rank, p.rank});
    core_gradient(as_const(matrix_of(p_rows, p.dtype)), q, p.m, cores, p.scaling,
                  matrix_of(d_core, cores.r.dtype));
    return d_core;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const Tensor& q, const OptionalTensor& weight_t, const Tensor& a,
    const Tensor& r, const Tensor& bt, const OptionalTensor& shrink_packed,
    const OptionalTensor& expand_packed, const OptionalTensor& seed, int64_t row_offset,
    const OptionalTensor& ids, const OptionalTensor& order, const OptionalTensor& offsets,
    double scaling, double dropout_p, bool need_dx, bool need_dR, bool need_db, bool has_weight) {
    LowRankProblem p;
    set_input(p, grad_y, "grad_y");
    const Bases bases = parse_bases(a, bt, p.dtype);
    check_columns(p.x, "grad_y", bases.n);
    // The roles of the forward, swapped.
    p.k = bases.n;
    p.n = bases.k;
    p.rank = bases.rank;
    p.lhs = bases.bt;
    p.rhs = bases.a;
    p.core_transposed = true;
    LORAXS_CHECK(
        !need_dx || has_weight == weight_t.has_value(), "weight_t: expected ",
        has_weight ? "a weight, because has_weight is True" : "None, because has_weight is False");
    set_weight(p, weight_t, "weight_t");
    p.lhs_packed = packed_weight(shrink_packed, "shrink_packed", p.rank, p.k, p.dtype);
    p.rhs_packed = packed_weight(expand_packed, "expand_packed", p.n, p.rank, p.dtype);
    p.cores = parse_cores(r, {ids, order, offsets}, p.rank, p.m, p.dtype);
    const ConstMatrix q_view = contiguous_matrix(q, "q");
    check_shape(q, "q", p.m, p.rank);
    LORAXS_CHECK(q_view.dtype == p.dtype, "q: expected ", dtype_name(p.dtype), ", got ",
                 dtype_name(q_view.dtype));
    p.scaling = static_cast<float>(scaling);
    const Dropout dropout = parse_dropout(seed, row_offset, p.n, dropout_p);
    if (dropout_p > 0.0) p.dropout_out = &dropout;
    p.want_out = need_dx;

    std::array<OptionalTensor, 3> grads;
    if (need_dx || need_dR) {
        LowRankResult result = gemm_lowrank(p);
        grads[0] = result.out;
        if (need_dR) grads[1] = core_gradient_tensor(result.q, q_view, p);
    }
    if (need_db) {
        grads[2] = new_tensor(p.dtype, {p.k});
        sum_rows(p.x_view, p.m, p.k, matrix_of(*grads[2], p.dtype));
    }
    for (OptionalTensor& grad : grads) {
        if (!grad) grad = new_tensor(p.dtype, {0});
    }
    return {*grads[0], *grads[1], *grads[2]};
}

Tensor dropout_mask(const Tensor& seed, int64_t row_offset, int64_t rows, int64_t cols, double p) {
    LORAXS_CHECK(rows >= 0 && cols >= 0, "rows, cols: expected values >= 0, got ", rows, " and ",
                 cols);
    const Dropout dropout = parse_dropout(seed, row_offset, cols, p);
    const std::array<int64_t, 2> sizes{rows, cols};
    Tensor mask = torch::stable::new_empty(seed, {sizes.data(), sizes.size()},
                                           torch::headeronly::ScalarType::Bool);
    keep_mask(dropout, rows, cols, static_cast<bool*>(mask.mutable_data_ptr()));
    return mask;
}

Tensor gram_product(const Tensor& x, const Tensor& w) {
    const ConstMatrix rows = contiguous_matrix(x, "x"), matrix = contiguous_matrix(w, "w");
    LORAXS_CHECK(rows.dtype == DType::kFloat32 && matrix.dtype == DType::kFloat32,
                 "x, w: expected float32");
    LORAXS_CHECK(x.size(1) == w.size(1) && w.size(0) >= 1 && w.size(1) >= 1,
                 "x, w: expected shapes [k, n] and [m, n], got ", shape_string(x), " and ",
                 shape_string(w));
    const int64_t k = x.size(0), n = x.size(1);
    Tensor out = new_tensor(DType::kFloat32, {k, n});
    const Tensor partial = new_tensor(DType::kFloat32, {kGramChunks, k, n});
    gram_rows(rows, k, matrix, w.size(0), n, static_cast<float*>(partial.mutable_data_ptr()),
              matrix_of(out, DType::kFloat32));
    return out;
}

std::string isa() { return kernels().name; }

int64_t panel_columns() { return kernels().tile_cols; }

}  // namespace
}  // namespace loraxs

// forward(...) -> (y [M, out], q [M, r]):
//   y = x W^T + bias + scaling * (q R^T) Bt   (or base + ...),   q = dropout(x) A^T in x's dtype.
//   x [M, in] float32, bfloat16 or float16, any row stride. weight: W [out, in] in panels, float32
//   [ceil(out / c)][in][c] for c = panel_columns(), zero beyond out; or packed by
//   mkldnn::_reorder_linear_weight, in x's dtype or (a 16-bit x then goes through float32) in
//   float32; or W itself, contiguous or (for more than 24 rows) the transpose of a contiguous
//   matrix, in x's dtype or float32. bias in x's dtype. A [r, in], Bt [r, out] contiguous, in x's
//   dtype or float32. R [r, r], or [n, r, r] with ids [M], order [M] and offsets [n + 2] as
//   AdapterBatch makes them. shrink_packed, expand_packed: A [r, in] and Bt^T [out, r] packed; used
//   where that is faster. seed: one int64, the key, or three (see parse_dropout), needed if
//   dropout_p > 0.
// backward(...) -> (dx [M, in], dR like R, db [out]), an empty tensor of size [0] where not needed:
//   weight_t: W^T [in, out], in panels, packed or dense. shrink_packed, expand_packed: Bt [r, out]
//   and A^T [in, r] packed. Dropout masks the side path of dx only. db has grad_y's dtype.
// dropout_mask(...) -> bool [rows, cols]: what the two others keep.
// gram_rows(...) -> x w^T w [k, n] of contiguous float32 x [k, n] and w [m, n], w read once.
// isa() -> the instruction set in use: avx512, avx2 or generic.
// panel_columns() -> rows of W in a panel.
STABLE_TORCH_LIBRARY(loraxs_cpu, m) {
    m.def(
        "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor A, Tensor R, Tensor "
        "Bt, "
        "Tensor? shrink_packed, Tensor? expand_packed, Tensor? seed, int row_offset, Tensor? ids, "
        "Tensor? order, Tensor? offsets, float scaling, float dropout_p) -> (Tensor y, Tensor q)");
    m.def(
        "backward(Tensor grad_y, Tensor q, Tensor? weight_t, Tensor A, Tensor R, Tensor Bt, "
        "Tensor? shrink_packed, Tensor? expand_packed, Tensor? seed, int row_offset, Tensor? ids, "
        "Tensor? order, Tensor? offsets, float scaling, float dropout_p, bool need_dx, bool "
        "need_dR, "
        "bool need_db, bool has_weight) -> (Tensor dx, Tensor dR, Tensor db)");
    m.def("dropout_mask(Tensor seed, int row_offset, int rows, int cols, float p) -> Tensor");
    m.def("gram_rows(Tensor x, Tensor w) -> Tensor");
    m.def("isa() -> str");
    m.def("panel_columns() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(loraxs_cpu, CPU, m) {
    m.impl("forward", TORCH_BOX(&loraxs::forward));
    m.impl("backward", TORCH_BOX(&loraxs::backward));
    m.impl("dropout_mask", TORCH_BOX(&loraxs::dropout_mask));
    m.impl("gram_rows", TORCH_BOX(&loraxs::gram_product));
}

// Packed weights among the arguments make the dispatcher look here first.
STABLE_TORCH_LIBRARY_IMPL(loraxs_cpu, MkldnnCPU, m) {
    m.impl("forward", TORCH_BOX(&loraxs::forward));
    m.impl("backward", TORCH_BOX(&loraxs::backward));
}

STABLE_TORCH_LIBRARY_IMPL(loraxs_cpu, CompositeExplicitAutograd, m) {
    m.impl("isa", TORCH_BOX(&loraxs::isa));
    m.impl("panel_columns", TORCH_BOX(&loraxs::panel_columns));
}
