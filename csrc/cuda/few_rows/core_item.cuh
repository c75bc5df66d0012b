// T = f Q R' for few rows: an item is kCoreColumns columns of T, of all rows or, with a core per
// row, of one row.
//
// All tiles of D wait for T, so what counts is the time from Q to T. Hence the columns are spread
// over CTAs, rows with their own cores too (64 cores one after the other would take longer than
// W); R' does not depend on Q, and is in shared memory before Q is waited for; what is left are
// M kCoreColumns r multiplications in fp32, too few for matrix instructions to matter.
//
// Cost: 2 M r^2 FLOPs in fp32; each core once per row that has it; M r elements of Q per item.
#pragma once

#include "parts.cuh"

namespace loraxs::gpu::few_rows {

inline constexpr int kMaxRank = 256;
inline constexpr int kCoreColumns = 32;  // a warp's lanes

// R' in fp32, [j][l] or [l][j] as it lies in global memory. With this pitch neither stores nor
// loads share a bank.
inline constexpr int kCorePitch = kMaxRank + 4;
inline constexpr int kQPitch = kMaxRank + 8;

template <class Tile>
struct CoreShared {
    alignas(16) float core[kCoreColumns * kCorePitch];
    alignas(16) typename Tile::Element q[Tile::kBM * kQPitch];
};

// Columns j0 .. j0 + kCoreColumns of an adapter's R', zeros beyond the rank, `depth` rows. A
// float32 core comes by cp.async: all of it is under way at once.
template <class Tile>
__device__ void load_core(const Problem& p, int64_t adapter, int j0, int depth, float* core) {
    const bool along_l = p.core_row == 1;
    const int64_t first = adapter * p.core_adapter;
#pragma unroll 8
    for (int e = threadIdx.x; e < kCoreColumns * depth; e += Tile::kThreads) {
        const int at = along_l ? e / depth : e % kCoreColumns;
        const int l = along_l ? e % depth : e / kCoreColumns, j = j0 + at;
        const bool inside = l < p.rank && j < p.rank;
        const int64_t from = inside ? first + l * p.core_row + j * p.core_col : 0;
        float* to = core + (along_l ? at * kCorePitch + l : l * kCoreColumns + at);
        if (p.core_is_fp32) {
            cute::SM80_CP_ASYNC_CACHEALWAYS_ZFILL<float>::copy(
                static_cast<const float*>(p.core)[from], *to, inside);
        } else {
            *to = inside ? float(static_cast<const typename Tile::Element*>(p.core)[from]) : 0.f;
        }
    }
}

template <class Tile>
__device__ void load_q(const Problem& p, int row0, int rows, int depth, typename Tile::Element* q) {
    const auto* side = static_cast<const typename Tile::Element*>(p.side);
    const bool whole = has_vectors(side, p.side_row);
    const int vectors = ceil_div(depth, kVector);
    for (int e = threadIdx.x; e < rows * vectors; e += Tile::kThreads) {
        const int row = e / vectors, l = e % vectors * kVector;
        *reinterpret_cast<Vector*>(q + row * kQPitch + l) =
            load_vector(side + (row0 + row) * p.side_row + l, p.rank - l, whole);
    }
}

// A warp has every kWarps-th row, a lane one column.
template <class Tile>
__device__ void multiply_core(const Problem& p, int row0, int rows, int j0, int depth,
                              const CoreShared<Tile>& shared) {
    using Element = typename Tile::Element;
    constexpr int kWarps = Tile::kThreads / 32, kEach = Tile::kBM / kWarps;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool along_l = p.core_row == 1;
    float t[kEach] = {};
#pragma unroll 2
    for (int l = 0; l < depth; l += 4) {
        float4 core;
        if (along_l) {
            core = *reinterpret_cast<const float4*>(shared.core + lane * kCorePitch + l);
        } else {
            const float* at = shared.core + l * kCoreColumns + lane;
            core = {at[0], at[kCoreColumns], at[2 * kCoreColumns], at[3 * kCoreColumns]};
        }
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int row = warp + i * kWarps;
            if (row >= rows) break;
            const uint2 q = *reinterpret_cast<const uint2*>(shared.q + row * kQPitch + l);
            const float2 low = widen<Element>(q.x), high = widen<Element>(q.y);
            t[i] = fmaf(low.x, core.x, fmaf(low.y, core.y, t[i]));
            t[i] = fmaf(high.x, core.z, fmaf(high.y, core.w, t[i]));
        }
    }
    auto* out = static_cast<Element*>(p.t) + j0 + lane;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int row = warp + i * kWarps;
        if (row < rows && j0 + lane < p.t_cols) {
            out[(row0 + row) * p.t_row] = Element(t[i] * p.fraction);
        }
    }
}

// A row whose id is -1 or out of range gets T = 0, and no core is read; an id out of range is
// reported.
template <class Tile>
__device__ void core_item(const Problem& p, int item, void* memory) {
    auto& shared = *static_cast<CoreShared<Tile>*>(memory);
    const int columns = ceil_div(p.t_cols, kCoreColumns);
    const int j0 = item % columns * kCoreColumns;
    const int row0 = p.ids ? item / columns : 0, rows = p.ids ? 1 : p.m;
    const int64_t id = p.ids ? p.ids[row0] : 0;
    const bool there = id >= 0 && id < p.adapters;
    if (!there && id != -1 && p.bad_id && item % columns + threadIdx.x == 0) *p.bad_id = 1;

    const int depth = there ? round_up(p.rank, 4) : 0;
    load_core<Tile>(p, id, j0, depth, shared.core);
    cute::cp_async_fence();
    const Flags flags(p);
    wait(flags.q_ready, p.slices);
    load_q<Tile>(p, row0, rows, depth, shared.q);
    cute::cp_async_wait<0>();
    __syncthreads();
    multiply_core<Tile>(p, row0, rows, j0, depth, shared);
    release(flags.t_ready);
}

}  // namespace loraxs::gpu::few_rows
