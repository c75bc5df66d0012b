// Tiles, layouts in shared memory and matrix instructions of the cluster kernels.
//
// X, Q, T and the tile of D lie K-major in blocks of 64 columns (128 bytes), W, A and B' as they
// lie in global memory: K-major in the forward, MN-major in the backward; wgmma reads both. TMA
// writes exactly these layouts.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/tensor.hpp>

#include "../kernel.h"
#include "cluster_sync.cuh"

namespace loraxs::gpu::sm90 {

using namespace cute;

inline constexpr int kCluster = 4;  // CTAs along N
inline constexpr int kConsumers = 256, kThreads = kConsumers + 128;
inline constexpr int kBM = 128, kBN = 256, kBK = 64;
inline constexpr int kStages = 4;
inline constexpr int kBlock = 64;     // columns of a block of Q, T and D: one swizzled row
inline constexpr int kCoreStep = 32;  // rows of R' at once

template <class Element_, Direction kDirection, int kBR_>
struct Tiles {
    using Element = Element_;
    static constexpr bool kForward = kDirection == Direction::kForward;
    static constexpr int kBR = kBR_;  // columns of Q of one CTA
    static constexpr int kMaxRank = kCluster * kBR;
    static constexpr int kBlocks = kMaxRank / kBlock;  // of Q and of T
    static_assert(kBR == 16 || kBR == 32 || kBR == 64);

    static constexpr auto kMajor = kForward ? GMMA::Major::K : GMMA::Major::MN;
    using Row = GMMA::Layout_K_SW128_Atom<Element>;
    using Column = GMMA::Layout_MN_SW128_Atom<Element>;
    using NarrowColumn =
        std::conditional_t<kBR == 64, Column,
                           std::conditional_t<kBR == 32, GMMA::Layout_MN_SW64_Atom<Element>,
                                              GMMA::Layout_MN_SW32_Atom<Element>>>;
    // A box of TMA is contiguous: MN-major ones are 64 columns wide, and K runs within a box.
    using Order = std::conditional_t<kForward, Step<_1, _2, _3>, Step<_2, _1, _3>>;
    template <class Atom, int kRows, int kDepth, int kCount>
    using Layout3 =
        decltype(tile_to_shape(Atom{}, Shape<Int<kRows>, Int<kDepth>, Int<kCount>>{}, Order{}));

    using XLayout = decltype(tile_to_shape(Row{}, Shape<Int<kBM>, Int<kBK>, Int<kStages>>{}));
    using QLayout = decltype(tile_to_shape(Row{}, Shape<Int<kBM>, Int<kBlock>, Int<kBlocks>>{}));
    using WLayout = Layout3<std::conditional_t<kForward, Row, Column>, kBN, kBK, kStages>;
    using ALayout = Layout3<std::conditional_t<kForward, Row, NarrowColumn>, kBR, kBK, kStages>;
    // R' as two tf32 numbers, twice.
    using CoreLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<tfloat32_t>{},
                                              Shape<Int<kBR>, Int<kCoreStep>, _4>{}));

    // Two warpgroups, 64 rows each.
    template <int kN>
    using Mma = decltype(make_tiled_mma(
        GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kN>, Int<kBK>>, GMMA::Major::K,
                             kMajor>(),
        Layout<Shape<_2, _1, _1>>{}));
    using CoreMma = decltype(make_tiled_mma(
        GMMA::rs_op_selector<tfloat32_t, tfloat32_t, float, Shape<_64, Int<kBR>, _32>>(),
        Layout<Shape<_2, _1, _1>>{}));
};

// Shared memory. When the main loop is over, its ring is used again: T, then D, lie where X was; Q
// where the last tiles of W were; R' where A was; B' where W was, as soon as Q is used up.
template <class T>
struct Shared {
    using Element = typename T::Element;
    static constexpr int kX = kBM * kBK, kW = kBN * kBK, kA = T::kBR * kBK;
    alignas(1024) Element x[kStages * kX];
    alignas(1024) Element w[kStages * kW];
    alignas(1024) Element a[kStages * kA];
    float bias[kBN];
    uint64_t full[kStages], empty[kStages], expand[T::kBlocks];
    int drawn, ticket, slot;  // the cluster's ticket, as the first CTA drew it and as all know it

    // The first block of B' whose place Q takes.
    static constexpr int kFirstLate = T::kBlocks < kStages - ceil_div(T::kBlocks * kBM, kBN)
                                          ? T::kBlocks
                                          : kStages - ceil_div(T::kBlocks * kBM, kBN);

    __device__ auto xs() { return make_tensor(make_smem_ptr(x), typename T::XLayout{}); }
    __device__ auto ws() { return make_tensor(make_smem_ptr(w), typename T::WLayout{}); }
    __device__ auto as() { return make_tensor(make_smem_ptr(a), typename T::ALayout{}); }
    __device__ auto ts() { return xs(); }
    __device__ auto ds() { return xs(); }
    __device__ auto qs() {
        Element* last = w + kStages * kW - T::kBlocks * kBM * kBlock;
        return make_tensor(make_smem_ptr(last), typename T::QLayout{});
    }
    __device__ auto cores() {
        static_assert(sizeof(a) == sizeof(float) * cosize_v<typename T::CoreLayout>);
        return make_tensor(make_smem_ptr(reinterpret_cast<tfloat32_t*>(a)),
                           typename T::CoreLayout{});
    }
};

// Where one cluster's work lies: CTA `rank` has the tile of D at (row0, col0).
struct Place {
    int rank;              // in the cluster
    int row_block, group;  // row block, and group of kCluster column tiles

    __device__ Place(const Problem& p, int item, int rank) : rank(rank) {
        const int groups = ceil_div(p.col_tiles, kCluster), walked = p.group * groups;
        const int first = item / walked * p.group, rows = min(p.group, p.row_blocks - first);
        row_block = first + item % walked % rows;
        group = item % walked / rows;
    }
    __device__ int row0() const { return row_block * kBM; }
    __device__ int col0() const { return (group * kCluster + rank) * kBN; }
    __device__ bool has_tile(const Problem& p) const { return col0() < p.n; }
};

// The consumers' own barrier.
__device__ inline void sync_consumers() { cutlass::arch::NamedBarrier::sync(kConsumers, 0); }

}  // namespace loraxs::gpu::sm90
