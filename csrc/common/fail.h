// How both libraries report an error.
#pragma once

#include <sstream>
#include <stdexcept>

namespace loraxs {

// Raises RuntimeError in Python, with this message and nothing else.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

#define LORAXS_CHECK(condition, ...) \
    if (!(condition)) [[unlikely]]   \
    ::loraxs::fail(__VA_ARGS__)

}  // namespace loraxs
