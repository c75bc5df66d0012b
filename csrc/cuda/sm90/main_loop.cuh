// The main loop: one thread feeds a ring of tiles by TMA, two warpgroups multiply them.
//
// A tile of X is wanted by all CTAs of the cluster: each brings a quarter of its rows to all of
// them (multicast), so X passes through L2 once per cluster. A slot of the ring is free when the
// consumers of all CTAs have used it.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "tiles.cuh"

namespace loraxs::gpu::sm90 {

using Barrier = cutlass::arch::ClusterTransactionBarrier;

struct Maps {
    const CUtensorMap &x, &w, &a, &b;
};

__device__ inline void load_box(const CUtensorMap& map, uint64_t* barrier, void* to, int column,
                                int row) {
    SM90_TMA_LOAD_2D::copy(&map, barrier, uint64_t(TMA::CacheHintSm90::EVICT_NORMAL), to, column,
                           row);
}

// A tile of W or B', `kBN` rows at n0, 64 columns at k0, into slot `slot` of the ring of W.
template <class T>
__device__ void load_wide(const CUtensorMap& map, uint64_t* barrier, Shared<T>& s, int slot, int n0,
                          int k0) {
    auto* to = s.w + slot * Shared<T>::kW;
    if constexpr (T::kForward) {
        load_box(map, barrier, to, k0, n0);
    } else {
        for (int n = 0; n < kBN; n += kBlock) load_box(map, barrier, to + n * kBK, n0 + n, k0);
    }
}

// One thread brings all tiles of X, W (if the CTA multiplies it) and the CTA's rows of A.
template <class T>
__device__ void produce(const Problem& p, const Maps& maps, Shared<T>& s, const Place& at,
                        bool with_w) {
    constexpr int kQuarter = kBM / kCluster;
    const int steps = ceil_div(p.k, kBK), l0 = at.rank * T::kBR;
    const uint32_t bytes = sizeof(typename T::Element) *
                           (Shared<T>::kX + Shared<T>::kA + (with_w ? Shared<T>::kW : 0));
    for (int step = 0; step < steps; ++step) {
        const int slot = step % kStages, k0 = step * kBK;
        Barrier::wait(s.empty + slot, step / kStages % 2 ^ 1);
        uint64_t* full = s.full + slot;
        Barrier::arrive_and_expect_tx(full, bytes);
        SM90_TMA_LOAD_MULTICAST_2D::copy(&maps.x, full, (1 << kCluster) - 1,
                                         uint64_t(TMA::CacheHintSm90::EVICT_NORMAL),
                                         s.x + slot * Shared<T>::kX + at.rank * kQuarter * kBK, k0,
                                         at.row0() + at.rank * kQuarter);
        load_box(maps.a, full, s.a + slot * Shared<T>::kA, T::kForward ? k0 : l0,
                 T::kForward ? l0 : k0);
        if (with_w) load_wide(maps.w, full, s, slot, at.col0(), k0);
    }
}

// acc += X W^T (if the CTA multiplies W), q = the CTA's columns of X A^T, over all of K. The wgmmas
// of a step run while the next step's are issued; then its slot is handed back, by each warp to
// each CTA of the cluster.
template <bool kWithW, class T, class Acc, class Q>
__device__ void multiply(const Problem& p, Shared<T>& s, Acc& acc, Q& q) {
    typename T::template Mma<kBN> mma_w;
    typename T::template Mma<T::kBR> mma_a;
    const auto slice_w = mma_w.get_slice(threadIdx.x);
    const auto slice_a = mma_a.get_slice(threadIdx.x);
    const auto x = slice_w.make_fragment_A(slice_w.partition_A(s.xs()));
    const auto w = slice_w.make_fragment_B(slice_w.partition_B(s.ws()));
    const auto a = slice_a.make_fragment_B(slice_a.partition_B(s.as()));
    const int steps = ceil_div(p.k, kBK), lane = threadIdx.x % 32;
    mma_w.accumulate_ = GMMA::ScaleOut::Zero;
    mma_a.accumulate_ = GMMA::ScaleOut::Zero;
    for (int step = 0; step < steps; ++step) {
        const int slot = step % kStages;
        Barrier::wait(s.full + slot, step / kStages % 2);
        warpgroup_fence_operand(acc);
        warpgroup_fence_operand(q);
        warpgroup_arrive();
        CUTE_UNROLL
        for (int k = 0; k < kBK / 16; ++k) {
            if constexpr (kWithW) gemm(mma_w, x(_, _, k, slot), w(_, _, k, slot), acc);
            gemm(mma_a, x(_, _, k, slot), a(_, _, k, slot), q);
            mma_w.accumulate_ = GMMA::ScaleOut::One;
            mma_a.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
        warpgroup_wait<1>();
        if (step > 0 && step - 1 + kStages < steps && lane < kCluster) {
            arrive_remote(s.empty + (step - 1) % kStages, lane);
        }
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(acc);
    warpgroup_fence_operand(q);
}

}  // namespace loraxs::gpu::sm90
