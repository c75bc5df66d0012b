// dR = s P^T Q and db = column sums of X (dL/dY), in the launch that computes D (dX).
//
// Both are sums over rows in a fixed order: the same bits from run to run, whatever order the CTAs
// run in.
//
// Cost of dR: 2 r^2 FLOPs per row, r rounded up to 16 (rows of dR) and 8 (columns), an adapter's
// rows up to whole steps of DM; 2 r elements per row, times r / 64; 2 chunks r^2 floats if there
// are several chunks. Cost of db: X once more.
#pragma once

#include <cute/tensor.hpp>

#include "../problem.h"
#include "element.cuh"
#include "sync.cuh"

namespace loraxs::gpu {

inline constexpr int kDI = 64, kDJ = 64;  // the tile of dR
inline constexpr int kDM = 64;            // rows of P and Q at once
inline constexpr int kScan = 1024;        // ids looked at together, where nobody has sorted them
inline constexpr int kDbColumns = 64;     // columns of one item of db

template <class Element>
struct GradientShared {
    alignas(16) Element p[2][kDM * kDI];
    alignas(16) Element q[2][kDM * kDJ];
    int slot;
};

template <int kThreads>
struct BiasShared {
    alignas(16) float sum[kThreads / (kDbColumns / kVector)][kDbColumns];
};

// The rows that one chunk of one adapter's dR sums up.
struct GradientRows {
    const Problem& p;
    int adapter, begin, end;
    bool scanned;  // rows begin .. end are those of any adapter; ids tell

    __device__ GradientRows(const Problem& p, int adapter, int chunk)
        : p(p), adapter(adapter), scanned(p.ids != nullptr && p.order == nullptr) {
        int first = 0, last = p.m;
        if (p.order) first = int(p.offsets[adapter + 1]), last = int(p.offsets[adapter + 2]);
        const int step = round_up(ceil_div(last - first, p.chunks), kDM);
        begin = int(min(int64_t(first) + int64_t(chunk) * step, int64_t(last)));
        end = min(begin + step, last);
    }

    // The row of P and Q at place i, or -1.
    __device__ int row(int i) const {
        if (i >= end) return -1;
        if (p.order) return int(p.order[i]);
        return scanned && p.ids[i] != adapter ? -1 : i;
    }

    // The first step at or after `i` that may have rows. All threads call it.
    __device__ int step_from(int i) const {
        if (!scanned || (i - begin) % kScan != 0) return i;
        for (; i < end; i += kScan) {
            bool found = false;
            for (int at = i + threadIdx.x; at < min(i + kScan, end); at += blockDim.x) {
                found |= p.ids[at] == adapter;
            }
            if (__syncthreads_or(found)) break;
        }
        return i;
    }
};

// One thread's part of kDM rows of P and Q, on its way from global to shared memory.
template <class Element, int kThreads>
struct GradientTile {
    static constexpr int kPerRow = kDI / kVector;
    static constexpr int kEach = ceil_div(kDM * kPerRow, kThreads);
    static constexpr bool kWhole = kDM * kPerRow % kThreads == 0;  // no thread is left over
    static_assert(kDI == kDJ);
    Vector p[kEach], q[kEach];

    __device__ static int2 place(int i) {
        const int e = i * kThreads + threadIdx.x;
        return {e / kPerRow, e % kPerRow * kVector};
    }

    __device__ void load(const GradientRows& rows, int step, int i0, int j0) {
        const Problem& problem = rows.p;
        const auto* side = static_cast<const Element*>(problem.side);
        const auto* saved = static_cast<const Element*>(problem.q);
        const bool whole_p = has_vectors(side, problem.side_row);
        const bool whole_q = has_vectors(saved, problem.q_row);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int2 at = place(i);
            const int row = kWhole || at.x < kDM ? rows.row(step + at.x) : -1;
            const int ci = i0 + at.y, cj = j0 + at.y, none = 0;
            p[i] = load_vector(side + row * problem.side_row + ci,
                               row < 0 ? none : problem.rank - ci, whole_p);
            q[i] = load_vector(saved + row * problem.q_row + cj, row < 0 ? none : problem.rank - cj,
                               whole_q);
        }
    }

    // Vectors of a row are permuted by the row, so that eight rows' share no bank (ldmatrix).
    __device__ void store(GradientShared<Element>& shared, int buffer) const {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int2 at = place(i);
            if (!kWhole && at.x >= kDM) continue;
            const int to = at.x * kDI + (at.y ^ at.x % 8 * kVector);
            *reinterpret_cast<Vector*>(shared.p[buffer] + to) = p[i];
            *reinterpret_cast<Vector*>(shared.q[buffer] + to) = q[i];
        }
    }
};

