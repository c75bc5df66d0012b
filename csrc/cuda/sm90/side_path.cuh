// From the slices of Q in the registers of a cluster to T = f Q R' in the shared memory of each of
// its CTAs.
//
// Each CTA has kBR columns of Q; all of Q is gathered in every CTA through distributed shared
// memory. Each CTA then computes kBR columns of T, by wgmma in tf32: Q is exact in tf32, and a
// float32 R' is the sum of two tf32 numbers up to 2^-22, so it takes two products; a 16-bit R'
// takes one. The columns of T are gathered like those of Q.
//
// Cost per cluster: 2 kBM r^2 FLOPs per product, r rounded up to 32 along the rows of R' and to
// kCluster kBR along its columns; R' once; 2 (kCluster - 1) kBM r elements through distributed
// shared memory.
#pragma once

#include "main_loop.cuh"

namespace loraxs::gpu::sm90 {

// The accumulators of the CTA's columns of Q or T, rounded, to its columns of `region`.
template <class T, class Acc, class Region>
__device__ void store_slice(const Acc& acc, float factor, const Region& region, int rank) {
    using Element = typename T::Element;
    const auto slice = typename T::template Mma<T::kBR>{}.get_slice(threadIdx.x);
    const auto at = slice.partition_C(make_identity_tensor(Shape<Int<kBM>, Int<T::kBR>>{}));
    CUTE_UNROLL
    for (int v = 0; v < size(acc); v += 2) {
        const int row = get<0>(at(v)), column = rank * T::kBR + get<1>(at(v));
        *reinterpret_cast<uint32_t*>(&region(row, column % kBlock, column / kBlock)) =
            narrow<Element>(acc(v) * factor, acc(v + 1) * factor);
    }
}

// Copies the CTA's columns of `region` to the same place in the other CTAs, a vector at a time;
// each warp those 16 rows that it stored. `also` gets each vector and its row and column.
template <class T, class Region, class Also>
__device__ void share_slice(const Region& region, int rank, Also also) {
    constexpr int kPerRow = T::kBR / kVector, kSpread = 8 / kPerRow;
    const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 16;
    __syncwarp();
    CUTE_UNROLL
    for (int pass = 0; pass < 16 * kPerRow / 32; ++pass) {
        // Eight lanes take rows whose vectors share no bank.
        const int n = pass * (32 / kPerRow) + lane / kPerRow;
        const int row = row0 + n % kSpread * kPerRow + n / kSpread % kPerRow + n / 8 * 8;
        const int column = rank * T::kBR + lane % kPerRow * kVector;
        const auto* from = &region(row, column % kBlock, column / kBlock);
        const Vector v = *reinterpret_cast<const Vector*>(from);
        CUTE_UNROLL
        for (int other = 1; other < kCluster; ++other) {
            store_remote(remote(from, (rank + other) % kCluster), v);
        }
        also(row, column, v);
    }
}

// `count` elements of a row of a matrix in global memory, at most eight.
template <class Element>
__device__ inline void store_vector(Element* to, const Vector& v, int count, bool whole) {
    if (whole && count >= kVector) {
        *reinterpret_cast<Vector*>(to) = v;
        return;
    }
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) {
        if (i < count) to[i] = Element::bitcast(uint16_t(v.pair[i / 2] >> 16 * (i % 2)));
    }
}

// Gathers Q; the first group of a row block also stores it in global memory. Between the two
// arrivals at the cluster's barrier, of which the caller waits for the second.
template <class T, class Q>
__device__ void gather_q(const Problem& p, Shared<T>& s, const Place& at, const Q& q) {
    using Element = typename T::Element;
    const auto region = s.qs();
    store_slice<T>(q, 1.f, region, at.rank);
    const bool stores = p.side && at.group == 0, whole = has_vectors(p.side, p.side_row);
    share_slice<T>(region, at.rank, [&](int row, int column, const Vector& v) {
        if (!stores || at.row0() + row >= p.m) return;
        auto* to = static_cast<Element*>(p.side) + (at.row0() + row) * p.side_row + column;
        store_vector(to, v, p.rank - column, whole);
    });
}

// One thread's part of kCoreStep rows of R' (the CTA's kBR columns), on its way to shared memory. A
// warp takes blocks of 8 x 8: its lanes eight columns and four rows, every other one, so that
// neither reads of global memory nor stores to shared memory are scattered.
template <class T>
struct CoreRows {
    static constexpr int kEach = kCoreStep * T::kBR / kConsumers;
    static_assert(kEach >= 2);
    float value[kEach];

