// Matrix products of tiles in shared memory, and the multistage loop along K that feeds them.
#pragma once

#include "tiles.cuh"

namespace loraxs::gpu::sm80 {

inline constexpr int kBM = 128, kBN = 128, kBK = 32;
inline constexpr int kStages = 4;

// C[128, kColumns] += left right^T by all eight warps: 2 x 4 for an output tile (each 64 x 32), 8 x 1
// for a narrow one (each 16 rows).
template <class Element, int kColumns>
struct Warps {
    static constexpr bool kWide = kColumns == kBN;
    using Shape = cute::Shape<cute::Int<kBM>, cute::Int<kColumns>>;
    using Mma = decltype(cute::make_tiled_mma(
        MmaOp<Element>{},
        cute::Layout<cute::Shape<cute::Int<kWide ? 2 : 8>, cute::Int<kWide ? 4 : 1>, cute::_1>>{},
        cute::Tile<cute::Int<kWide ? 32 : 128>, cute::Int<kWide ? 64 : 16>, cute::_16>{}));

    CUTE_DEVICE static auto zeros() {
        auto acc = cute::partition_fragment_C(Mma{}, Shape{});
        cute::clear(acc);
        return acc;
    }

    // The (row, column) of each accumulator.
    CUTE_DEVICE static auto places() {
        const auto all = cute::make_identity_tensor(Shape{});
        return Mma{}.get_slice(threadIdx.x).partition_C(all);
    }
};

template <class Element, int kColumns>
using Accumulator = decltype(Warps<Element, kColumns>::zeros());

// The fragments of one product, for every 16 columns of K of a pair of tiles.
template <class Left, class Right>
struct Product {
    using Element = typename Left::Element;
    using W = Warps<Element, Right::kRows>;
    using Mma = typename W::Mma;
    using CopyLeft = decltype(cute::make_tiled_copy_A(
        cute::Copy_Atom<typename Left::Load, Element>{}, Mma{}));
    using CopyRight = decltype(cute::make_tiled_copy_B(
        cute::Copy_Atom<typename Right::Load, Element>{}, Mma{}));
    static_assert(Left::kDepth == Right::kDepth);
    static constexpr int kBlocks = Left::kDepth / 16;

    decltype(Mma{}.get_slice(0).partition_fragment_A(Left::tensor(nullptr))) left;
    decltype(Mma{}.get_slice(0).partition_fragment_B(Right::tensor(nullptr))) right;

    // The fragments of 16 columns.
    CUTE_DEVICE void load(Element* shared_left, Element* shared_right, int block) {
        using namespace cute;
        const auto a = CopyLeft{}.get_slice(threadIdx.x);
        const auto b = CopyRight{}.get_slice(threadIdx.x);
        const auto from_left = a.partition_S(Left::tensor(shared_left));
        const auto from_right = b.partition_S(Right::tensor(shared_right));
        auto to_left = a.retile_D(left);
        auto to_right = b.retile_D(right);
        copy(CopyLeft{}, from_left(_, _, block), to_left(_, _, block));
        copy(CopyRight{}, from_right(_, _, block), to_right(_, _, block));
    }

