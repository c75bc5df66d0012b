// x86-64 with AVX-512 F, BW, DQ and VL. 32 registers: 8x2 accumulators in `tile`, 4x4 in `dot`.
#include "kernels.h"

#ifdef LORAXS_X86_KERNELS
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi2,prefer-vector-width=512")
#endif

#define LORAXS_ARCH avx512
#define LORAXS_LANES 16
#define LORAXS_TILE_ROWS 8
#define LORAXS_DOT_ROWS 4

#include "kernels_impl.h"

#ifdef __clang__
#pragma clang attribute pop
#endif

namespace loraxs {
constinit const KernelTable kAvx512Kernels = avx512::table("avx512");
}
#endif
