// x86-64 with AVX2, FMA and F16C. 16 registers: 6x2 accumulators in `tile`, 3x4 in `dot`.
#include "kernels.h"

#ifdef LORAXS_X86_KERNELS
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

#define LORAXS_ARCH avx2
#define LORAXS_LANES 8
#define LORAXS_TILE_ROWS 6
#define LORAXS_DOT_ROWS 3

#include "kernels_impl.h"

#ifdef __clang__
#pragma clang attribute pop
#endif

namespace loraxs {
constinit const KernelTable kAvx2Kernels = avx2::table("avx2");
}
#endif
