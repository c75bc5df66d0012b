#pragma once

#include "side_path.h"
#include "tensors.h"

namespace loraxs {

// out = base(x) + D_out( s * (q core(R)) rhs ),   q = D_in(x) lhs^T
//
// the frozen product plus a low-rank side path. Both passes of a LoRA-XS layer are this function:
// dX is the forward with W -> W^T, A -> B^T, R -> R^T, B -> A^T.
//
//              x     weight      lhs         core        rhs         dropout
//   forward    X     W [N, K]    A   [r, K]  R^T         B^T [r, N]  on x (D_in)
//   backward   dY    W^T [K, N]  B^T [r, N]  R           A   [r, K]  on the side output (D_out)
//
// Dropout is the one place where the roles do not swap: the forward masks an operand, the backward
// a result. It never touches the base product.
struct LowRankProblem {
    Tensor x;  // [M, K]; float32, bfloat16 or float16
    int64_t m = 0, k = 0, n = 0, rank = 0;
    DType dtype = DType::kFloat32;  // of x, q and out
    ConstMatrix x_view;
    // The base product: a weight packed in panels (see ProductArgs), packed by oneDNN, or dense,
    // each with an optional bias; a finished product `base`; or zero. A dense weight is streamed
    // where it lies for few rows, and packed on the way for more.
    const float* panels = nullptr;
    PackedWeight weight;
    OptionalTensor onednn_bias;
    ConstMatrix dense_weight;  // [N, K] or, if
    bool by_columns = false;   // so, [K, N]
    ConstMatrix bias;
    ConstMatrix base;         // [M, N], never modified
    ConstMatrix lhs;          // [rank, K]
    ConstMatrix rhs;          // [rank, N]
    PackedWeight lhs_packed;  // lhs as a linear weight [rank, K]; optional
    PackedWeight rhs_packed;  // rhs^T as a linear weight [N, rank]; optional
    Cores cores;
    bool core_transposed = false;  // false: q R^T, true: q R
    float scaling = 1.0f;
    const Dropout* dropout_in = nullptr;
    const Dropout* dropout_out = nullptr;
    bool want_out = true;
};

// Up to so many rows a dense weight is streamed.
constexpr int64_t kStreamedRows = kDotRows;

struct LowRankResult {
    OptionalTensor out;  // [M, N]; unset if not wanted
    Tensor q;            // [M, rank]
};

LowRankResult gemm_lowrank(LowRankProblem& problem);

}  // namespace loraxs
