// From operands to a checked Problem with its scratch: everything about a launch but the launch.
#pragma once

#include <array>

#include "common/check.h"
#include "geometry.h"

namespace loraxs::gpu {

// One pass, in the roles of problem.h.
struct Operands {
    const Tensor& x;
    const OptionalTensor& w;
    const OptionalTensor& base;
    const Tensor& a;
    const Tensor& core;
    const Tensor& b;
    const OptionalTensor& bias;
    const OptionalTensor& q;
    const OptionalTensor& ids;
    const OptionalTensor& order;
    const OptionalTensor& offsets;
    const OptionalTensor& d;
    const OptionalTensor& side;
    const OptionalTensor& dr;
    const OptionalTensor& db;
    const OptionalTensor& flags;
    const OptionalTensor& bad_id;
};

struct Prepared {
    const Kernel* kernel;
    Geometry geometry;
    Problem problem;
    std::array<TensorMap, kMaxTensorMaps> maps;
    OptionalTensor side, t, partial;  // scratch, alive until the launch is queued
};

// Checks every operand against the kernel and the others: device, dtype, shape, layout, alignment,
// range of sizes. Throws std::runtime_error with the argument's name first. No tensor is read; all
// must be on x's device (which may be the CPU: nothing is launched here), `bad_id` on the CPU.
Prepared prepare(const Operands& o, double scaling, const Kernel& kernel, const Split& split);

}  // namespace loraxs::gpu