    // The row and column of this thread's i-th element.
    __device__ static int2 place(int i) {
        const int lane = threadIdx.x % 32;
        const int block = threadIdx.x / 32 * (kEach / 2) + i / 2;
        return {block % 4 * 8 + lane / 8 * 2 + i % 2, block / 4 * 8 + lane % 8};
    }

    __device__ void load(const Problem& p, int l0, int j0) {
        using Element = typename T::Element;
        CUTE_UNROLL
        for (int i = 0; i < kEach; ++i) {
            const int l = l0 + place(i).x, j = j0 + place(i).y;
            value[i] = 0.f;
            if (l < p.rank && j < p.rank) {
                const int64_t offset = l * p.core_row + j * p.core_col;
                value[i] = p.core_is_fp32 ? static_cast<const float*>(p.core)[offset]
                                          : float(static_cast<const Element*>(p.core)[offset]);
            }
        }
    }

    // The instruction's k = t and t + 4 are rows 2t and 2t + 1 of R', so that a thread's two
    // elements of Q are one register in shared memory.
    template <class Cores>
    __device__ void store(const Cores& cores, int buffer) const {
        CUTE_UNROLL
        for (int i = 0; i < kEach; ++i) {
            const int l = place(i).x, j = place(i).y;
            const int k = l / 8 * 8 + l % 2 * 4 + l % 8 / 2;
            const tfloat32_t high(value[i]);
            cores(j, k, 2 * buffer) = high;
            cores(j, k, 2 * buffer + 1) = tfloat32_t(value[i] - float(high));
        }
    }
};

// kCoreStep columns of Q as the left operand of a tf32 wgmma.
template <class T, class Region, class Fragment>
__device__ void load_q(const Region& region, int l0, Fragment& q) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    CUTE_UNROLL
    for (int k = 0; k < kCoreStep / 8; ++k) {
        const int l = l0 + 8 * k + lane % 4 * 2;
        CUTE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const auto* from = &region(row + 8 * half, l % kBlock, l / kBlock);
            const float2 two = widen<typename T::Element>(*reinterpret_cast<const uint32_t*>(from));
            q(make_coord(half, 0), 0, k) = tfloat32_t::bitcast(__float_as_uint(two.x));
            q(make_coord(half, 1), 0, k) = tfloat32_t::bitcast(__float_as_uint(two.y));
        }
    }
}

// t = the CTA's columns of Q R', with R' as one or two tf32 numbers; waits for the cluster's
// barrier before it reads Q.
template <bool kTwo, class T, class Acc>
__device__ void multiply_core(const Problem& p, Shared<T>& s, const Place& at, Acc& t) {
    typename T::CoreMma mma;
    const auto slice = mma.get_slice(threadIdx.x);
    const auto cores = slice.make_fragment_B(slice.partition_B(s.cores()));
    auto q = make_tensor<tfloat32_t>(partition_shape_A(mma, Shape<Int<kBM>, Int<kCoreStep>>{}));
    const int j0 = at.rank * T::kBR;
    CoreRows<T> rows;
    rows.load(p, 0, j0);
    cluster_wait();
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    for (int l0 = 0, buffer = 0; l0 < p.rank; l0 += kCoreStep, buffer ^= 1) {
        rows.store(s.cores(), buffer);
        cutlass::arch::fence_view_async_shared();
        sync_consumers();
        if (l0 + kCoreStep < p.rank) rows.load(p, l0 + kCoreStep, j0);
        load_q<T>(s.qs(), l0, q);
        warpgroup_fence_operand(t);
        warpgroup_fence_operand(q);
        warpgroup_arrive();
        CUTE_UNROLL
        for (int k = 0; k < kCoreStep / 8; ++k) {
            gemm(mma, q(_, _, k), cores(_, _, k, 2 * buffer), t);
            mma.accumulate_ = GMMA::ScaleOut::One;
            if constexpr (kTwo) gemm(mma, q(_, _, k), cores(_, _, k, 2 * buffer + 1), t);
        }
        warpgroup_commit_batch();
        warpgroup_wait<0>();
        warpgroup_fence_operand(t);
        warpgroup_fence_operand(q);
    }
}

}  // namespace loraxs::gpu::sm90
