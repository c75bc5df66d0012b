// D = s' (acc + T B'^T) + bias + base, from accumulators to global memory.
//
// The tile of D passes through shared memory (where X and T were), so that rows are stored in whole
// vectors; a tile of base comes the same way. Each thread adds to it where it has accumulators.
#pragma once

#include "side_path.cuh"

namespace loraxs::gpu::sm90 {

// acc += T B'^T for the blocks of 64 columns that the rank has. Waits for B'.
template <class T, class Acc>
__device__ void expand(const Problem& p, Shared<T>& s, Acc& acc) {
    typename T::template Mma<kBN> mma;
    const auto slice = mma.get_slice(threadIdx.x);
    const auto t = slice.make_fragment_A(slice.partition_A(s.ts()));
    const auto b = slice.make_fragment_B(slice.partition_B(s.ws()));
    const int blocks = ceil_div(p.rank, kBlock);
    mma.accumulate_ = GMMA::ScaleOut::One;
    for (int block = 0; block < blocks; ++block) {
        Barrier::wait(s.expand + block, 0);
        warpgroup_fence_operand(acc);
        warpgroup_arrive();
        CUTE_UNROLL
        for (int k = 0; k < kBlock / 16; ++k) {
            gemm(mma, t(_, _, k, block), b(_, _, k, block), acc);
        }
        warpgroup_commit_batch();
        warpgroup_wait<0>();
        warpgroup_fence_operand(acc);
    }
}

// One warp's 16 rows of the tile, row by row, 32 vectors in a row.
template <class T, class Each>
__device__ void for_each_vector(const Problem& p, const Place& at, Shared<T>& s, Each each) {
    const auto region = s.ds();
    const int lane = threadIdx.x % 32, column = lane * kVector;
    const int count = p.n - at.col0() - column;
    for (int i = 0; i < 16; ++i) {
        const int row = threadIdx.x / 32 * 16 + i;
        if (at.row0() + row >= p.m || count <= 0) continue;
        each(at.row0() + row, at.col0() + column, count,
             *reinterpret_cast<Vector*>(&region(row, column % kBlock, column / kBlock)));
    }
}

template <class T, class Acc>
__device__ void store_tile(const Problem& p, Shared<T>& s, const Place& at, const Acc& acc) {
    using Element = typename T::Element;
    const auto region = s.ds();
    const auto slice = typename T::template Mma<kBN>{}.get_slice(threadIdx.x);
    const auto places = slice.partition_C(make_identity_tensor(Shape<Int<kBM>, Int<kBN>>{}));
    // The warpgroup's rows of T are no longer read.
    if (threadIdx.x < 128) {
        cutlass::arch::NamedBarrier::sync(128, 1);
    } else {
        cutlass::arch::NamedBarrier::sync(128, 2);
    }
    if (p.base) {
        const auto* base = static_cast<const Element*>(p.base);
        const bool whole = has_vectors(p.base, p.base_row);
        for_each_vector(p, at, s, [&](int row, int column, int count, Vector& v) {
            v = load_vector(base + row * p.base_row + column, count, whole);
        });
        __syncwarp();
    }
    CUTE_UNROLL
    for (int v = 0; v < size(acc); v += 2) {
        const int row = get<0>(places(v)), column = get<1>(places(v));
        auto* pair = reinterpret_cast<uint32_t*>(&region(row, column % kBlock, column / kBlock));
        float2 two{acc(v) * p.after, acc(v + 1) * p.after};
        if (p.bias) two.x += s.bias[column], two.y += s.bias[column + 1];
        if (p.base && at.row0() + row < p.m && at.col0() + column < p.n) {
            const float2 more = widen<Element>(*pair);
            two.x += more.x, two.y += more.y;
        }
        *pair = narrow<Element>(two.x, two.y);
    }
    __syncwarp();
    auto* d = static_cast<Element*>(p.d);
    const bool whole = has_vectors(p.d, p.d_row);
    for_each_vector(p, at, s, [&](int row, int column, int count, Vector& v) {
        store_vector(d + row * p.d_row + column, v, count, whole);
    });
}

}  // namespace loraxs::gpu::sm90
