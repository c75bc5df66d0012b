// The only calls of the CUDA runtime.
#pragma once

#include "prepare.h"

namespace loraxs::gpu {

// Queues one launch on the current stream of device `device`. Throws std::runtime_error with the
// kernel's name and what CUDA said if the device cannot run it.
void launch(const Prepared& prepared, int32_t device);

}  // namespace loraxs::gpu
