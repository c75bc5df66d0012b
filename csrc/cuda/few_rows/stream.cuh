// The main loop of the few-row kernels: a tile of  C^T = V X^T  streamed from global memory.
//
// V [N, K] is W, A or B', the matrix that is read once; X [M, K] is X or T, with few rows. The
// 16-row operand of mma.m16n8k16 is V and the 8-column one X, so that 8 rows of X waste nothing.
//
// Cost of a tile of BN x M over a range of `depth` columns: 2 BN M8 depth FLOPs (M8: M rounded up
// to 8), and (BN + M) depth elements read, by cp.async of 16 bytes, kStages - 1 steps ahead.
#pragma once

#include <cstdint>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/swizzle_layout.hpp>

#include "../device/element.cuh"
#include "../kernel.h"

namespace loraxs::gpu::few_rows {

// How a kernel cuts up its problem. V's tile has kBN x kBK elements (16 KB), one or two lines of
// 128 bytes of each row; a warp has 16 of its N and all of M. With more rows a wider tile: X, which
// every tile reads, would be as much as W.
template <class Element_, Direction kDirection_, int kBM_>
struct Tiling {
    using Element = Element_;
    static constexpr Direction kDirection = kDirection_;
    static constexpr int kBM = kBM_;
    static constexpr int kBN = kBM <= 16 ? 64 : 128;
    static constexpr int kBK = kBM <= 16 ? 128 : 64;
    static constexpr int kStages = 4;
    static constexpr int kThreads = 2 * kBN;
    static constexpr int kBlocks = kBM / 8;  // accumulators of 16 x 8 per warp
    // V's tile in shared memory: rows of what is contiguous in global memory.
    static constexpr bool kColumnMajor = kDirection == Direction::kBackward;
    static constexpr int kTileRows = kColumnMajor ? kBK : kBN;
    static constexpr int kTileCols = kColumnMajor ? kBN : kBK;
    static constexpr int kStageElements = (kBN + kBM) * kBK;
    static constexpr int kStreamBytes = kStages * kStageElements * int(sizeof(Element));
};

// A matrix in global memory, by what is contiguous: `rows` rows of `cols` elements. Beyond them it
// reads as zero. `vectors`: every row starts at a multiple of 16 bytes.
template <class Element>
struct Matrix {
    const Element* data;
    int64_t pitch;
    int rows, cols;
    bool vectors;
};

template <class Element>
__device__ Matrix<Element> matrix(const void* data, int64_t pitch, int rows, int cols) {
    return {static_cast<const Element*>(data), pitch, rows, cols, has_vectors(data, pitch)};
}

// [n, k] in the layout of the kernel's direction.
template <class Tile>
__device__ Matrix<typename Tile::Element> weights(const void* data, int64_t pitch, int n, int k) {
    return matrix<typename Tile::Element>(data, pitch, Tile::kColumnMajor ? k : n,
                                          Tile::kColumnMajor ? n : k);
}

// Where element (row, col) of a tile stands in shared memory: groups of 8 elements are permuted by
// the row, so that 8 rows of one column, as ldmatrix reads them, lie in different banks.
template <int kCols>
__device__ int place(int row, int col) {
    static_assert(kCols == 64 || kCols == 128);
    using namespace cute;
    constexpr auto layout =
        composition(Swizzle<3, 3, kCols == 64 ? 3 : 4>{},
                    Layout<Shape<Int<1024>, Int<kCols>>, Stride<Int<kCols>, _1>>{});
    return layout(row, col);
}

// 16 bytes, of which the first `elements` are copied and the others are zeros. (CuTe's copy atom
// copies all of them or none.)
template <class Element>
__device__ void copy_async(Element* to, const Element* from, int elements) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                     cute::cast_smem_ptr_to_uint(to)),
                 "l"(from), "r"(elements * int(sizeof(Element)))
                 : "memory");
}

