// The sm_80 training kernels in bf16, forward.
#include "kernels.cuh"

using namespace loraxs::gpu;

LORAXS_SM80_KERNEL(loraxs_sm80_ride_along_bf16_forward, BFloat16, Direction::kForward,
                   Family::kRideAlong, true)
LORAXS_SM80_KERNEL(loraxs_sm80_ticket_bf16_forward, BFloat16, Direction::kForward, Family::kTicket,
                   true)
LORAXS_SM80_KERNEL(loraxs_sm80_unaligned_bf16_forward, BFloat16, Direction::kForward,
                   Family::kTicket, false)

static const Kernel kernels[] = {
    sm80::describe<BFloat16, Direction::kForward, Family::kRideAlong, true>(
        "loraxs_sm80_ride_along_bf16_forward", loraxs_sm80_ride_along_bf16_forward),
    sm80::describe<BFloat16, Direction::kForward, Family::kTicket, true>(
        "loraxs_sm80_ticket_bf16_forward", loraxs_sm80_ticket_bf16_forward),
    sm80::describe<BFloat16, Direction::kForward, Family::kTicket, false>(
        "loraxs_sm80_unaligned_bf16_forward", loraxs_sm80_unaligned_bf16_forward),
};
static const KernelTable table(kernels, 3);
