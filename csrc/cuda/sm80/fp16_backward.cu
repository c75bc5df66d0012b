// The sm_80 training kernels in fp16, backward.
#include "kernels.cuh"

using namespace loraxs::gpu;

LORAXS_SM80_KERNEL(loraxs_sm80_ride_along_fp16_backward, Float16, Direction::kBackward,
                   Family::kRideAlong, true)
LORAXS_SM80_KERNEL(loraxs_sm80_ticket_fp16_backward, Float16, Direction::kBackward, Family::kTicket,
                   true)
LORAXS_SM80_KERNEL(loraxs_sm80_unaligned_fp16_backward, Float16, Direction::kBackward,
                   Family::kTicket, false)

static const Kernel kernels[] = {
    sm80::describe<Float16, Direction::kBackward, Family::kRideAlong, true>(
        "loraxs_sm80_ride_along_fp16_backward", loraxs_sm80_ride_along_fp16_backward),
    sm80::describe<Float16, Direction::kBackward, Family::kTicket, true>(
        "loraxs_sm80_ticket_fp16_backward", loraxs_sm80_ticket_fp16_backward),
    sm80::describe<Float16, Direction::kBackward, Family::kTicket, false>(
        "loraxs_sm80_unaligned_fp16_backward", loraxs_sm80_unaligned_fp16_backward),
};
static const KernelTable table(kernels, 3);