// The same one by one, for rows that start anywhere.
template <class Element>
__device__ void copy_elements(Element* to, const Element* from, int elements) {
    const auto* bits = reinterpret_cast<const uint16_t*>(from);
    Vector values{};
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
        if (e < elements) values.pair[e / 2] |= uint32_t(bits[e]) << 16 * (e % 2);
    }
    *reinterpret_cast<Vector*>(to) = values;
}

// `fill` rows of kCols elements of a matrix, from (row0, col0) on, into a tile. (With no elements
// to copy the address is not looked at.)
template <int kCols, int kThreads, class Element>
__device__ void load_tile(Element* tile, const Matrix<Element>& m, int row0, int col0, int fill) {
    constexpr int kGroups = kCols / kVector, kRowsAtOnce = kThreads / kGroups;
    static_assert(kRowsAtOnce % 8 == 0);  // a thread's rows are all permuted alike
    const int first = int(threadIdx.x) / kGroups, at = int(threadIdx.x) % kGroups * kVector;
    const int inside = max(0, min(kVector, m.cols - col0 - at)), rows = m.rows - row0;
    const int64_t step = m.pitch * kRowsAtOnce;
    const Element* from = m.data + (row0 + first) * m.pitch + col0 + at;
    Element* to = tile + place<kCols>(first, at);
    if (m.vectors) {
#pragma unroll 4
        for (int r = first; r < fill; r += kRowsAtOnce, from += step, to += kRowsAtOnce * kCols) {
            copy_async(to, from, r < rows ? inside : 0);
        }
    } else {
#pragma unroll 1
        for (int r = first; r < fill; r += kRowsAtOnce, from += step, to += kRowsAtOnce * kCols) {
            copy_elements(to, from, r < rows ? inside : 0);
        }
    }
}

// A warp's 16 x M numbers of a tile: [block][row half][column]; lane 4g + c holds N = g and g + 8,
// M = 8 block + 2c and + 1.
template <class Tile>
using Accumulator = float[Tile::kBlocks][2][2];

template <class Element>
__device__ void multiply(float (&acc)[2][2], const uint32_t (&v)[4], uint32_t x0, uint32_t x1) {
    MmaOp<Element>::fma(acc[0][0], acc[0][1], acc[1][0], acc[1][1], v[0], v[1], v[2], v[3], x0, x1,
                        acc[0][0], acc[0][1], acc[1][0], acc[1][1]);
}

template <class Element>
__device__ const cute::uint128_t& row_of_8(const Element* at) {
    return *reinterpret_cast<const cute::uint128_t*>(at);
}

// The warp's 16 x 16 of V's tile at column k, as the 16-row operand.
template <class Tile>
__device__ void load_weights(uint32_t (&v)[4], const typename Tile::Element* tile, int k) {
    const int lane = threadIdx.x % 32, n0 = int(threadIdx.x) / 32 * 16;
    if constexpr (Tile::kColumnMajor) {
        const int at = place<Tile::kTileCols>(k + lane / 16 * 8 + lane % 8, n0 + lane / 8 % 2 * 8);
        cute::SM75_U16x8_LDSM_T::copy(row_of_8(tile + at), v[0], v[1], v[2], v[3]);
    } else {
        const int at = place<Tile::kTileCols>(n0 + lane % 16, k + lane / 16 * 8);
        cute::SM75_U32x4_LDSM_N::copy(row_of_8(tile + at), v[0], v[1], v[2], v[3]);
    }
}

