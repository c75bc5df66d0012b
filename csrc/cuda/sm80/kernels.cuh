// The training kernels of sm_80 and later: multistage cp.async, ldmatrix, mma.sync.
//
//     D = X W^T + bias + base + s ((X A^T) R') B'^T     and in the backward, same launch, dR and db
//
// Two families (see problem.h for the items of a launch):
//
// * ride-along, rank <= 16: every tile computes its own Q beside X W^T, in the same loop along K.
// No
//   handover, 2 * 128 K 16 + 2 * 128 r^2 FLOPs per tile again. One core for all rows.
// * ticket, rank <= 256: slices of 64 columns of Q are items of their own, ahead of their block's
//   tiles, which take T after their loop along K, when it is nearly always there. Nothing is
//   computed twice; X is read once more per slice, T goes to memory and back.
//
// Cost: 2 M N K + 2 M K r + 2 M N r FLOPs (r rounded up to 16 or 8, where it is the depth to 16 in
// ride-along and 32 in ticket), plus core.cuh, plus gradient.cuh; X and W once per tile, D once.
#pragma once

#include "../device/core.cuh"
#include "../device/gradient.cuh"
#include "../device/sync.cuh"
#include "../kernel.h"
#include "epilogue.cuh"

namespace loraxs::gpu::sm80 {

inline constexpr int kSlice = 64;   // columns of Q of an item (ticket)
inline constexpr int kNarrow = 16;  // columns of Q of a tile (ride-along)
inline constexpr int kCR = kBK;     // columns of T are a multiple of it

// What a tile of the ride-along family keeps in shared memory between its loop and its epilogue.
template <class Element, Major kRight>
struct NarrowSide {
    static constexpr int kQPitch = kNarrow + 8;
    using T = Tile<Element, Major::kK, kBM, kNarrow>;
    using B = Tile<Element, kRight, kBN, kNarrow>;
    alignas(16) Element t[T::kSize];
    alignas(16) Element b[B::kSize];
    alignas(16) Element q[kBM * kQPitch];
    alignas(16) float core[kCoreTile];
};

template <class Element_, Direction kDirection, bool kAligned>
struct Items {
    using Element = Element_;
    // W, A and B' are the forward's operands transposed: their rows are contiguous, not their
    // columns.
    static constexpr Major kRight = kDirection == Direction::kForward ? Major::kK : Major::kRows;
    using TilePass = Pass<Element, kRight, true, 0>;
    using SlicePass = Pass<Element, kRight, false, kSlice>;
    using RidePass = Pass<Element, kRight, true, kNarrow>;
    using SidePass = Pass<Element, kRight, false, kNarrow>;
    using Left = typename TilePass::Left;
    using Right = typename TilePass::Right;
    using Narrow = NarrowSide<Element, kRight>;
    using Wide = Warps<Element, kBN>;

    static constexpr int kShared = cute::max(
        cute::max(RidePass::kShared, SlicePass::kShared, kEpilogueShared), int(sizeof(Narrow)),
        cute::max(int(sizeof(CoreShared<Element>)), int(sizeof(GradientShared<Element>)),
                  int(sizeof(BiasShared<kThreads>))));

    const Problem& p;
    void* shared;
    int* slot;

    CUTE_DEVICE Operand<Element> x() const {
        return operand<Element>(p.x, p.x_row, p.m, p.k, Major::kK);
    }
    CUTE_DEVICE Operand<Element> w() const {
        return operand<Element>(p.w, p.w_row, p.n, p.k, kRight);
    }
    CUTE_DEVICE Operand<Element> a() const {
        return operand<Element>(p.a, p.a_row, p.rank, p.k, kRight);
    }
    CUTE_DEVICE Operand<Element> b() const {
        return operand<Element>(p.b, p.b_row, p.n, p.rank, kRight);
    }
    CUTE_DEVICE Operand<Element> t() const {
        return operand<Element>(p.t, p.t_row, p.m, p.t_cols, Major::kK);
    }

    // A slice of Q. Who delivers the last one of a row block computes its T.
    CUTE_DEVICE void slice(int row_block, int slice) const {
        const int row0 = row_block * kBM, rank0 = slice * kSlice;
        auto q = Warps<Element, kSlice>::zeros();
        shrink<SlicePass>(q, row0, rank0);
        store_side<Element, kSlice>(p, q, row0, rank0);
        if (p.dr) release(p.flags + kPublished);
        if (p.col_tiles == 0) return;
        int* ready = p.flags + kFixedFlags + row_block;
        if (arrive(ready + p.row_blocks, slot) == p.slices - 1) {
            core_of_rows<Element, kThreads>(p, row0, kBM, shared);
            release(ready);
        }
    }

