// T = f Q R', the r x r product between shrink and expand (f: the fraction of s, see problem.h).
//
// Q is exact in tf32, and a float32 R is the sum of two tf32 numbers up to 2^-22, so two tf32
// products are as good as fp32; a 16-bit R is exact, and takes one.
//
// Cost of M rows: 2 M r^2 FLOPs per product (r rounded up to 8), times the distinct adapters among
// 16 rows; Q and T once, each core once per 64 rows of Q that it applies to.
#pragma once

#include "../problem.h"
#include "element.cuh"

namespace loraxs::gpu {

inline constexpr int kMaxRank = 256;
inline constexpr int kCoreRows = 64;  // rows of Q in shared memory
inline constexpr int kCoreL = 32;     // rows of a tile of R' in shared memory
inline constexpr int kCoreJ = 64;     // and its columns
inline constexpr int kCoreQPitch = kMaxRank + 8;

// Where element (l, j) of a tile of R' lies in shared memory: pairs of rows together, pairs
// permuted by the column. The loads of fragments (rows 2t and 2t + 1 of column g) share no bank,
// nor do stores along l; stores along j do two by two.
inline constexpr int kCoreTile = kCoreL * kCoreJ;
__device__ inline int core_place(int l, int j) {
    const int pair = l / 2 ^ (j % 4 * 4 | j / 4 % 4);
    return j * kCoreL + pair * 2 + l % 2;
}

template <class Element>
struct CoreShared {
    alignas(16) Element q[kCoreRows * kCoreQPitch];
    alignas(16) float core[2][kCoreTile];
    int ids[kCoreRows];  // of each row; `adapters` for those without one
};

// One thread's part of a tile of R', on its way from global to shared memory.
template <class Element, int kThreads>
struct CoreTile {
    static constexpr int kEach = ceil_div(kCoreL * kCoreJ, kThreads);
    float value[kEach];

    __device__ static bool along_l(const Problem& p) { return p.core_row == 1; }

    // The tile's row and column of this thread's i-th element: neighbours in memory for neighbours.
    __device__ static int2 place(bool along_l, int i) {
        const int e = i * kThreads + threadIdx.x;
        return along_l ? int2{e % kCoreL, e / kCoreL} : int2{e / kCoreJ, e % kCoreJ};
    }

    __device__ void load(const Problem& p, int adapter, int l0, int j0) {
        const int64_t first = adapter * p.core_adapter;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int2 at = place(along_l(p), i);
            const int l = l0 + at.x, j = j0 + at.y;
            value[i] = 0.f;
            if (at.x < kCoreL && at.y < kCoreJ && l < p.rank && j < p.rank) {
                const int64_t offset = first + l * p.core_row + j * p.core_col;
                value[i] = p.core_is_fp32 ? static_cast<const float*>(p.core)[offset]
                                          : float(static_cast<const Element*>(p.core)[offset]);
            }
        }
    }

    __device__ void store(const Problem& p, float* tile) const {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int2 at = place(along_l(p), i);
            if (at.x < kCoreL && at.y < kCoreJ) {
                tile[core_place(at.x, at.y)] = value[i];
            }
        }
    }
};

// What one warp does with a tile of R': 16 rows of Q times those blocks of 8 columns whose number
// is `part` modulo `parts` (a power of two). `low`, `high`: whether the thread's rows g and g + 8
// take the product; the others keep what they have, whatever is in this adapter's core.
struct CorePart {
    bool low, high;
    int part, parts;
    int depth, width;  // rows and columns of R' that are there
};

__device__ inline void tf32_product(float (&d)[4], const float2& low, const float2& high, float b0,
                                    float b1) {
    const auto bits = [](float x) { return __float_as_uint(x); };
    cute::SM80_16x8x8_F32TF32TF32F32_TN::fma(d[0], d[1], d[2], d[3], bits(low.x), bits(high.x),
                                             bits(low.y), bits(high.y), bits(b0), bits(b1), d[0],
                                             d[1], d[2], d[3]);
}

// acc += Q R' for 16 rows of Q at `q` and one tile of R'. The instruction's k = t and t + 4 are
// rows 2t and 2t + 1, so that neighbours are loaded together.
template <int kPitch, class Element, int kBlocks>
__device__ inline void multiply_core(float (&acc)[kBlocks][4], const Element* q, const float* tile,
                                     const Problem& p, const CorePart& c) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const auto tf32 = [](float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); };
    for (int l = 0; l < min(kCoreL, c.depth); l += 8) {
        const Element* at = q + g * kPitch + l + 2 * t;
        const float2 low = widen<Element>(*reinterpret_cast<const uint32_t*>(at));
        const float2 high = widen<Element>(*reinterpret_cast<const uint32_t*>(at + 8 * kPitch));
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
            if (8 * n >= c.width || (n & (c.parts - 1)) != c.part) continue;
            const float2 b =
                *reinterpret_cast<const float2*>(tile + core_place(l + 2 * t, 8 * n + g));
            float d[4] = {acc[n][0], acc[n][1], acc[n][2], acc[n][3]};
            tf32_product(d, low, high, tf32(b.x), tf32(b.y));
            if (p.core_is_fp32) {
                tf32_product(d, low, high, tf32(b.x - tf32(b.x)), tf32(b.y - tf32(b.y)));
            }
            for (int i = 0; i < 4; ++i) acc[n][i] = (i < 2 ? c.low : c.high) ? d[i] : acc[n][i];
        }
    }
}

