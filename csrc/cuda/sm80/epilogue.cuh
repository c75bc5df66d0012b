// From accumulators to D: every element is written once, in vectors where D's rows allow it.
#pragma once

#include "../problem.h"
#include "product.cuh"

namespace loraxs::gpu::sm80 {

// The accumulators of a tile in shared memory, in fp32: bias and base are added before the one
// rounding. With this pitch the stores of eight rows, four pairs each, share no bank.
inline constexpr int kEpiloguePitch = kBN + 8;
inline constexpr int kEpilogueShared = kBM * kEpiloguePitch * sizeof(float);

// Eight neighbours. Every second four threads take the upper half first: no two share a bank.
__device__ inline void read_row(const float* from, float (&out)[kVector]) {
    const bool upper = threadIdx.x & 4;
    const auto* half = reinterpret_cast<const float4*>(from);
    const float4 one = half[upper ? 1 : 0], two = half[upper ? 0 : 1];
    *reinterpret_cast<float4*>(out) = upper ? two : one;
    *reinterpret_cast<float4*>(out + 4) = upper ? one : two;
}

template <class Element>
__device__ inline void add_vector(float (&to)[kVector], const Vector& v) {
    for (int i = 0; i < kVector / 2; ++i) {
        const float2 two = widen<Element>(v.pair[i]);
        to[2 * i] += two.x, to[2 * i + 1] += two.y;
    }
}

template <class Element>
__device__ inline void store_row(Element* to, const float (&value)[kVector], int count,
                                 bool whole) {
    Vector v;
    for (int i = 0; i < kVector / 2; ++i) {
        v.pair[i] = narrow<Element>(value[2 * i], value[2 * i + 1]);
    }
    if (whole && count >= kVector) {
        *reinterpret_cast<Vector*>(to) = v;
        return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        if (i < count) to[i] = Element::bitcast(uint16_t(v.pair[i / 2] >> 16 * (i % 2)));
    }
}

// D = acc + bias + base for one tile. All threads call it; shared memory is free before.
template <class Element>
__device__ inline void store_output(const Problem& p, const Accumulator<Element, kBN>& acc,
                                    int row0, int col0, float* shared) {
    constexpr int kPerRow = kBN / kVector;
    const auto at = Warps<Element, kBN>::places();
    CUTE_UNROLL
    for (int v = 0; v < cute::size(acc); v += 2) {
        float* to = shared + cute::get<0>(at(v)) * kEpiloguePitch + cute::get<1>(at(v));
        *reinterpret_cast<float2*>(to) = {acc(v), acc(v + 1)};
    }
    __syncthreads();
    const int col = threadIdx.x % kPerRow * kVector, count = p.n - col0 - col;
    const auto* bias = static_cast<const Element*>(p.bias) + col0 + col;
    const auto* base = static_cast<const Element*>(p.base) + col0 + col;
    auto* d = static_cast<Element*>(p.d) + col0 + col;
    const bool whole_bias = has_vectors(p.bias, 0);
    const bool whole_base = has_vectors(p.base, p.base_row), whole_d = has_vectors(p.d, p.d_row);
    Vector added{};
    if (p.bias) added = load_vector(bias, count, whole_bias);
#pragma unroll 2
    for (int row = threadIdx.x / kPerRow; row < kBM; row += kThreads / kPerRow) {
        const int64_t m = row0 + row;
        if (m >= p.m) break;
        float value[kVector];
        read_row(shared + row * kEpiloguePitch + col, value);
        if (p.bias) add_vector<Element>(value, added);
        if (p.base)
            add_vector<Element>(value, load_vector(base + m * p.base_row, count, whole_base));
        store_row(d + m * p.d_row, value, count, whole_d);
    }
}

// A tile's columns of Q (or P), `columns` of them, rounded where they are stored.
template <class Element, int kColumns>
__device__ inline void store_side(const Problem& p, const Accumulator<Element, kColumns>& q,
                                  int row0, int rank0) {
    const auto at = Warps<Element, kColumns>::places();
    const bool pairs = width_of(p.side, p.side_row, 2) >= 2;
    CUTE_UNROLL
    for (int v = 0; v < cute::size(q); v += 2) {
        const int m = row0 + cute::get<0>(at(v)), j = rank0 + cute::get<1>(at(v));
        if (m >= p.m || j >= p.rank) continue;
        auto* to = static_cast<Element*>(p.side) + m * p.side_row + j;
        if (pairs && j + 1 < p.rank) {
            *reinterpret_cast<uint32_t*>(to) = narrow<Element>(q(v), q(v + 1));
        } else {
            to[0] = Element(q(v));
            if (j + 1 < p.rank) to[1] = Element(q(v + 1));
        }
    }
}

}  // namespace loraxs::gpu::sm80