    // q = X A^T for columns rank0 and on.
    template <class Narrow_, class Acc>
    CUTE_DEVICE void shrink(Acc& q, int row0, int rank0) const {
        const auto x = this->x(), a = this->a();
        Loader<Left, kAligned> load_x(x, row0);
        Loader<typename Narrow_::Side, false> load_a(a, rank0);
        Narrow_ pass(shared);
        pass.run(q, q, p.rank - rank0, ceil_div(p.k, kBK), [&](int stage) {
            load_x.next(pass.left(stage));
            load_a.next(pass.side(stage));
        });
    }

    // A tile of D that takes its rows of T from global memory. T B'^T is the end of the loop along
    // K: its first tiles are copied while the last ones of X W^T are multiplied.
    CUTE_DEVICE void tile(int row_block, int col_tile) const {
        const int row0 = row_block * kBM, col0 = col_tile * kBN;
        const int steps = p.w ? ceil_div(p.k, kBK) : 0;
        const auto x = this->x(), w = this->w(), t = this->t(), b = this->b();
        Loader<Left, kAligned> load_x(x, row0);
        Loader<Right, kAligned> load_w(w, col0);
        Loader<Left, true> load_t(t, row0);
        Loader<Right, false> load_b(b, col0);
        TilePass pass(shared);
        auto acc = Wide::zeros();
        const auto copy = [&](int stage) {
            load_x.next(pass.left(stage));
            load_w.next(pass.right(stage));
        };
        const auto tail = [&](int step, int stage) {
            if (step == 0) wait(p.flags + kFixedFlags + row_block, 1);
            load_t.next(pass.left(stage));
            load_b.next(pass.right(stage));
        };
        const auto begin = [&](int step) {
            if (step == 0) scale(acc, p.before);
        };
        pass.run(acc, acc, 0, steps, copy, ceil_div(p.t_cols, kBK), tail, begin);
        scale(acc, p.after);
        store_output<Element>(p, acc, row0, col0, static_cast<float*>(shared));
    }

    // A tile of D with its own Q; the first of a row block stores it.
    CUTE_DEVICE void riding_tile(int row_block, int col_tile) const {
        const int row0 = row_block * kBM, col0 = col_tile * kBN;
        auto acc = Wide::zeros();
        auto q = Warps<Element, kNarrow>::zeros();
        if (p.w) {
            ride(acc, q, row0, col0);
        } else {
            shrink<SidePass>(q, row0, 0);
        }
        if (col_tile == 0 && p.side) {
            store_side<Element, kNarrow>(p, q, row0, 0);
            if (p.dr) release(p.flags + kPublished);
        }
        expand_narrow(acc, q, col0);
        store_output<Element>(p, acc, row0, col0, static_cast<float*>(shared));
    }

    // acc = X W^T and q = X A^T in one loop.
    CUTE_DEVICE void ride(Accumulator<Element, kBN>& acc, Accumulator<Element, kNarrow>& q,
                          int row0, int col0) const {
        const auto x = this->x(), w = this->w(), a = this->a();
        Loader<Left, kAligned> load_x(x, row0);
        Loader<Right, kAligned> load_w(w, col0);
        Loader<typename RidePass::Side, false> load_a(a, 0);
        RidePass pass(shared);
        pass.run(acc, q, p.rank, ceil_div(p.k, kBK), [&](int stage) {
            load_x.next(pass.left(stage));
            load_w.next(pass.right(stage));
            load_a.next(pass.side(stage));
        });
    }