// The ids of kCoreRows rows, to shared memory. One out of range is reported; it gets no adapter.
template <int kThreads>
__device__ inline void stage_ids(const Problem& p, int row0, int rows, int* ids) {
    for (int i = threadIdx.x; i < kCoreRows; i += kThreads) {
        const int64_t id = i >= rows ? -1 : p.ids ? p.ids[row0 + i] : 0;
        if (p.bad_id && (id < -1 || id >= p.adapters)) *p.bad_id = 1;
        ids[i] = id < 0 || id >= p.adapters ? p.adapters : int(id);
    }
}

// The smallest id above `id`; p.adapters if there is none. The same for all threads.
__device__ inline int next_adapter(const int* ids, int id, int none) {
    int found = none;
    for (int i = threadIdx.x % 32; i < kCoreRows; i += 32) {
        if (ids[i] > id) found = min(found, ids[i]);
    }
    return __reduce_min_sync(~0u, found);
}

template <class Element, int kThreads>
__device__ inline void stage_q(const Problem& p, int row0, int rows, Element* out) {
    const auto* q = static_cast<const Element*>(p.side) + row0 * p.side_row;
    const bool whole = has_vectors(p.side, p.side_row);
    const int vectors = round_up(p.rank, kCoreL) / kVector;
    for (int e = threadIdx.x; e < kCoreRows * vectors; e += kThreads) {
        const int row = e / vectors, l = e % vectors * kVector;
        const int count = row < rows ? p.rank - l : 0;
        *reinterpret_cast<Vector*>(out + row * kCoreQPitch + l) =
            load_vector(q + row * p.side_row + l, count, whole);
    }
}

// Columns j0 to j0 + 64 of T for the rows whose Q and ids are in shared memory. The tiles of R'
// that these rows need, adapter after adapter, pass through two buffers.
template <class Element, int kThreads>
__device__ inline void core_columns(const Problem& p, int row0, int rows, int j0,
                                    CoreShared<Element>& shared) {
    constexpr int kWarps = kThreads / 32;
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int tiles = rows <= 16 ? 1 : rows <= 32 ? 2 : 4;
    const int parts = kWarps >= 8 * tiles   ? 8
                      : kWarps >= 4 * tiles ? 4
                      : kWarps >= 2 * tiles ? 2
                                            : 1;
    const int tile_row = warp % tiles * 16, part = warp / tiles;
    const int low = shared.ids[tile_row + g], high = shared.ids[tile_row + g + 8];

    float acc[kCoreJ / 8][4] = {};
    CoreTile<Element, kThreads> tile;
    int adapter = next_adapter(shared.ids, -1, p.adapters), l0 = 0, buffer = 0;
    if (adapter < p.adapters) {
        tile.load(p, adapter, l0, j0);
        tile.store(p, shared.core[0]);
    }
    __syncthreads();
    while (adapter < p.adapters) {
        const bool last = l0 + kCoreL >= p.rank;
        const int next = last ? next_adapter(shared.ids, adapter, p.adapters) : adapter;
        const int next_l0 = last ? 0 : l0 + kCoreL;
        if (next < p.adapters) tile.load(p, next, next_l0, j0);
        const CorePart mine{low == adapter, high == adapter, part, parts, p.rank - l0, p.rank - j0};
        if (part < parts && __any_sync(~0u, mine.low || mine.high)) {
            multiply_core<kCoreQPitch>(acc, shared.q + tile_row * kCoreQPitch + l0,
                                       shared.core[buffer], p, mine);
        }
        buffer ^= 1;
        if (next < p.adapters) tile.store(p, shared.core[buffer]);
        __syncthreads();
        adapter = next, l0 = next_l0;
    }

    auto* out = static_cast<Element*>(p.t) + (row0 + tile_row + g) * p.t_row + j0 + 2 * t;
#pragma unroll
    for (int n = 0; n < kCoreJ / 8; ++n) {
        if (part >= parts || (n & (parts - 1)) != part || j0 + 8 * n >= p.t_cols) continue;
        for (int half = 0; half < 2; ++half) {
            if (tile_row + g + 8 * half >= rows) continue;
            *reinterpret_cast<uint32_t*>(out + 8 * half * p.t_row + 8 * n) =
                narrow<Element>(acc[n][2 * half] * p.fraction, acc[n][2 * half + 1] * p.fraction);
        }
    }
}

// T[row0 .. row0 + rows) = f Q R', from Q in global memory (p.side) to T in global memory; those
// beyond the last row are left out. With a core per row the distinct adapters of 64 rows are
// visited in ascending order. A row whose id is -1 or out of range gets T = 0. A core is never read
// for an id out of range. All threads call it; `shared` has CoreShared<Element>; a barrier stands
// before.
template <class Element, int kThreads>
__device__ __forceinline__ void core_of_rows(const Problem& p, int row0, int rows, void* shared) {
    auto& s = *static_cast<CoreShared<Element>*>(shared);
    const int end = min(row0 + rows, p.m);
    for (; row0 < end; row0 += kCoreRows) {
        const int here = min(end - row0, kCoreRows);
        stage_ids<kThreads>(p, row0, here, s.ids);
        stage_q<Element, kThreads>(p, row0, here, s.q);
        __syncthreads();
        for (int j0 = 0; j0 < p.t_cols; j0 += kCoreJ) {
            core_columns<Element, kThreads>(p, row0, here, j0, s);
        }
        __syncthreads();
    }
}

}  // namespace loraxs::gpu
