// All kernels of the library.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace loraxs::gpu {

// Sorted by name: a kernel's number does not depend on the order in which files were linked.
const std::vector<const Kernel*>& kernels();

const char* family_name(Family family);
const char* element_name(Element element);
const char* direction_name(Direction direction);

// The architectures that the library holds code for ("8.0 9.0a"), and the kernels, as JSON.
std::string kernels_json();
// Name, offset and size of each field of Problem, as JSON: for tests.
std::string problem_layout_json();

}  // namespace loraxs::gpu
