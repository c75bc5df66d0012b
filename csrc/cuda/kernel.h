// What the host knows about a compiled kernel: its tiles, its resources, its entry point.
#pragma once

#include "problem.h"

namespace loraxs::gpu {

enum class Element : int32_t { kBFloat16 = 0, kFloat16 = 1 };
enum class Direction : int32_t { kForward = 0, kBackward = 1 };

// Families of kernels, as backends/cuda/plan.py names them.
enum class Family : int32_t {
    kRideAlong = 0,  // sm_80 and later: each tile computes its own Q
    kTicket = 1,     // sm_80 and later: Q is an item of its own
    kFewRows = 2,    // sm_80 and later, M <= 64: W streamed once, K in parts
    kCluster = 3,    // sm_90a: TMA, wgmma, Q shared by a cluster
};

// A tensor map (TMA) that the host has to encode for a launch: a two-dimensional row-major tensor
// of the element type, read in boxes.
struct TensorMap {
    const void* data;
    int64_t columns, rows, row_stride;  // elements
    int32_t box_columns, box_rows;      // elements
    int32_t swizzle;                    // bytes: 0, 32, 64 or 128
};
inline constexpr int kMaxTensorMaps = 4;

// One entry point. A kernel's parameters are `const __grid_constant__ Problem` and, if `maps` > 0,
// that many `const __grid_constant__ CUtensorMap`.
struct Kernel {
    const char* name;      // of the entry point in PTX and SASS (extern "C")
    const void* function;  // for cudaLaunchKernelExC
    Family family;
    Element element;
    Direction direction;
    int32_t min_arch;  // 80 or 90
    bool exact_arch;   // runs on min_arch alone (sm_90a)
    bool aligned;      // X and W (kCluster: all): data, lines and their distances in 16 bytes
    int32_t max_rows;  // 0: any M
    int32_t max_rank;  // the largest rank it takes
    int32_t threads, cluster, shared;  // shared: bytes of dynamic shared memory
    int32_t bm, bn, bk, br;            // tile of D, step along K, columns of a slice of Q
    int32_t cr;                        // step of T B'^T along the rank: t_cols is a multiple of it
    int32_t di, dj, dm;                // tile of dR and step along its rows
    int32_t db_columns;                // columns of one item of db
    int32_t maps;                      // tensor maps, filled in by `tensor_maps`
    void (*tensor_maps)(const Problem&, TensorMap*);
};

// The kernels of each family's source files. Every .cu file registers its own by a static
// KernelTable; the registry is a linked list, so nothing is listed twice.
struct KernelTable {
    KernelTable(const Kernel* kernels, int count);
    const Kernel* kernels;
    int count;
    const KernelTable* next;
    static const KernelTable*& head();
};

}  // namespace loraxs::gpu
