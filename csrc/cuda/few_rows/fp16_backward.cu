// The few-row kernels: fp16, backward. See few_rows.cuh.
#include "few_rows.cuh"

namespace {

using namespace loraxs::gpu;
using Rows16 = few_rows::Tiling<Float16, Direction::kBackward, 16>;
using Rows64 = few_rows::Tiling<Float16, Direction::kBackward, 64>;

}  // namespace

LORAXS_FEW_ROWS_KERNEL(loraxs_few_rows_16_fp16_backward, Rows16)
LORAXS_FEW_ROWS_KERNEL(loraxs_few_rows_64_fp16_backward, Rows64)

static const Kernel kernels[] = {
    few_rows::describe<Rows16>("loraxs_few_rows_16_fp16_backward",
                               loraxs_few_rows_16_fp16_backward),
    few_rows::describe<Rows64>("loraxs_few_rows_64_fp16_backward",
                               loraxs_few_rows_64_fp16_backward),
};
static const KernelTable table(kernels, 2);
