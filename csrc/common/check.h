// Tensors of the stable ABI, as both libraries see them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "fail.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // the headers of torch 2.11 call it so
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace loraxs {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// "[2, 3]", for messages.
inline std::string shape_string(const Tensor& t) {
    std::string text = "[";
    for (const int64_t size : t.sizes()) {
        if (text.size() > 1) text += ", ";
        text += std::to_string(size);
    }
    return text + "]";
}

// torch's number for the dtype of `t`.
inline int32_t dtype_of(const Tensor& t) {
    int32_t code;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
    return code;
}

inline int32_t layout_of(const Tensor& t) {
    int32_t code;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &code));
    return code;
}

}  // namespace loraxs
