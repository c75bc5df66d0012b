// The cluster kernels of sm_90a: a row block's tiles of D share one Q.
//
//     D = X W^T + bias + base + s (Q R') B'^T,   Q = X A^T;   dR = s P^T Q,  db = column sums of X
//
// The kCluster CTAs of a cluster sit side by side along N on one row block. Each accumulates its
// own 128 x 256 tile of X W^T and, from the same tiles of X, kBR = 16, 32 or 64 columns of Q. The
// cluster gathers Q through distributed shared memory, computes T = s Q R', a part each, gathers T,
// and each CTA adds T B'^T. There is no flag to wait for, and no second pass over X.
//
// Cost, with c = kCluster kBN = 1024 columns per cluster and R = kCluster kBR (the rank rounded up
// to 64, 128 or 256): per row block and cluster 2 kBM K (c + R) FLOPs, that is R / c more than the
// bare product (6 %, 12.5 % or 25 %), and 2 kBM R (c + r) for T B'^T and T (T twice with a float32
// R). L2 to shared memory per step of K: X once per cluster (multicast), W and A once, so
// 2 (kBM + c + R) kBK bytes per cluster. A second cluster on the same row block computes Q again:
// R (ceil(N / c)) columns in all, where the ticket scheme has r but waits for it.
//
// Which calls: sm_90a; rank up to 256; rows of X, W, A, B', Q, base and D at multiples of 16 bytes
// (TMA), hence rank and N multiples of 8 unless padded; D wanted; one R for all rows. Cores per row
// (p.ids), launches without D, and other alignments are the ticket kernel's.
//
// One cluster does one item, drawn from the ticket (or, without p.flags, its number): first db (an
// item per CTA of the cluster), then row blocks, then dR (likewise), which waits until all row
// blocks have stored P. So an item only waits for lower tickets; where there is no dR nobody waits,
// and there are no flags. A thread may leave before the cluster's barrier: only threads that are
// still there count.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "../device/core.cuh"
#include "../device/gradient.cuh"
#include "epilogue.cuh"

namespace loraxs::gpu::sm90 {

// B' blocks `from` to `to`, into the ring of W.
template <class T>
__device__ void load_expand(const Problem& p, const Maps& maps, Shared<T>& s, const Place& at,
                            int from, int to) {
    if (threadIdx.x != 0) return;
    for (int block = from; block < min(to, ceil_div(p.rank, kBlock)); ++block) {
        Barrier::arrive_and_expect_tx(s.expand + block,
                                      sizeof(typename T::Element) * Shared<T>::kW);
        load_wide(maps.b, s.expand + block, s, block, at.col0(), block * kBlock);
    }
}

template <class T>
__device__ void consume(const Problem& p, const Maps& maps, Shared<T>& s, const Place& at) {
    const bool has_tile = at.has_tile(p);
    for (int i = threadIdx.x; p.bias && i < kBN; i += kConsumers) {
        const auto* bias = static_cast<const typename T::Element*>(p.bias);
        s.bias[i] = at.col0() + i < p.n ? float(bias[at.col0() + i]) : 0.f;
    }
    auto acc = partition_fragment_C(typename T::template Mma<kBN>{}, Shape<Int<kBM>, Int<kBN>>{});
    auto q =
        partition_fragment_C(typename T::template Mma<T::kBR>{}, Shape<Int<kBM>, Int<T::kBR>>{});
    if (p.w && has_tile) {
        multiply<true>(p, s, acc, q);
    } else {
        clear(acc);
        multiply<false>(p, s, acc, q);
    }
    cluster_sync();  // every CTA of the cluster is through with its ring
    if (has_tile) load_expand(p, maps, s, at, 0, Shared<T>::kFirstLate);
    gather_q(p, s, at, q);
    cluster_arrive();
    if (p.dr_items > 0 && at.group == 0) release(p.flags + kPublished);

    clear(q);  // its registers take T
    if (p.core_is_fp32) {
        multiply_core<true>(p, s, at, q);
    } else {
        multiply_core<false>(p, s, at, q);
    }
    fence_async_cluster();
    if constexpr (Shared<T>::kFirstLate < T::kBlocks) {
        sync_consumers();  // Q is used up
        if (has_tile) load_expand(p, maps, s, at, Shared<T>::kFirstLate, T::kBlocks);
    }
    store_slice<T>(q, p.fraction, s.ts(), at.rank);
    share_slice<T>(s.ts(), at.rank, [](int, int, const Vector&) {});
    fence_async_cluster();
    cluster_sync();
    if (!has_tile) return;
    if (p.before != 1.f) {
        CUTE_UNROLL
        for (int v = 0; v < size(acc); ++v) acc(v) *= p.before;
    }
    expand(p, s, acc);
    store_tile(p, s, at, acc);
}

// The items beside the row blocks: one per CTA. The producer's threads have left.
template <class T>
__device__ void gradients(const Problem& p, int ticket, int db_clusters, int rank, void* shared) {
    using Element = typename T::Element;
    if (ticket < db_clusters) {
        const int item = ticket * kCluster + rank;
        if (item < p.db_items) bias_gradient<Element, kConsumers>(p, item, shared);
        return;
    }
    const int item = (ticket - db_clusters - p.gemm_items) * kCluster + rank;
    if (item >= p.dr_items) return;
    wait(p.flags + kPublished, p.row_blocks * kCluster);
    __builtin_assume(p.ids == nullptr && p.order == nullptr);  // the host sees to that
    int* counters = p.flags + kFixedFlags + 2 * p.row_blocks;
    core_gradient<Element, kConsumers>(p, item, counters, shared);
}

template <class T>
__device__ int start(const Problem& p, Shared<T>& s, int rank) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            Barrier::init(s.full + i, 1);
            Barrier::init(s.empty + i, kCluster * kConsumers / 32);
        }
        for (int i = 0; i < T::kBlocks; ++i) Barrier::init(s.expand + i, 1);
        cutlass::arch::fence_barrier_init();
        s.drawn = int(blockIdx.x) / kCluster;
        if (p.flags && rank == 0) s.drawn = atomic_add_relaxed(p.flags + kTicket, 1);
    }
    cluster_sync();
    // The first CTA must not leave before the others have read; this thread meets it again at the
    // cluster's barrier, the producer's threads would not.
    if (threadIdx.x == 0) s.ticket = load_remote(remote(&s.drawn, 0));
    __syncthreads();
    return s.ticket;
}

