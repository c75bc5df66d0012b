// Tensors of the stable ABI as the rest of this folder wants them: checked views and few
// allocations.
#pragma once

#include "common/check.h"
#include "kernels.h"

namespace loraxs {

// The following fail with a message that begins with the argument's name.
void check_cpu(const Tensor& t, const char* name);
DType float_dtype(const Tensor& t, const char* name);  // float32, bfloat16 or float16
void check_shape(const Tensor& t, const char* name, int64_t rows, int64_t cols);
void check_vector(const Tensor& t, const char* name, int64_t size);
const char* dtype_name(DType dtype);
// Fails unless `dtype` is x's or float32.
void check_operand_dtype(DType dtype, const char* name, DType x_dtype);

// A view of a two-dimensional tensor with unit inner stride and non-overlapping rows; `t` is
// replaced by a contiguous copy where it has neither.
ConstMatrix row_major(Tensor& t, const char* name);
// The same, where a copy is not accepted: frozen operands are laid out once, by the caller.
ConstMatrix contiguous_matrix(const Tensor& t, const char* name);
// A view [columns, rows] of the transpose of a contiguous matrix.
ConstMatrix transposed_matrix(const Tensor& t, const char* name);
// int64 data of a contiguous vector of `size` elements.
const int64_t* int64_vector(const Tensor& t, const char* name, int64_t size);

Tensor new_tensor(DType dtype, torch::headeronly::IntHeaderOnlyArrayRef sizes);
Matrix matrix_of(const Tensor& t, DType dtype);  // of a tensor made by new_tensor
Tensor narrow_rows(Tensor& t, int64_t first, int64_t count);

// A weight [out, in] in panels of `columns` rows; see ProductArgs.
const float* panels_of(const Tensor& t, const char* name, int64_t out, int64_t in, int64_t columns);

// A weight packed by mkldnn::_reorder_linear_weight.
struct PackedWeight {
    const Tensor* tensor = nullptr;
    DType dtype = DType::kFloat32;
    explicit operator bool() const { return tensor != nullptr; }
};
bool is_packed(const Tensor& t);
PackedWeight packed_weight(const OptionalTensor& t, const char* name, int64_t out, int64_t in,
                           DType x_dtype);

// x W^T + bias, and other + x W^T, by oneDNN. The result is a new contiguous tensor of x's dtype.
Tensor packed_linear(const Tensor& x, const PackedWeight& weight, const OptionalTensor& bias);
Tensor packed_linear_add(const Tensor& x, const Tensor& other, const PackedWeight& weight);

}  // namespace loraxs