// P^T Q of a tile of dR, in the registers of the first kMmaThreads threads.
template <class Element, int kThreads>
struct GradientMma {
    static_assert(kThreads >= 128 && kThreads % 32 == 0);
    static constexpr int kMmaThreads = kThreads >= 256 ? 256 : 128;
    static constexpr int kColumns = kMmaThreads / 128;  // warps side by side
    using Mma = decltype(cute::make_tiled_mma(
        MmaOp<Element>{}, cute::Layout<cute::Shape<cute::_4, cute::Int<kColumns>, cute::_1>>{},
        cute::Tile<cute::Int<kDI>, cute::Int<16 * kColumns>, cute::_16>{}));
    using Copy = cute::Copy_Atom<cute::SM75_U16x8_LDSM_T, Element>;
    // (column, row) of a tile as GradientTile stores it.
    using Layout = decltype(cute::tile_to_shape(
        cute::composition(cute::Swizzle<3, 3, 3>{},
                          cute::Layout<cute::Shape<cute::Int<kDI>, cute::_8>,
                                       cute::Stride<cute::_1, cute::Int<kDI>>>{}),
        cute::Shape<cute::Int<kDI>, cute::Int<kDM>>{}));

    __device__ static auto zeros() {
        auto acc = cute::partition_fragment_C(Mma{}, cute::Shape<cute::Int<kDI>, cute::Int<kDJ>>{});
        cute::clear(acc);
        return acc;
    }

    // The (row, column) of each accumulator within the tile.
    __device__ static auto places() {
        const auto all = cute::make_identity_tensor(cute::Shape<cute::Int<kDI>, cute::Int<kDJ>>{});
        return Mma{}.get_slice(threadIdx.x).partition_C(all);
    }

    // acc += P^T Q of one step; `rows` x `columns` of the tile are within dR.
    template <class Acc>
    __device__ static void add(Acc& acc, GradientShared<Element>& shared, int buffer, int rows,
                               int columns) {
        using namespace cute;
        const auto at = places();
        if (get<0>(at(0, 0, 0)) - int(threadIdx.x % 32 / 4) >= rows) return;
        const Tensor p = make_tensor(make_smem_ptr(shared.p[buffer]), Layout{});
        const Tensor q = make_tensor(make_smem_ptr(shared.q[buffer]), Layout{});
        const auto mma = Mma{}.get_slice(threadIdx.x);
        const auto copy_p = make_tiled_copy_A(Copy{}, Mma{});
        const auto copy_q = make_tiled_copy_B(Copy{}, Mma{});
        Tensor fragment_p = mma.partition_fragment_A(p);
        Tensor fragment_q = mma.partition_fragment_B(q);
        const auto from_p = copy_p.get_slice(threadIdx.x).partition_S(p);
        const auto from_q = copy_q.get_slice(threadIdx.x).partition_S(q);
        auto to_p = copy_p.get_slice(threadIdx.x).retile_D(fragment_p);
        auto to_q = copy_q.get_slice(threadIdx.x).retile_D(fragment_q);
        CUTE_UNROLL
        for (int k = 0; k < size<2>(fragment_p); ++k) {
            copy(copy_p, from_p(_, _, k), to_p(_, _, k));
            copy(copy_q, from_q(_, _, k), to_q(_, _, k));
            CUTE_UNROLL
            for (int n = 0; n < size<2>(acc); ++n) {
                if (get<1>(at(0, 0, n)) - int(threadIdx.x % 4 * 2) >= columns) continue;
                gemm(Mma{}, fragment_p(_, 0, k), fragment_q(_, n, k), acc(_, 0, n));
            }
        }
    }
};

template <class Element, class Acc, class Places>
__device__ inline void store_gradient(const Problem& p, int adapter, int i0, int j0, const Acc& acc,
                                      const Places& at) {
    const int64_t first = int64_t(adapter) * p.rank * p.rank;
    CUTE_UNROLL
    for (int v = 0; v < cute::size(acc); ++v) {
        const int i = i0 + cute::get<0>(at(v)), j = j0 + cute::get<1>(at(v));
        if (i >= p.rank || j >= p.rank) continue;
        const int64_t to = first + i * p.rank + j;
        const float value = acc(v) * p.dr_scale;
        if (p.core_is_fp32) {
            static_cast<float*>(p.dr)[to] = value;
        } else {
            static_cast<Element*>(p.dr)[to] = Element(value);
        }
    }
}