    // acc += of 16 columns; of acc's columns those below `columns` (rounded up to 8).
    template <class Acc>
    CUTE_DEVICE void multiply(Acc& acc, int block, int columns = Right::kRows) const {
        using namespace cute;
        if constexpr (W::kWide) {
            gemm(Mma{}, left(_, _, block), right(_, _, block), acc);
        } else {
            CUTE_UNROLL
            for (int n = 0; n < size<2>(acc); ++n) {
                if (8 * n < columns) {
                    gemm(Mma{}, left(_, 0, block), right(_, n, block), acc(_, 0, n));
                }
            }
        }
    }
};

// One pass along K over a row block of `left`:
//
//     acc += left[row0.., :] right[col0.., :]^T  (kMain)    side += left[row0.., :] a[rank0.., :]^T  (kSide > 0)
//
// Both products of a step share the tile of `left`. Copies run kStages - 1 steps ahead, fragments one
// block of 16 columns.
//
// Cost: 2 * 128 K (128 kMain + kSide) FLOPs, K rounded up to 32 and kSide to what is there of a;
// (128 + 128 kMain + kSide) K elements read.
template <class Element, Major kRight, bool kMain, int kSide, bool kLeftVectors, bool kRightVectors>
struct Pass {
    using Left = Tile<Element, Major::kK, kBM, kBK>;
    using Right = Tile<Element, kRight, kBN, kBK>;
    using Side = Tile<Element, kRight, kSide ? kSide : 16, kBK>;
    static constexpr int kRightAt = kStages * Left::kSize;
    static constexpr int kSideAt = kRightAt + (kMain ? kStages * Right::kSize : 0);
    static constexpr int kShared = sizeof(Element) * (kSideAt + (kSide ? kStages * Side::kSize : 0));

    Element* shared;
    Loader<Left, kLeftVectors> load_left;
    Loader<Right, kRightVectors> load_right;
    Loader<Side, false> load_side;
    Product<Left, Right> main;
    Product<Left, Side> narrow;

    CUTE_DEVICE Pass(const Operand<Element>& left, const Operand<Element>& right,
                     const Operand<Element>& side, int row0, int col0, int rank0, void* shared)
        : shared(static_cast<Element*>(shared)),
          load_left(left, row0),
          load_right(right, col0),
          load_side(side, rank0) {}

    CUTE_DEVICE Element* left_at(int stage) const { return shared + stage * Left::kSize; }
    CUTE_DEVICE Element* right_at(int stage) const { return shared + kRightAt + stage * Right::kSize; }
    CUTE_DEVICE Element* side_at(int stage) const { return shared + kSideAt + stage * Side::kSize; }

    CUTE_DEVICE void copy_step(int stage) {
        load_left.next(left_at(stage));
        if constexpr (kMain) load_right.next(right_at(stage));
        if constexpr (kSide > 0) load_side.next(side_at(stage));
    }

    CUTE_DEVICE void load(int stage, int block) {
        if constexpr (kMain) main.load(left_at(stage), right_at(stage), block);
        if constexpr (kSide > 0) narrow.load(left_at(stage), side_at(stage), block);
    }

    // All threads call it. Shared memory is free again afterwards. `columns`: of `side` that matter.
    template <class Acc, class Narrow>
    CUTE_DEVICE void run(Acc& acc, Narrow& side, int depth, int columns) {
        using namespace cute;
        constexpr int kBlocks = kBK / 16;
        const int steps = ceil_div(depth, kBK);
        CUTE_UNROLL
        for (int s = 0; s < kStages - 1; ++s) {
            if (s < steps) copy_step(s);
            cp_async_fence();
        }
        cp_async_wait<kStages - 2>();
        __syncthreads();
        load(0, 0);
        int reads = 0, writes = kStages - 1;
        CUTE_NO_UNROLL
        for (int step = 0; step < steps; ++step) {
            CUTE_UNROLL
            for (int block = 0; block < kBlocks; ++block) {
                if (block == kBlocks - 1) {
                    // The next stage has come in, and nobody reads the one before this any more.
                    cp_async_wait<kStages - 2>();
                    __syncthreads();
                    reads = reads == kStages - 1 ? 0 : reads + 1;
                }
                if (block < kBlocks - 1 || step < steps - 1) load(reads, (block + 1) % kBlocks);
                if (block == 0) {
                    if (step + kStages - 1 < steps) copy_step(writes);
                    cp_async_fence();
                    writes = writes == kStages - 1 ? 0 : writes + 1;
                }
                if constexpr (kMain) main.multiply(acc, block);
                if constexpr (kSide > 0) narrow.multiply(side, block, columns);
            }
        }
        cp_async_wait<0>();
        __syncthreads();
    }
};

}  // namespace loraxs::gpu::sm80
