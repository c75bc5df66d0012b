// Any processor: four lanes (SSE2, NEON, or whatever the compiler makes of them).
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define LORAXS_ARCH generic
#define LORAXS_LANES 4
#if defined(__aarch64__)
#define LORAXS_TILE_ROWS 8
#else
#define LORAXS_TILE_ROWS 4
#endif
#define LORAXS_DOT_ROWS 2

#include "kernels_impl.h"

namespace loraxs {
constinit const KernelTable kGenericKernels = generic::table("generic");
}