// One chunk of the rows of one kDI x kDJ tile of one adapter's dR. With several chunks the sums go
// to p.partial, and the last chunk of a tile to arrive adds them up in the order of the rows. An
// adapter without rows gets zeros. All threads call it, after all of P is published; `counters`:
// one per tile; `shared` has GradientShared<Element>.
template <class Element, int kThreads>
__device__ __forceinline__ void core_gradient(const Problem& p, int item, int* counters,
                                              void* shared) {
    using Mma = GradientMma<Element, kThreads>;
    auto& s = *static_cast<GradientShared<Element>*>(shared);
    const int side = ceil_div(p.rank, kDI), tile = item / p.chunks, chunk = item % p.chunks;
    const int adapter = tile / (side * side);
    const int i0 = tile / side % side * kDI, j0 = tile % side * kDJ;
    const GradientRows rows(p, adapter, chunk);
    const bool multiplies = kThreads == Mma::kMmaThreads || threadIdx.x < Mma::kMmaThreads;

    auto acc = Mma::zeros();
    GradientTile<Element, kThreads> next;
    int step = rows.step_from(rows.begin), buffer = 0;
    if (step < rows.end) {
        next.load(rows, step, i0, j0);
        next.store(s, 0);
    }
    __syncthreads();
    while (step < rows.end) {
        step = rows.step_from(step + kDM);
        if (step < rows.end) next.load(rows, step, i0, j0);
        if (multiplies) Mma::add(acc, s, buffer, p.rank - i0, p.rank - j0);
        buffer ^= 1;
        if (step < rows.end) next.store(s, buffer);
        __syncthreads();
    }

    const auto at = Mma::places();
    if (p.chunks > 1) {
        float* sums = p.partial + int64_t(tile) * p.chunks * (kDI * kDJ) + threadIdx.x;
        CUTE_UNROLL
        for (int v = 0; v < cute::size(acc); ++v) {
            if (multiplies) sums[chunk * (kDI * kDJ) + v * Mma::kMmaThreads] = acc(v);
        }
        if (arrive(counters + tile, &s.slot) != p.chunks - 1) return;
        cute::clear(acc);
        for (int c = 0; c < p.chunks; ++c) {
            CUTE_UNROLL
            for (int v = 0; v < cute::size(acc); ++v) {
                if (multiplies) acc(v) += __ldcg(sums + c * (kDI * kDJ) + v * Mma::kMmaThreads);
            }
        }
    }
    if (multiplies) store_gradient<Element>(p, adapter, i0, j0, acc, at);
}

// db of kDbColumns columns: one CTA reads them once, each thread every kLanes-th row of a vector,
// and the threads' sums are added up in their order. `shared` has BiasShared<kThreads>.
template <class Element, int kThreads>
__device__ __forceinline__ void bias_gradient(const Problem& p, int item, void* shared) {
    constexpr int kPerRow = kDbColumns / kVector, kLanes = kThreads / kPerRow;
    static_assert(kThreads >= kDbColumns && kThreads % kPerRow == 0);
    auto& s = *static_cast<BiasShared<kThreads>*>(shared);
    const int lane = threadIdx.x / kPerRow, column = threadIdx.x % kPerRow * kVector;
    const int k0 = item * kDbColumns;
    const bool whole = has_vectors(p.x, p.x_row);
    const auto* x = static_cast<const Element*>(p.x) + k0 + column;
    float sum[kVector] = {};
#pragma unroll 4
    for (int m = lane; m < p.m; m += kLanes) {
        const Vector v = load_vector(x + m * p.x_row, p.k - k0 - column, whole);
        for (int i = 0; i < kVector / 2; ++i) {
            const float2 two = widen<Element>(v.pair[i]);
            sum[2 * i] += two.x, sum[2 * i + 1] += two.y;
        }
    }
    for (int i = 0; i < kVector; ++i) s.sum[lane][column + i] = sum[i];
    __syncthreads();
    const int k = k0 + threadIdx.x;
    if (threadIdx.x < kDbColumns && k < p.k) {
        float total = 0.f;
        for (int l = 0; l < kLanes; ++l) total += s.sum[l][threadIdx.x];
        static_cast<Element*>(p.db)[k] = Element(total);
    }
}

}  // namespace loraxs::gpu
