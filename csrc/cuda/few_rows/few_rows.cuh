// Few rows (M <= 64: decode, small batches): W is read once, at memory speed.
//
//     D = X W^T + bias + base + s (Q R') B'^T,   Q = X A^T       (problem.h: roles, backward)
//
// Cost: 2 M8 (N K + r K + N r) FLOPs (M8: M rounded up to 8; the ranges of K and r up to 16), which
// are hidden. Bytes: W, A, B' once; base, D, Q once. Again, from L2: X by every tile of D and slice
// of Q, (N / BN + r / BN) M K elements; the sums of parts, 2 x 4 bytes for each part of D and Q; T
// by every tile; with a core per row, each row its own. For M = 1, K = N = 4096, r = 64 with 4
// parts of D and 8 of Q that is 34.6 MB once, 0.5 MB of X, 0.26 MB of sums: 1.02 x the least.
// For M = 64 it is 35.6 MB once, and from L2 17 MB of X and 8.4 MB of sums.
//
// Bytes in flight. By Little's law an SM that gets its part of the bandwidth needs bandwidth x
// latency / SMs under way: at 0.8 us under load that is 20 KB on a H100 (3.35 TB/s, 132 SMs), 15 KB
// on an A100 (2.0 TB/s, 108), 29 KB on a H200 (4.8 TB/s, 132). A CTA has kStages - 1 = 3 steps of
// 16 KB of W ahead, 48 KB, and takes 80 KB (M <= 16) or 96 KB (M <= 64) of shared memory with X:
// two fit an SM of 228 KB, and of 164 KB for M <= 16. So 48 to 96 KB are under way, more than 1.6
// times what is needed, and half of the CTAs may be in their first wait, their epilogue, or waiting
// for T while the memory is still busy.
//
// Items, in the order of tickets: db; parts of slices of Q; columns of T; parts of tiles of D; dR.
//
// * `parts` CTAs share the K of a tile of BN columns of D, so that all SMs are busy whatever N is.
//   The last one to arrive adds the parts up, adds T B'^T, bias and base, and writes D.
// * Q is short (r rows of A) but all tiles wait for it, so it is cut finer: parts of 512 columns,
//   one round trip to memory each. T: see core_item.cuh.
//
// The critical path for M = 1, K = N = 4096, r = 64 on 132 SMs, assuming 0.8 us for a load from
// memory under load, 0.4 us for one from L2 or an atomic (numbers assumed, not measured):
//   W: 256 items of 128 KB, two per SM: ticket 0.4, first load 0.8, 34.6 MB at 3.0 TB/s 11.5; the
//      K loops end at about 12.7 us.
//   T: ticket 0.4; A and X, the 4 steps of a part 1.6; sums and counter 0.8; adding 8 parts 0.4;
//      Q and flag 0.8; core item: flag seen 0.4, Q 0.4, product 0.4, T and flag 0.8: 6.0 us.
// So T is there 6 us before the first tile asks for it. With Q's K cut like W's, in 4 parts, Q
// would end with W, and the other 3.6 us would come on top. Where W is smaller than about 15 MB the
// path of T is the longer one.
//
// What the host computes (geometry.cpp; plan.py chooses parts):
//   BM = kBM, so row_blocks = 1; col_tiles = ceil(N / BN), or 0 without D; slices = ceil(r / BN).
//   parts in 1 .. ceil(K / BK), 1 without W; best about SMs / col_tiles, twice that for M <= 16.
//   slice_parts in 1 .. ceil(K / BK), best ceil(K / 512).
//   core_items = (with ids: M, else 1) x ceil(t_cols / 32), 0 without D; t_cols: r up to 16.
//   gemm_items = slices slice_parts + core_items + col_tiles parts.
//   flag_count = 4 + 2 + dr_items / chunks + col_tiles + slices. chunks = 1 will do (M <= 64).
//   partial, in floats: (chunks > 1: dr_items DI DJ) + (parts > 1: col_tiles parts BM BN)
//   + (slice_parts > 1: slices slice_parts BM BN). side and t are always there.
#pragma once

#include "core_item.cuh"

