// The cluster kernels: fp16, backward. See cluster.cuh.
#include "cluster.cuh"

namespace {

using namespace loraxs::gpu;
using Rank64 = sm90::Tiles<Float16, Direction::kBackward, 16>;
using Rank128 = sm90::Tiles<Float16, Direction::kBackward, 32>;
using Rank256 = sm90::Tiles<Float16, Direction::kBackward, 64>;

}  // namespace

LORAXS_CLUSTER_KERNEL(loraxs_sm90_cluster_64_fp16_backward, Rank64)
LORAXS_CLUSTER_KERNEL(loraxs_sm90_cluster_128_fp16_backward, Rank128)
LORAXS_CLUSTER_KERNEL(loraxs_sm90_cluster_256_fp16_backward, Rank256)

static const Kernel kernels[] = {
    sm90::describe<Rank64>("loraxs_sm90_cluster_64_fp16_backward",
                           loraxs_sm90_cluster_64_fp16_backward),
    sm90::describe<Rank128>("loraxs_sm90_cluster_128_fp16_backward",
                            loraxs_sm90_cluster_128_fp16_backward),
    sm90::describe<Rank256>("loraxs_sm90_cluster_256_fp16_backward",
                            loraxs_sm90_cluster_256_fp16_backward),
};
static const KernelTable table(kernels, 3);
