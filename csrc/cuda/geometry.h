// From sizes and a kernel to everything about a launch that does not depend on addresses: items,
// grid, flags, scratch. No CUDA, no tensors.
#pragma once

#include "kernel.h"

namespace loraxs::gpu {

// What a pass asks for, in the names of problem.h.
struct Sizes {
    int64_t m = 0, n = 0, k = 0, rank = 0, adapters = 1;
    bool has_d = false, need_dr = false, need_db = false;
    bool has_w = false, per_row = false;
    bool has_side = false;  // Q is wanted by the caller
};

// How the plan cuts it: see problem.h.
struct Split {
    int64_t chunks = 1, parts = 1, group = 1;
};

struct Geometry {
    int32_t t_cols, row_blocks, col_tiles, slices;
    int32_t slice_parts, core_items;  // few rows
    int32_t db_items, gemm_items, dr_items, flag_count;
    int64_t grid;     // CTAs
    bool needs_side;  // Q or P is stored, for the other CTAs or for dR
    bool needs_t;
    int64_t side_cols;  // pitch of a scratch P: whole 16-byte vectors
    int64_t partial;    // floats
};

// Throws std::runtime_error, naming the argument: a size out of the kernel's range, a split that
// its family does not know, or so many items that an int32 does not hold them.
Geometry geometry(const Kernel& kernel, const Sizes& sizes, const Split& split);

// s = fraction * after, before * after = 1; see problem.h.
struct Scaling {
    float fraction, before, after;
};
Scaling split_scaling(double s);

}  // namespace loraxs::gpu