// One step: acc += V X^T over `depth` columns of the tiles, a multiple of 16; all if kWhole.
template <class Tile, bool kWhole>
__device__ void multiply_tiles(Accumulator<Tile>& acc, const typename Tile::Element* v_tile,
                               const typename Tile::Element* x_tile, int depth, int blocks) {
    using Element = typename Tile::Element;
    const int lane = threadIdx.x % 32;
#pragma unroll(kWhole ? Tile::kBK / 32 : 1)
    for (int k = 0; k < (kWhole ? Tile::kBK : depth); k += 32) {
        const bool second = kWhole || k + 16 < depth;
        uint32_t v[2][4];
        load_weights<Tile>(v[0], v_tile, k);
        if (second) load_weights<Tile>(v[1], v_tile, k + 16);
#pragma unroll
        for (int block = 0; block < Tile::kBlocks; ++block) {
            if (block >= blocks) break;
            uint32_t x[4];
            const int at = place<Tile::kBK>(8 * block + lane % 8, k + lane / 8 * 8);
            cute::SM75_U32x4_LDSM_N::copy(row_of_8(x_tile + at), x[0], x[1], x[2], x[3]);
            multiply<Element>(acc[block], v[0], x[0], x[1]);
            if (second) multiply<Element>(acc[block], v[1], x[2], x[3]);
        }
    }
}

// What is multiplied: rows n0 .. n0 + kBN of V [n, depth] with all of X [m, depth].
template <class Tile>
struct Operands {
    Matrix<typename Tile::Element> v, x;
    int n, n0, depth;
};

template <class Tile>
__device__ typename Tile::Element* tile_of(typename Tile::Element* shared, int step) {
    return shared + step % Tile::kStages * Tile::kStageElements;
}

template <class Tile>
__device__ void load_v(const Operands<Tile>& o, int step, typename Tile::Element* shared) {
    const int k = step * Tile::kBK;
    load_tile<Tile::kTileCols, Tile::kThreads>(tile_of<Tile>(shared, step), o.v,
                                               Tile::kColumnMajor ? k : o.n0,
                                               Tile::kColumnMajor ? o.n0 : k, Tile::kTileRows);
}

template <class Tile>
__device__ void load_x(const Operands<Tile>& o, int step, typename Tile::Element* shared) {
    load_tile<Tile::kBK, Tile::kThreads>(tile_of<Tile>(shared, step) + Tile::kBN * Tile::kBK, o.x,
                                         0, step * Tile::kBK, round_up(o.x.rows, 8));
}

// acc += V X^T over the steps first .. last of kBK columns. X and acc are used after x_ready(),
// when the first tiles of V are on their way. All threads of the CTA call it; `shared` has
// kStreamBytes, and is free afterwards.
template <class Tile, class F>
__device__ void stream(Accumulator<Tile>& acc, const Operands<Tile>& o, int first, int last,
                       typename Tile::Element* shared, F x_ready) {
    constexpr int kBK = Tile::kBK, kAhead = Tile::kStages - 1;
    const int blocks = ceil_div(o.x.rows, 8);
    const bool mine = o.n0 + int(threadIdx.x) / 32 * 16 < o.n;  // the warp has rows of V
#pragma unroll 1
    for (int step = first; step < min(first + kAhead, last); ++step) load_v(o, step, shared);
    x_ready();
#pragma unroll 1
    for (int step = first; step < first + kAhead; ++step) {
        if (step < last) load_x(o, step, shared);
        cute::cp_async_fence();  // an empty group too: the number of groups counts steps
    }
#pragma unroll 1
    for (int step = first; step < last; ++step) {
        cute::cp_async_wait<kAhead - 1>();
        __syncthreads();  // this step's tiles have landed; all are done with the one before
        if (step + kAhead < last) {
            load_v(o, step + kAhead, shared);
            load_x(o, step + kAhead, shared);
        }
        cute::cp_async_fence();
        const auto* v = tile_of<Tile>(shared, step);
        const auto* x = v + Tile::kBN * kBK;
        const int depth = o.depth - step * kBK;
        if (mine && depth >= kBK) {
            multiply_tiles<Tile, true>(acc, v, x, kBK, blocks);
        } else if (mine) {
            multiply_tiles<Tile, false>(acc, v, x, depth, blocks);
        }
    }
    __syncthreads();
}

}  // namespace loraxs::gpu::few_rows
