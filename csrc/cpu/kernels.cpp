#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace loraxs {
namespace {

const KernelTable& choose_kernels() {
#ifdef LORAXS_X86_KERNELS
    // The variable lets a test exercise, on one machine, the code that other machines run.
    const char* limit = std::getenv("LORAXS_CPU_ISA");
    const bool any = limit == nullptr || *limit == '\0';
    const bool want_avx512 = any || std::strcmp(limit, "avx512") == 0;
    const bool want_avx2 = want_avx512 || std::strcmp(limit, "avx2") == 0;
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (want_avx512 && avx512) return kAvx512Kernels;
    if (want_avx2 && avx2) return kAvx2Kernels;
#endif
    return kGenericKernels;
}

struct Buffer {
    struct Free {
        void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
    };
    std::unique_ptr<float, Free> data;
    size_t size = 0;
};

}  // namespace

const KernelTable& kernels() {
    static const KernelTable& table = choose_kernels();
    return table;
}

float* scratch(Slot slot, size_t floats) {
    thread_local Buffer buffers[2];
    Buffer& buffer = buffers[static_cast<int>(slot)];
    if (buffer.size < floats) {
        buffer.data.reset();
        buffer.size = 0;
        buffer.data.reset(
            static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t{64})));
        buffer.size = floats;
    }
    return buffer.data.get();
}

}  // namespace loraxs
