// Flags in global memory: how the CTAs of one launch hand work to each other.
//
// * A CTA only waits for work whose ticket is lower than its own. Tickets are drawn in order, so
//   the producer is running or done, whatever is resident and in whatever order.
// * A barrier stands between the stores of all threads and the one thread that releases a flag.
// * Data behind a flag is read past L1 (ld.global.cg), which is not coherent.
// * All flags are zero between launches: the last CTA to leave sets them back. Nobody can still
//   read them then, and no second launch (a memset) is needed. They survive graph replay.
#pragma once

#include <cstdint>

namespace loraxs::gpu {

// Layout of the flags: these four, then per row block "T is ready" and "slices of Q that arrived",
// then one counter per tile of dR, then (few rows) one per tile of D. geometry.cpp counts them.
enum Flag : int { kTicket = 0, kLeft = 1, kPublished = 2, kFixedFlags = 4 };

__device__ inline int atomic_add_relaxed(int* address, int value) {
    int old;
    asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(address), "r"(value)
                 : "memory");
    return old;
}

__device__ inline int atomic_add_acq_rel(int* address, int value) {
    int old;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(address), "r"(value)
                 : "memory");
    return old;
}

__device__ inline int load_acquire(const int* address) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

// The next ticket, for all threads of the CTA. `slot`: one int of shared memory of its own.
__device__ inline int draw(int* flags, int* slot) {
    if (threadIdx.x == 0) *slot = atomic_add_relaxed(flags + kTicket, 1);
    __syncthreads();
    return *slot;
}

// Counts one producer as done: what its CTA stored is visible to who acquires the flag. All threads
// call it.
__device__ inline void release(int* flag) {
    __syncthreads();
    if (threadIdx.x == 0) atomic_add_acq_rel(flag, 1);
}

// Like release, for those who may be the last: how many came before, for all threads. What those
// stored is visible to this CTA.
__device__ inline int arrive(int* flag, int* slot) {
    __syncthreads();
    if (threadIdx.x == 0) *slot = atomic_add_acq_rel(flag, 1);
    __syncthreads();
    return *slot;
}

// Until `count` producers have released the flag. All threads call it.
__device__ inline void wait(const int* flag, int count) {
    if (threadIdx.x == 0) {
        while (load_acquire(flag) < count) {
        }
    }
    __syncthreads();
}

// Leaves the launch; the last of `leavers` CTAs to do so zeroes all flags.
__device__ inline void leave(int* flags, int count, int leavers, int* slot) {
    if (arrive(flags + kLeft, slot) == leavers - 1) {
        for (int i = threadIdx.x; i < count; i += blockDim.x) flags[i] = 0;
    }
}

}  // namespace loraxs::gpu
