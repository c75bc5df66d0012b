// What every kernel of this folder gets: one pass, in the roles of a forward.
//
//     D = X W^T + bias + base + s (Q R') B'^T,   Q = X A^T      X [M, K]  W [N, K]  D [M, N]
//     backward, same launch:  dR = s P^T Q with P its own X A^T and Q the forward's;  db = column
//     sums of X
//
// Forward: X is the input, W the weight, A, B' = B, R' = R^T. Backward: X is dL/dY, W, A and B' are
// W^T, B^T and A^T, R' = R: the same formula, by layouts alone.
//
// A launch is a list of items, one per CTA, in this order (the kernels of sm_90: one cluster has
// the tiles of D of its CTAs in one row block as one item, or one item of db or dR for each CTA):
//   1. `db_items` blocks of columns of db
//   2. for each row block of BM rows: `slices` slices of Q (BR columns each; the last slice of a
//      block to arrive computes T = s Q R'), then `col_tiles` tiles of D. Kernels that ride along
//      have no slices: each tile computes its own Q.
//   3. `dr_items` chunks of rows of DI x DJ tiles of each adapter's dR
// Items are drawn from a ticket, so an item only waits for lower tickets (device/sync.cuh).
#pragma once

#include <cstdint>

namespace loraxs::gpu {

// Plain data; tests read it too (tests/cuda_problem.py names the same fields in the same order).
// Pointers first. A null pointer is an operand that is not there. Strides are in elements; the
// inner stride of every matrix is 1, in the layout that the kernel's direction says.
struct Problem {
    // Read. X, W, base, A, B', bias and Q are of the kernel's element type (bf16 or fp16).
    const void* x;         // [M, K], row-major
    const void* w;         // [N, K]; forward: row-major, backward: column-major
    const void* base;      // [M, N], row-major
    const void* a;         // [rank, K]; forward: row-major, backward: column-major
    const void* core;      // [adapters, rank, rank], float or the element type; see core_row
    const void* b;         // [N, rank]; forward: row-major, backward: column-major
    const void* bias;      // [N]
    const void* q;         // [M, rank], row-major: the forward's Q, for dR
    const int64_t* ids;    // [M]: the adapter of each row, -1: none; null: all rows use core 0
    const int64_t* order;  // [M] rows sorted by adapter, or null: `ids` is all there is
    const int64_t*
        offsets;  // [adapters + 2]: where in `order` each adapter's rows begin, from -1 on
    // Written.
    void* d;         // [M, N], row-major
    void* side;      // [M, rank], row-major: Q (forward), P (backward; scratch)
    void* t;         // [M, t_cols], row-major scratch of the element type; zeros beyond the rank
    void* dr;        // [adapters, rank, rank], contiguous, of the core's type
    void* db;        // [K]
    float* partial;  // scratch: sums of chunks of dR; of parts of K (few rows)
    int* flags;      // zeros before and after the launch; see device/sync.cuh
    int* bad_id;     // set to 1 by who meets an id out of range; host memory

    int64_t x_row, w_row, base_row, a_row, b_row, d_row, side_row, t_row, q_row;
    int64_t core_adapter, core_row, core_col;  // R'(l, j) is core[l * core_row + j * core_col]

    int32_t m, n, k, rank, adapters;
    int32_t t_cols;  // the rank rounded up to a whole number of CR (kernel.h)
    int32_t core_is_fp32;
    int32_t row_blocks, col_tiles, slices;
    int32_t chunks;  // CTAs that share a tile of dR
    int32_t parts;   // CTAs that share a tile's K (few rows), otherwise 1
    int32_t group;   // row blocks whose items are walked together, so that they share W in L2
    int32_t db_items, gemm_items, dr_items;
    int32_t flag_count;
    int32_t slice_parts;  // CTAs that share a slice's K (few rows), otherwise 1
    int32_t core_items;   // CTAs that compute T (few rows), otherwise 0: the last slice does

    // s = fraction * after, before * after = 1, `after` a power of two (1 unless |s| > 1): T takes
    // fraction; the accumulator is scaled by before, gets T B'^T, and is scaled by after. A large s
    // would overflow T in fp16 where the product itself would not.
    float fraction, before, after;
    float dr_scale;  // s
};

}  // namespace loraxs::gpu
