// Matrix products of tiles in shared memory, and the multistage loop along K that feeds them.
#pragma once

#include "tiles.cuh"

namespace loraxs::gpu::sm80 {

inline constexpr int kBM = 128, kBN = 128, kBK = 32;
inline constexpr int kStages = 4;

// C[128, kColumns] += left right^T by all eight warps: 2 x 4 for an output tile (each 64 x 32), 8 x
// 1 for a narrow one (each 16 rows).
template <class Element, int kColumns>
struct Warps {
    static constexpr bool kWide = kColumns == kBN;
    using Shape = cute::Shape<cute::Int<kBM>, cute::Int<kColumns>>;
    using Mma = decltype(cute::make_tiled_mma(
        MmaOp<Element>{},
        cute::Layout<cute::Shape<cute::Int<kWide ? 2 : 8>, cute::Int<kWide ? 4 : 1>, cute::_1>>{},
        cute::Tile<cute::Int<kWide ? 32 : 128>, cute::Int<kWide ? 64 : 16>, cute::_16>{}));

    CUTE_HOST_DEVICE static auto zeros() {
        auto acc = cute::partition_fragment_C(Mma{}, Shape{});
        cute::clear(acc);
        return acc;
    }

    // The (row, column) of each accumulator.
    CUTE_HOST_DEVICE static auto places() {
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
    using CopyLeft =
        decltype(cute::make_tiled_copy_A(cute::Copy_Atom<typename Left::Load, Element>{}, Mma{}));
    using CopyRight =
        decltype(cute::make_tiled_copy_B(cute::Copy_Atom<typename Right::Load, Element>{}, Mma{}));
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

// One pass along K, in steps of 32 columns:
//
//     acc += left right^T  (kMain)      narrow += left side^T  (kSide columns, if there are any)
//
// Both products of a step share the tile of `left`. Copies run kStages - 1 steps ahead, fragments
// one block of 16 columns.
//
// Cost of a step: 2 * 128 * 32 (128 kMain + kSide) FLOPs, kSide up to what is there, rounded up to
// 8; 32 (128 + 128 kMain + kSide) elements read.
template <class Element, Major kRight, bool kMain, int kSide>
struct Pass {
    using Left = Tile<Element, Major::kK, kBM, kBK>;
    using Right = Tile<Element, kRight, kBN, kBK>;
    using Side = Tile<Element, kRight, kSide ? kSide : 16, kBK>;
    static constexpr int kRightAt = kStages * Left::kSize;
    static constexpr int kSideAt = kRightAt + (kMain ? kStages * Right::kSize : 0);
    static constexpr int kShared =
        sizeof(Element) * (kSideAt + (kSide ? kStages * Side::kSize : 0));
    static constexpr int kBlocks = kBK / 16;

    Element* shared;
    Product<Left, Right> main;
    Product<Left, Side> narrow;
    int reads = 0, writes = 0;  // stages

    CUTE_DEVICE explicit Pass(void* shared) : shared(static_cast<Element*>(shared)) {}

    CUTE_DEVICE Element* left(int stage) const { return shared + stage * Left::kSize; }
    CUTE_DEVICE Element* right(int stage) const { return shared + kRightAt + stage * Right::kSize; }
    CUTE_DEVICE Element* side(int stage) const { return shared + kSideAt + stage * Side::kSize; }

    CUTE_DEVICE void load(int stage, int block) {
        if constexpr (kMain) main.load(left(stage), right(stage), block);
        if constexpr (kSide > 0) narrow.load(left(stage), side(stage), block);
    }

    static constexpr int kAhead = kStages - 1;

    // Starts the copies into the next stage, if there is another step.
    template <class Copy>
    CUTE_DEVICE void copy_next(bool there, Copy copy) {
        if (there) copy(writes);
        cute::cp_async_fence();
        writes = writes == kStages - 1 ? 0 : writes + 1;
    }

    // The products of a step, the fragments of the next one, and the copies of a later one.
    template <class Wide, class Narrow, class Copy>
    CUTE_DEVICE void step(Wide& acc, Narrow& q, int columns, bool last, bool copies, Copy copy) {
        CUTE_UNROLL
        for (int block = 0; block < kBlocks; ++block) {
            if (block == kBlocks - 1) {
                // The next stage has come in, and nobody reads the one before this any more.
                cute::cp_async_wait<kAhead - 1>();
                __syncthreads();
                reads = reads == kStages - 1 ? 0 : reads + 1;
            }
            if (block < kBlocks - 1 || !last) load(reads, (block + 1) % kBlocks);
            if (block == 0) copy_next(copies, copy);
            if constexpr (kMain) main.multiply(acc, block);
            if constexpr (kSide > 0) narrow.multiply(q, block, columns);
        }
    }

    // `steps` steps that `copy(stage)` brings in, then `more` that `tail(i, stage)` does;
    // `begin(i)` comes before the products of each of these. `columns`: of the narrow product that
    // matter. All threads call it; shared memory is free again afterwards.
    template <class Wide, class Narrow, class Copy, class Tail, class Begin>
    CUTE_DEVICE void run(Wide& acc, Narrow& q, int columns, int steps, Copy copy, int more,
                         Tail tail, Begin begin) {
        const int all = steps + more;
        CUTE_NO_UNROLL
        for (int s = 0; s < kAhead; ++s) {
            copy_next(s < all,
                      [&](int stage) { s < steps ? copy(stage) : tail(s - steps, stage); });
        }
        cute::cp_async_wait<kAhead - 1>();
        __syncthreads();
        load(0, 0);
        int s = 0;
        CUTE_NO_UNROLL
        for (; s < steps - kAhead; ++s) step(acc, q, columns, false, true, copy);
        CUTE_NO_UNROLL
        for (; s < all; ++s) {
            if (s >= steps) begin(s - steps);
            const int ahead = s + kAhead - steps;
            step(acc, q, columns, s == all - 1, ahead < more,
                 [&](int stage) { tail(ahead, stage); });
        }
        cute::cp_async_wait<0>();
        __syncthreads();
    }

    template <class Wide, class Narrow, class Copy>
    CUTE_DEVICE void run(Wide& acc, Narrow& q, int columns, int steps, Copy copy) {
        run(acc, q, columns, steps, copy, 0, [](int, int) {}, [](int) {});
    }
};

}  // namespace loraxs::gpu::sm80