template <class T>
__device__ void run(const Problem& p, const Maps& maps) {
    extern __shared__ __align__(1024) unsigned char shared[];
    auto& s = *reinterpret_cast<Shared<T>*>(shared);
    const int rank = block_rank_in_cluster();
    const int ticket = start(p, s, rank);
    const int db_clusters = ceil_div(p.db_items, kCluster), item = ticket - db_clusters;
    if (item >= 0 && item < p.gemm_items) {
        const Place at(p, item, rank);
        if (threadIdx.x >= kConsumers) {
            cutlass::arch::warpgroup_reg_dealloc<24>();
            if (threadIdx.x == kConsumers) produce(p, maps, s, at, p.w && at.has_tile(p));
            return;
        }
        cutlass::arch::warpgroup_reg_alloc<240>();
        consume(p, maps, s, at);
    } else {
        if (threadIdx.x >= kConsumers) return;
        cluster_arrive();
        gradients<T>(p, ticket, db_clusters, rank, shared);
        cluster_wait();  // the others have read the ticket
    }
    if (p.flags && arrive(p.flags + kLeft, &s.slot) == int(gridDim.x) - 1) {
        for (int i = threadIdx.x; i < p.flag_count; i += kConsumers) p.flags[i] = 0;
    }
}

template <class T>
void tensor_maps(const Problem& p, TensorMap* maps) {
    constexpr int kWide = 128;
    maps[0] = {p.x, p.k, p.m, p.x_row, kBK, kBM / kCluster, kWide};
    if constexpr (T::kForward) {
        maps[1] = {p.w, p.k, p.n, p.w_row, kBK, kBN, kWide};
        maps[2] = {p.a, p.k, p.rank, p.a_row, kBK, T::kBR, kWide};
        maps[3] = {p.b, p.rank, p.n, p.b_row, kBlock, kBN, kWide};
    } else {
        maps[1] = {p.w, p.n, p.k, p.w_row, kBlock, kBK, kWide};
        maps[2] = {p.a, p.rank, p.k, p.a_row, T::kBR, kBK, 2 * T::kBR};
        maps[3] = {p.b, p.n, p.rank, p.b_row, kBlock, kBlock, kWide};
    }
    if (p.w == nullptr) maps[1] = maps[0];  // not looked at
}

template <class T>
constexpr Kernel describe(const char* name, void (*function)(Problem, CUtensorMap, CUtensorMap,
                                                             CUtensorMap, CUtensorMap)) {
    static_assert(sizeof(Shared<T>) <= 227 * 1024);
    static_assert(offsetof(Shared<T>, bias) >= sizeof(GradientShared<typename T::Element>));
    static_assert(offsetof(Shared<T>, bias) >= sizeof(BiasShared<kConsumers>));
    return {.name = name,
            .function = reinterpret_cast<const void*>(function),
            .family = Family::kCluster,
            .element = std::is_same_v<typename T::Element, BFloat16> ? Element::kBFloat16
                                                                     : Element::kFloat16,
            .direction = T::kForward ? Direction::kForward : Direction::kBackward,
            .min_arch = 90,
            .exact_arch = true,
            .aligned = true,
            .max_rows = 0,
            .max_rank = T::kMaxRank,
            .threads = kThreads,
            .cluster = kCluster,
            .shared = sizeof(Shared<T>),
            .bm = kBM,
            .bn = kBN,
            .bk = kBK,
            .br = T::kBR,
            .cr = kBlock,
            .di = kDI,
            .dj = kDJ,
            .dm = kDM,
            .db_columns = kDbColumns,
            .maps = 4,
            .tensor_maps = tensor_maps<T>};
}

}  // namespace loraxs::gpu::sm90

// An entry point; its name is its kernel's.
#define LORAXS_CLUSTER_KERNEL(NAME, ...)                                                     \
    extern "C" __global__ void __launch_bounds__(loraxs::gpu::sm90::kThreads, 1)             \
        NAME(const __grid_constant__ loraxs::gpu::Problem p,                                 \
             const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w,   \
             const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b) { \
        loraxs::gpu::sm90::run<__VA_ARGS__>(p, {x, w, a, b});                                \
    }
