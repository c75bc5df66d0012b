// Tiles of matrices in shared memory: how they lie there, how they get there.
#pragma once

#include <cute/arch/copy_sm80.hpp>
#include <cute/tensor.hpp>

#include "../device/element.cuh"

namespace loraxs::gpu::sm80 {

inline constexpr int kThreads = 256;

// What is contiguous in memory: a matrix's columns (along K), or its rows (along M or N).
enum class Major { kK, kRows };

// A matrix [rows, depth] in global memory. `width`: elements that are surely aligned, see width_of.
template <class Element>
struct Operand {
    const Element* data;
    int64_t pitch;
    int rows, depth, width;
};

// 8, 2 or 1: how many elements can be copied at once, from lines of `length` elements.
__device__ inline int width_of(const void* data, int64_t pitch, int length) {
    const uint64_t all = reinterpret_cast<uintptr_t>(data) / 2 | pitch | length;
    return all % 8 == 0 ? 8 : all % 2 == 0 ? 2 : 1;
}

template <class Element>
__device__ inline Operand<Element> operand(const void* data, int64_t pitch, int rows, int depth,
                                           Major major) {
    const int length = major == Major::kK ? depth : rows;
    return {static_cast<const Element*>(data), pitch, rows, depth, width_of(data, pitch, length)};
}

// A tile of kRows x kDepth elements. Its vectors of eight are permuted such that the eight which
// ldmatrix reads together lie in different banks.
template <class Element_, Major kMajor_, int kRows_, int kDepth_>
struct Tile {
    using Element = Element_;
    static constexpr Major kMajor = kMajor_;
    static constexpr int kRows = kRows_, kDepth = kDepth_, kSize = kRows * kDepth;
    static constexpr bool kAlongK = kMajor == Major::kK;
    static constexpr int kLine = cute::min(64, kAlongK ? kDepth : kRows);
    static_assert(kLine == 16 || kLine == 32 || kLine == 64);

    using Lines = std::conditional_t<kAlongK,
                                     cute::Layout<cute::Shape<cute::_8, cute::Int<kLine>>,
                                                  cute::Stride<cute::Int<kLine>, cute::_1>>,
                                     cute::Layout<cute::Shape<cute::Int<kLine>, cute::_8>,
                                                  cute::Stride<cute::_1, cute::Int<kLine>>>>;
    static constexpr int kBits = kLine == 64 ? 3 : kLine == 32 ? 2 : 1;
    using Layout =
        decltype(cute::tile_to_shape(cute::composition(cute::Swizzle<kBits, 3, 3>{}, Lines{}),
                                     cute::Shape<cute::Int<kRows>, cute::Int<kDepth>>{}));
    using Load = std::conditional_t<kAlongK, cute::SM75_U32x4_LDSM_N, cute::SM75_U16x8_LDSM_T>;

    CUTE_HOST_DEVICE static auto tensor(Element* shared) {
        return cute::make_tensor(cute::make_smem_ptr(shared), Layout{});
    }
};

// Copies one tile after another along K from global to shared memory, kWidth elements per thread at
// once. What lies beyond the matrix is zero.
template <class Tile, int kWidth>
struct Copier {
    using Element = typename Tile::Element;
    static constexpr int kPerLine = (Tile::kAlongK ? Tile::kDepth : Tile::kRows) / kWidth;
    static constexpr int kLines = Tile::kAlongK ? Tile::kRows : Tile::kDepth;
    static constexpr int kStep = kThreads / kPerLine;  // lines per pass
    static constexpr int kPasses = ceil_div(kLines, kStep);
    static_assert(kThreads % kPerLine == 0);

    const Element* at;
    int64_t pitch;
    int line, along;  // the thread's first line, and its place in it
    int rows, depth;  // how many are left from there on

    CUTE_DEVICE Copier(const Operand<Element>& o, int row0, int k0)
        : pitch(o.pitch),
          line(threadIdx.x / kPerLine),
          along(threadIdx.x % kPerLine * kWidth),
          rows(o.rows - row0 - (Tile::kAlongK ? line : along)),
          depth(o.depth - k0 - (Tile::kAlongK ? along : line)) {
        at = o.data + (Tile::kAlongK ? (row0 + line) * pitch + k0 + along
                                     : (k0 + line) * pitch + row0 + along);
    }

    // The next tile. Not complete before the thread's copies are (cp_async_wait) and a barrier.
    CUTE_DEVICE void next(Element* shared) {
        CUTE_UNROLL
        for (int i = 0; i < kPasses; ++i) {
            const int past = i * kStep;
            if (line + past >= kLines) break;
            const bool there = Tile::kAlongK ? rows > past && depth > 0 : rows > 0 && depth > past;
            copy(at + past * pitch, shared + offset(past), there);
        }
        at += Tile::kAlongK ? Tile::kDepth : Tile::kDepth * pitch;
        depth -= Tile::kDepth;
    }

    CUTE_DEVICE int offset(int past) const {
        const auto of = [](int line, int along) {
            return Tile::kAlongK ? typename Tile::Layout{}(line, along)
                                 : typename Tile::Layout{}(along, line);
        };
        // Eight lines are the permutation's period.
        return kStep % 8 == 0 ? of(line, along) + of(past, 0) : of(line + past, along);
    }

    CUTE_DEVICE static void copy(const Element* from, Element* to, bool there) {
        using namespace cute;
        if constexpr (kWidth == 8) {
            SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t>::copy(
                *reinterpret_cast<const uint128_t*>(from), *reinterpret_cast<uint128_t*>(to),
                there);
        } else if constexpr (kWidth == 2) {
            SM80_CP_ASYNC_CACHEALWAYS_ZFILL<uint32_t>::copy(
                *reinterpret_cast<const uint32_t*>(from), *reinterpret_cast<uint32_t*>(to), there);
        } else {
            *to = there ? *from : Element(0.f);
        }
    }
};

// A Copier of the width that the operand has: known to be 8 (`kVectors`), or asked for at run time.
template <class Tile, bool kVectors>
struct Loader {
    using Element = typename Tile::Element;
    const Operand<Element>& o;
    int row0, k0 = 0;
    Copier<Tile, 8> vectors;

    CUTE_DEVICE Loader(const Operand<Element>& o, int row0)
        : o(o), row0(row0), vectors(o, row0, 0) {}

    CUTE_DEVICE void next(Element* shared) {
        if (kVectors || o.width == 8) {
            vectors.next(shared);
        } else if (o.width == 2) {
            Copier<Tile, 2>(o, row0, k0).next(shared);
        } else {
            Copier<Tile, 1>(o, row0, k0).next(shared);
        }
        k0 += Tile::kDepth;
    }
};

}  // namespace loraxs::gpu::sm80
