// The sm_80 training kernels in fp16, forward.
#include "kernels.cuh"

using namespace loraxs::gpu;

LORAXS_SM80_KERNEL(loraxs_sm80_ride_along_fp16_forward, Float16, Direction::kForward,
                   Family::kRideAlong, true)
LORAXS_SM80_KERNEL(loraxs_sm80_ticket_fp16_forward, Float16, Direction::kForward, Family::kTicket,
                   true)
LORAXS_SM80_KERNEL(loraxs_sm80_unaligned_fp16_forward, Float16, Direction::kForward,
                   Family::kTicket, false)

static const Kernel kernels[] = {
    sm80::describe<Float16, Direction::kForward, Family::kRideAlong, true>(
        "loraxs_sm80_ride_along_fp16_forward", loraxs_sm80_ride_along_fp16_forward),
    sm80::describe<Float16, Direction::kForward, Family::kTicket, true>(
        "loraxs_sm80_ticket_fp16_forward", loraxs_sm80_ticket_fp16_forward),
    sm80::describe<Float16, Direction::kForward, Family::kTicket, false>(
        "loraxs_sm80_unaligned_fp16_forward", loraxs_sm80_unaligned_fp16_forward),
};
static const KernelTable table(kernels, 3);
