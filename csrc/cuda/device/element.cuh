// The 16-bit element types: their matrix instruction, their conversions, vectors of eight.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cstdint>
#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

namespace loraxs::gpu {

using BFloat16 = cutlass::bfloat16_t;
using Float16 = cutlass::half_t;

// D[16, 8] += A[16, 16] B[8, 16]^T, accumulated in fp32.
template <class Element>
using MmaOp =
    std::conditional_t<std::is_same_v<Element, BFloat16>, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                       cute::SM80_16x8x16_F32F16F16F32_TN>;

inline constexpr int kVector = 8;  // elements of 16 bytes

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Eight elements. A pair is one register, the lower half first.
struct alignas(16) Vector {
    uint32_t pair[4];
};

template <class Element>
__device__ inline float2 widen(uint32_t pair) {
    if constexpr (std::is_same_v<Element, BFloat16>) {
        return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
    } else {
        return {float(Float16::bitcast(uint16_t(pair))), float(Float16::bitcast(pair >> 16))};
    }
}

template <class Element>
__device__ inline uint32_t narrow(float first, float second) {
    return uint32_t(Element(first).raw()) | uint32_t(Element(second).raw()) << 16;
}

// Whether whole vectors of a matrix with rows `pitch` elements apart are aligned.
__device__ inline bool has_vectors(const void* data, int64_t pitch) {
    return pitch % kVector == 0 && reinterpret_cast<uintptr_t>(data) % sizeof(Vector) == 0;
}

// The first `count` of eight elements (fewer than one: none), zeros for the others. `whole`: eight
// may be read as one vector. Past L1: what another CTA of this launch has written is seen.
template <class Element>
__device__ inline Vector load_vector(const Element* at, int count, bool whole) {
    Vector out{};
    if (whole && count >= kVector) {
        const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(at));
        return {{bits.x, bits.y, bits.z, bits.w}};
    }
    const auto* one = reinterpret_cast<const unsigned short*>(at);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        if (i < count) out.pair[i / 2] |= uint32_t(__ldcg(one + i)) << 16 * (i % 2);
    }
    return out;
}

}  // namespace loraxs::gpu
