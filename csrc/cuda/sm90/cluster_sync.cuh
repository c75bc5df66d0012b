// How the CTAs of a cluster reach each other: shared memory and barriers of another CTA.
//
// Data are handed over by the cluster's own barrier (cute::cluster_arrive, cluster_wait: release
// and acquire among all threads that have not exited). `arrive_remote` orders reads alone: whoever
// waits for it may overwrite what the arriving thread has read. A release of cluster scope would
// cost a memory barrier for the whole GPU in every step of the main loop, and there is nothing to
// release.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/util.hpp>

#include "../device/element.cuh"

namespace loraxs::gpu::sm90 {

// The address of `local` in the CTA `rank` of the cluster.
__device__ inline uint32_t remote(const void* local, int rank) {
    return cute::set_block_rank(cute::cast_smem_ptr_to_uint(local), rank);
}

__device__ inline int load_remote(uint32_t address) {
    int value;
    asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

__device__ inline void store_remote(uint32_t address, const Vector& v) {
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.pair[0]),
                 "r"(v.pair[1]), "r"(v.pair[2]), "r"(v.pair[3])
                 : "memory");
}

// One arrival at the mbarrier that stands at `local` in the CTA `rank`.
__device__ inline void arrive_remote(const uint64_t* local, int rank) {
    cutlass::arch::ClusterBarrier::arrive(local, rank, 1u);
}

// What this thread stored in any CTA's shared memory is visible to wgmma and TMA.
__device__ inline void fence_async_cluster() {
    asm volatile("fence.proxy.async.shared::cluster;" ::: "memory");
}

}  // namespace loraxs::gpu::sm90
