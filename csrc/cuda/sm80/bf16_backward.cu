// The sm_80 training kernels in bf16, backward.
#include "kernels.cuh"

using namespace loraxs::gpu;

LORAXS_SM80_KERNEL(loraxs_sm80_ride_along_bf16_backward, BFloat16, Direction::kBackward,
                   Family::kRideAlong, true)
LORAXS_SM80_KERNEL(loraxs_sm80_ticket_bf16_backward, BFloat16, Direction::kBackward,
                   Family::kTicket, true)
LORAXS_SM80_KERNEL(loraxs_sm80_unaligned_bf16_backward, BFloat16, Direction::kBackward,
                   Family::kTicket, false)

static const Kernel kernels[] = {
    sm80::describe<BFloat16, Direction::kBackward, Family::kRideAlong, true>(
        "loraxs_sm80_ride_along_bf16_backward", loraxs_sm80_ride_along_bf16_backward),
    sm80::describe<BFloat16, Direction::kBackward, Family::kTicket, true>(
        "loraxs_sm80_ticket_bf16_backward", loraxs_sm80_ticket_bf16_backward),
    sm80::describe<BFloat16, Direction::kBackward, Family::kTicket, false>(
        "loraxs_sm80_unaligned_bf16_backward", loraxs_sm80_unaligned_bf16_backward),
};
static const KernelTable table(kernels, 3);