    // acc = after (before acc + T B'^T) with T = f Q R' of Q in registers.
    CUTE_DEVICE void expand_narrow(Accumulator<Element, kBN>& acc,
                                   const Accumulator<Element, kNarrow>& q, int col0) const {
        auto& s = *static_cast<Narrow*>(shared);
        const auto b = this->b();
        Loader<typename Narrow::B, false>(b, col0).next(s.b);
        cute::cp_async_fence();
        const auto at = Warps<Element, kNarrow>::places();
        CUTE_UNROLL
        for (int v = 0; v < cute::size(q); v += 2) {
            Element* to = s.q + cute::get<0>(at(v)) * Narrow::kQPitch + cute::get<1>(at(v));
            *reinterpret_cast<uint32_t*>(to) = narrow<Element>(q(v), q(v + 1));
        }
        CoreTile<Element, kThreads> core;
        core.load(p, 0, 0, 0);
        core.store(p, s.core);
        __syncthreads();

        const int row = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4, j = threadIdx.x % 4 * 2;
        float product[kNarrow / 8][4] = {};
        multiply_core<Narrow::kQPitch>(product, s.q + row * Narrow::kQPitch, s.core, p,
                                       {true, true, 0, 1, p.rank, p.rank});
        CUTE_UNROLL
        for (int i = 0; i < kNarrow / 4; ++i) {
            const float* two = product[i / 2] + i % 2 * 2;
            const int to = typename Narrow::T::Layout{}(row + g + i % 2 * 8, i / 2 * 8 + j);
            *reinterpret_cast<uint32_t*>(s.t + to) =
                narrow<Element>(two[0] * p.fraction, two[1] * p.fraction);
        }
        cute::cp_async_wait<0>();
        __syncthreads();
        Product<typename Narrow::T, typename Narrow::B> expand;
        expand.load(s.t, s.b, 0);
        scale(acc, p.before);
        expand.multiply(acc, 0);
        scale(acc, p.after);
        __syncthreads();
    }

    CUTE_DEVICE static void scale(Accumulator<Element, kBN>& acc, float by) {
        CUTE_UNROLL
        for (int v = 0; v < cute::size(acc); ++v) acc(v) *= by;
    }
};

// (row block, place in it) of an item: groups of row blocks, so that concurrent CTAs share W in L2,
// and in a group what comes first in its row block comes first.
__device__ inline int2 place_of(const Problem& p, int item, int per_block) {
    const int group = item / (p.group * per_block), first = group * p.group;
    const int height = min(p.row_blocks - first, p.group);
    const int within = item - group * p.group * per_block;
    return {first + within % height, within / height};
}

// Inlined, like all that it calls: a call would keep the parameters on the stack.
template <class Element, Direction kDirection, Family kFamily, bool kAligned>
__device__ __forceinline__ void run(const Problem& p) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ int slot;
    constexpr bool kRides = kFamily == Family::kRideAlong;
    const Items<Element, kDirection, kAligned> items{p, shared, &slot};
    const int ticket = p.flags ? draw(p.flags, &slot) : blockIdx.x;
    const int item = ticket - p.db_items;
    if (item < 0) {
        bias_gradient<Element, kThreads>(p, ticket, shared);
    } else if (item < p.gemm_items) {
        const int slices = kRides ? 0 : p.slices;
        const int2 at = place_of(p, item, slices + p.col_tiles);
        if constexpr (kRides) {
            items.riding_tile(at.x, at.y);
        } else if (at.y < slices) {
            items.slice(at.x, at.y);
        } else {
            items.tile(at.x, at.y - slices);
        }
    } else {
        wait(p.flags + kPublished, p.row_blocks * (kRides ? 1 : p.slices));
        core_gradient<Element, kThreads>(p, item - p.gemm_items,
                                         p.flags + kFixedFlags + 2 * p.row_blocks, shared);
    }
    if (p.flags) leave(p.flags, p.flag_count, gridDim.x, &slot);
}

template <class Element, Direction kDirection, Family kFamily, bool kAligned>
constexpr Kernel describe(const char* name, void (*function)(Problem)) {
    Kernel k{};
    k.name = name;
    k.function = reinterpret_cast<const void*>(function);
    k.family = kFamily;
    k.element =
        std::is_same_v<Element, BFloat16> ? gpu::Element::kBFloat16 : gpu::Element::kFloat16;
    k.direction = kDirection;
    k.min_arch = 80;
    k.aligned = kAligned;
    k.max_rank = kFamily == Family::kRideAlong ? kNarrow : kMaxRank;
    k.threads = kThreads;
    k.cluster = 1;
    k.shared = Items<Element, kDirection, kAligned>::kShared;
    k.bm = kBM, k.bn = kBN, k.bk = kBK;
    k.br = kFamily == Family::kRideAlong ? kNarrow : kSlice;
    k.cr = kCR;
    k.di = kDI, k.dj = kDJ, k.dm = kDM;
    k.db_columns = kDbColumns;
    return k;
}

}  // namespace loraxs::gpu::sm80

// An entry point of the kernels above, and what the host has to know about it.
#define LORAXS_SM80_KERNEL(name, element, direction, family, aligned)         \
    extern "C" __global__ void __launch_bounds__(loraxs::gpu::sm80::kThreads) \
        name(const __grid_constant__ loraxs::gpu::Problem p) {                \
        loraxs::gpu::sm80::run<element, direction, family, aligned>(p);       \
    }
