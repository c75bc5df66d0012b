// Vectors of LORAXS_LANES floats by GCC/Clang vector extensions, with loads that widen 16-bit
// floats and stores that round to nearest even. Included once per instruction set, by
// kernels_impl.h.
//
// No standard-library template may be used here or in kernels_impl.h: an instantiation compiled for
// a newer instruction set could be the copy that the linker keeps for the whole library.

#include "kernels.h"

#define LORAXS_INLINE inline __attribute__((always_inline))
#define LORAXS_LAMBDA __attribute__((always_inline))

namespace loraxs::LORAXS_ARCH {
namespace {

constexpr int kLanes = LORAXS_LANES;

typedef float Vec __attribute__((vector_size(4 * LORAXS_LANES)));
typedef uint32_t VecU32 __attribute__((vector_size(4 * LORAXS_LANES)));
typedef int32_t VecI32 __attribute__((vector_size(4 * LORAXS_LANES)));
typedef uint16_t VecU16 __attribute__((vector_size(2 * LORAXS_LANES)));
typedef uint64_t HalfU64 __attribute__((vector_size(4 * LORAXS_LANES)));  // half as many lanes
typedef int64_t HalfI64 __attribute__((vector_size(4 * LORAXS_LANES)));
typedef int32_t HalfI32 __attribute__((vector_size(2 * LORAXS_LANES)));
typedef uint8_t HalfU8 __attribute__((vector_size(LORAXS_LANES / 2)));
typedef float Vec4 __attribute__((vector_size(16)));
typedef float Vec8 __attribute__((vector_size(32)));

// The element type behind the tag pointer of with_type().
template <typename Tag>
struct ElementOf;
template <typename T>
struct ElementOf<const T*> {
    using Type = T;
};
template <typename Tag>
using Element = typename ElementOf<Tag>::Type;

LORAXS_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

LORAXS_INLINE Vec splat(float value) { return value - Vec{}; }

LORAXS_INLINE Vec load(const float* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

LORAXS_INLINE Vec load(const BFloat16* p) {
    VecU16 bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    const VecU32 wide = __builtin_convertvector(bits, VecU32) << 16;
    return (Vec)wide;
}

LORAXS_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

LORAXS_INLINE void store(BFloat16* p, Vec v) {
    const VecU32 bits = (VecU32)v;
    const VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const VecU32 is_nan = (VecU32)(v != v);
    const VecU32 result = (rounded & ~is_nan) | (0x7fc0u & is_nan);
    const VecU16 narrow = __builtin_convertvector(result, VecU16);
    __builtin_memcpy(p, &narrow, sizeof narrow);
}

#if LORAXS_LANES == 16
LORAXS_INLINE Vec load(const Float16* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (Vec)_mm512_maskz_cvtph_ps(0xffff, h);
}
LORAXS_INLINE void store(Float16* p, Vec v) {
    const __m256i h =
        _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
}
#elif LORAXS_LANES == 8
LORAXS_INLINE Vec load(const Float16* p) {
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LORAXS_INLINE void store(Float16* p, Vec v) {
    const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
}
#elif defined(__aarch64__)
typedef __fp16 VecF16 __attribute__((vector_size(2 * LORAXS_LANES)));
LORAXS_INLINE Vec load(const Float16* p) {
    VecF16 h;
    __builtin_memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, Vec);
}
LORAXS_INLINE void store(Float16* p, Vec v) {
    const VecF16 h = __builtin_convertvector(v, VecF16);
    __builtin_memcpy(p, &h, sizeof h);
}
#else
// Shifting a half's exponent and mantissa into a float's place gives its value times 2^-112,
// exactly and for subnormals too; infinities and NaNs get the float's all-ones exponent back.
LORAXS_INLINE Vec load(const Float16* p) {
    VecU16 bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    const VecU32 wide = __builtin_convertvector(bits, VecU32);
    const VecU32 magnitude = wide & 0x7fffu;
    const VecU32 special = (VecU32)(magnitude >= 0x7c00u) & 0x7f800000u;
    const Vec value = (Vec)(magnitude << 13) * 0x1p112f;
    return (Vec)((VecU32)value | special | ((wide & 0x8000u) << 16));
}
LORAXS_INLINE uint16_t round_to_half(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;  // NaN
    } else if (magnitude >= 0x477ff000u) {
        half = 0x7c00u;  // 65520 and above round to infinity
    } else if (magnitude >= 0x38800000u) {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    } else {
        // Subnormal: adding 0.5 puts the bit of weight 2^-24 last in the mantissa and rounds there.
        float shifted;
        __builtin_memcpy(&shifted, &magnitude, sizeof shifted);
        shifted += 0.5f;
        __builtin_memcpy(&half, &shifted, sizeof half);
        half -= 0x3f000000u;
    }
    return static_cast<uint16_t>(sign | half);
}
LORAXS_INLINE void store(Float16* p, Vec v) {
    for (int i = 0; i < kLanes; ++i) p[i].bits = round_to_half(v[i]);
}
#endif

// Products of the low 32 bits of each lane.
LORAXS_INLINE HalfU64 multiply_low(HalfU64 a, HalfU64 b) {
#if LORAXS_LANES == 16
    return (HalfU64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif LORAXS_LANES == 8
    return (HalfU64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (HalfU64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

template <typename T>
LORAXS_INLINE Vec load_some(const T* p, int64_t n) {
    T padded[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
    return load(padded);
}

template <typename T>
LORAXS_INLINE void store_some(T* p, Vec v, int64_t n) {
    T padded[kLanes];
    store(padded, v);
    for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

LORAXS_INLINE Vec4 fold(Vec4 v) { return v; }
LORAXS_INLINE Vec4 fold(Vec8 v) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
#if LORAXS_LANES == 16
LORAXS_INLINE Vec4 fold(Vec v) {
    return fold(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
#endif

// The sums over the lanes of four vectors.
LORAXS_INLINE Vec4 sum_lanes(Vec v0, Vec v1, Vec v2, Vec v3) {
    const Vec4 a = fold(v0), b = fold(v1), c = fold(v2), d = fold(v3);
    const Vec4 ab =
        __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Vec4 cd =
        __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) +
           __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

}  // namespace
}  // namespace loraxs::LORAXS_ARCH