namespace loraxs::gpu::few_rows {

// What a tile's end will read, on its way to L2: a tile that ends last pays for no load from
// memory.
template <class Tile>
__device__ void prefetch_output(const Problem& p, int n0) {
    using Element = typename Tile::Element;
    const auto prefetch = [&](const void* row, int64_t pitch) {
        const auto* at = static_cast<const Element*>(row) + threadIdx.x * pitch;
        if (row) asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
    };
    constexpr int kLine = 64;  // elements of 128 bytes
    for (int n = n0; n < min(n0 + Tile::kBN, p.n); n += kLine) {
        const auto* bias = static_cast<const Element*>(p.bias);
        const auto* base = static_cast<const Element*>(p.base);
        if (threadIdx.x < 1) prefetch(bias ? bias + n : bias, 0);
        if (threadIdx.x < p.m) prefetch(base ? base + n : base, p.base_row);
    }
}

// A tile of D from the sums of its parts: D = (before acc + T B'^T) after + bias + base. B' is on
// its way while the parts are added up and T is waited for.
template <class Tile>
__device__ void finish_tile(Accumulator<Tile>& acc, const Problem& p, const Part& part,
                            const Extent& there, int n0, typename Tile::Element* shared) {
    using Element = typename Tile::Element;
    prefetch_output<Tile>(p, n0);
    const Operands<Tile> o{weights<Tile>(p.b, p.b_row, p.n, p.rank),
                           matrix<Element>(p.t, p.t_row, p.m, p.t_cols), p.n, n0, p.t_cols};
    stream<Tile>(acc, o, 0, ceil_div(p.t_cols, Tile::kBK), shared, [&] {
        add_parts<Tile>(acc, part, there);
        for_each_pair<Tile>(acc, there,
                            [&](float (&two)[2], int) { two[0] *= p.before, two[1] *= p.before; });
        wait(Flags(p).t_ready, p.core_items);
    });
    for_each_pair<Tile>(acc, there,
                        [&](float (&two)[2], int) { two[0] *= p.after, two[1] *= p.after; });
    const Output<Element> d{static_cast<Element*>(p.d), p.d_row};
    store_tile<Tile>(acc, there, d, n0, p.bias, matrix<Element>(p.base, p.base_row, p.m, p.n),
                     shared);
}

// One part of a slice of Q, or of a tile of D: the same product, with A or with W.
template <class Tile>
__device__ void product_item(const Problem& p, bool slice, int item, int* slot,
                             typename Tile::Element* shared) {
    using Element = typename Tile::Element;
    const Part part = part_of<Tile>(p, slice, item);
    const int n = slice ? p.rank : p.n, n0 = part.tile * Tile::kBN;
    const Extent there{p.m, min(n - n0, Tile::kBN)};
    const void* data = slice ? p.a : p.w;
    Accumulator<Tile> acc = {};
    if (data) {
        const Operands<Tile> o{weights<Tile>(data, slice ? p.a_row : p.w_row, n, p.k),
                               matrix<Element>(p.x, p.x_row, p.m, p.k), n, n0, p.k};
        const int64_t steps = ceil_div(p.k, Tile::kBK);
        stream<Tile>(acc, o, int(steps * part.part / part.parts),
                     int(steps * (part.part + 1) / part.parts), shared, [] {});
    }
    if (!deliver<Tile>(acc, part, there, slot)) return;
    if (!slice) return finish_tile<Tile>(acc, p, part, there, n0, shared);
    add_parts<Tile>(acc, part, there);
    const Output<Element> q{static_cast<Element*>(p.side), p.side_row};
    store_tile<Tile>(acc, there, q, n0, nullptr, Matrix<Element>{}, shared);
    release(Flags(p).q_ready);
}

template <class Tile>
__device__ void one_item(const Problem& p, int item, int* slot, void* shared) {
    using Element = typename Tile::Element;
    if constexpr (Tile::kDirection == Direction::kBackward) {
        if (item < p.db_items) return bias_gradient<Element, Tile::kThreads>(p, item, shared);
        item -= p.db_items;
        if (item >= p.gemm_items) {
            const Flags flags(p);
            wait(flags.q_ready, p.slices);
            return core_gradient<Element, Tile::kThreads>(p, item - p.gemm_items, flags.gradients,
                                                          shared);
        }
    }
    const int slice_items = p.slices * p.slice_parts;
    const bool slice = item < slice_items;
    if (!slice && item < slice_items + p.core_items) {
        return core_item<Tile>(p, item - slice_items, shared);
    }
    product_item<Tile>(p, slice, slice ? item : item - slice_items - p.core_items, slot,
                       static_cast<Element*>(shared));
}

template <class Tile>
__device__ void run(const Problem& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ int slot;
    one_item<Tile>(p, draw(p.flags, &slot), &slot, shared);
    leave(p.flags, p.flag_count, gridDim.x, &slot);
}

// One CTA does one item.
template <class Tile>
constexpr Kernel describe(const char* name, void (*function)(Problem)) {
    constexpr int kThreads = Tile::kThreads;
    constexpr int kShared = Tile::kStreamBytes;
    static_assert(sizeof(CoreShared<Tile>) <= kShared);
    static_assert(sizeof(GradientShared<typename Tile::Element>) <= kShared);
    static_assert(sizeof(BiasShared<kThreads>) <= kShared);
    static_assert(kShared <= 99 * 1024);  // of sm_86, sm_89 and sm_120
    return {.name = name,
            .function = reinterpret_cast<const void*>(function),
            .family = Family::kFewRows,
            .element = std::is_same_v<typename Tile::Element, BFloat16> ? Element::kBFloat16
                                                                        : Element::kFloat16,
            .direction = Tile::kDirection,
            .min_arch = 80,
            .exact_arch = false,
            .aligned = false,  // each matrix for itself: vectors where its rows allow it
            .max_rows = Tile::kBM,
            .max_rank = kMaxRank,
            .threads = kThreads,
            .cluster = 1,
            .shared = kShared,
            .bm = Tile::kBM,
            .bn = Tile::kBN,
            .bk = Tile::kBK,
            .br = Tile::kBN,
            .cr = 16,
            .di = kDI,
            .dj = kDJ,
            .dm = kDM,
            .db_columns = kDbColumns,
            .maps = 0,
            .tensor_maps = nullptr};
}

}  // namespace loraxs::gpu::few_rows

// The kernels of one element type and direction. An entry point's name is its kernel's.
#define LORAXS_FEW_ROWS_KERNEL(NAME, TILE)                          \
    extern "C" __global__ void __launch_bounds__(TILE::kThreads, 2) \
        NAME(const __grid_constant__ loraxs::gpu::Problem p) {      \
        loraxs::gpu::few_rows::run<TILE>(p);                        \
    }
