#include "tensors.h"

#include <array>

namespace loraxs {
namespace {

namespace ivalue = torch::stable::detail;

int32_t dtype_code(DType dtype) {
    static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                    aoti_torch_dtype_float16()};
    return codes[static_cast<int>(dtype)];
}

void check_matrix(const Tensor& t, const char* name) {
    check_cpu(t, name);
    LORAXS_CHECK(t.dim() == 2, name, ": expected 2 dimensions, got shape ", shape_string(t));
}

StableIValue empty_list() {
    StableListHandle list;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(0, &list));
    return ivalue::from(list);
}

// Another dispatch mode (autocast, say) may have turned the product into another dtype.
Tensor checked_product(Tensor y, const Tensor& x) {
    LORAXS_CHECK(dtype_of(y) == dtype_of(x), "product: expected ",
                 torch::headeronly::toString(x.scalar_type()), " as x has, got ",
                 torch::headeronly::toString(y.scalar_type()), "; is autocast on?");
    return y.is_contiguous() ? y : torch::stable::contiguous(y);
}

}  // namespace

const char* dtype_name(DType dtype) {
    static const char* const names[] = {"float32", "bfloat16", "float16"};
    return names[static_cast<int>(dtype)];
}

void check_operand_dtype(DType dtype, const char* name, DType x_dtype) {
    if (dtype == x_dtype || dtype == DType::kFloat32) return;
    fail(name, ": expected float32", x_dtype == DType::kFloat32 ? "" : " or ",
         x_dtype == DType::kFloat32 ? "" : dtype_name(x_dtype), ", got ", dtype_name(dtype));
}

void check_cpu(const Tensor& t, const char* name) {
    LORAXS_CHECK(t.defined() && t.is_cpu(), name, ": expected a CPU tensor");
    LORAXS_CHECK(layout_of(t) == aoti_torch_layout_strided(), name,
                 ": expected a dense strided tensor");
}

DType float_dtype(const Tensor& t, const char* name) {
    const int32_t code = dtype_of(t);
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        if (code == dtype_code(dtype)) return dtype;
    }
    fail(name, ": expected float32, bfloat16 or float16, got ",
         torch::headeronly::toString(t.scalar_type()));
}

void check_shape(const Tensor& t, const char* name, int64_t rows, int64_t cols) {
    LORAXS_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, ": expected shape [",
                 rows, ", ", cols, "], got ", shape_string(t));
}

void check_vector(const Tensor& t, const char* name, int64_t size) {
    check_cpu(t, name);
    LORAXS_CHECK(t.dim() == 1 && t.size(0) == size, name, ": expected shape [", size, "], got ",
                 shape_string(t));
    LORAXS_CHECK(size <= 1 || t.stride(0) == 1, name, ": expected a contiguous vector");
}

ConstMatrix row_major(Tensor& t, const char* name) {
    check_matrix(t, name);
    const DType dtype = float_dtype(t, name);
    const bool as_is = t.stride(1) == 1 && (t.stride(0) >= t.size(1) || t.size(0) == 1);
    if (!as_is && t.numel() > 0) t = torch::stable::contiguous(t);
    return {t.const_data_ptr(), dtype, t.stride(0)};
}

ConstMatrix contiguous_matrix(const Tensor& t, const char* name) {
    check_matrix(t, name);
    LORAXS_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
    return {t.const_data_ptr(), float_dtype(t, name), t.size(1)};
}

ConstMatrix transposed_matrix(const Tensor& t, const char* name) {
    check_matrix(t, name);
    LORAXS_CHECK(t.stride(0) == 1 && t.stride(1) == t.size(0), name,
                 ": expected a contiguous tensor, or the transpose of one");
    return {t.const_data_ptr(), float_dtype(t, name), t.size(0)};
}

const int64_t* int64_vector(const Tensor& t, const char* name, int64_t size) {
    check_vector(t, name, size);
    LORAXS_CHECK(dtype_of(t) == aoti_torch_dtype_int64(), name, ": expected int64, got ",
                 torch::headeronly::toString(t.scalar_type()));
    return static_cast<const int64_t*>(t.const_data_ptr());
}

Tensor new_tensor(DType dtype, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    std::array<int64_t, 3> strides{};
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
        strides[i] = stride;
        stride *= sizes[i] > 0 ? sizes[i] : 1;
    }
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 dtype_code(dtype), aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

Matrix matrix_of(const Tensor& t, DType dtype) {
    return {t.mutable_data_ptr(), dtype, t.size(t.dim() - 1)};
}

Tensor narrow_rows(Tensor& t, int64_t first, int64_t count) {
    return torch::stable::narrow(t, 0, first, count);
}

const float* panels_of(const Tensor& t, const char* name, int64_t out, int64_t in,
                       int64_t columns) {
    check_cpu(t, name);
    const int64_t panels = (out + columns - 1) / columns;
    LORAXS_CHECK(t.dim() == 3 && t.size(0) == panels && t.size(1) == in && t.size(2) == columns &&
                     t.is_contiguous() && float_dtype(t, name) == DType::kFloat32,
                 name, ": expected contiguous float32 panels of shape [", panels, ", ", in, ", ",
                 columns, "], got ", shape_string(t), " of ",
                 torch::headeronly::toString(t.scalar_type()));
    return static_cast<const float*>(t.const_data_ptr());
}

bool is_packed(const Tensor& t) {
    return t.defined() && layout_of(t) == aoti_torch_layout__mkldnn();
}

PackedWeight packed_weight(const OptionalTensor& t, const char* name, int64_t out, int64_t in,
                           DType x_dtype) {
    if (!t.has_value()) return {};
    LORAXS_CHECK(is_packed(*t) && t->is_cpu(), name,
                 ": expected a weight packed by torch.ops.mkldnn._reorder_linear_weight");
    check_shape(*t, name, out, in);
    const DType dtype = float_dtype(*t, name);
    check_operand_dtype(dtype, name, x_dtype);
    return {&*t, dtype};
}

Tensor packed_linear(const Tensor& x, const PackedWeight& weight, const OptionalTensor& bias) {
    std::array<StableIValue, 6> stack{ivalue::from(x),    ivalue::from(*weight.tensor),
                                      ivalue::from(bias), ivalue::from(std::string("none")),
                                      empty_list(),       ivalue::from(std::nullopt)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION));
    return checked_product(ivalue::to<Tensor>(stack[0]), x);
}

Tensor packed_linear_add(const Tensor& x, const Tensor& other, const PackedWeight& weight) {
    std::array<StableIValue, 5> stack{ivalue::from(x), ivalue::from(other),
                                      ivalue::from(*weight.tensor), ivalue::from(std::nullopt),
                                      ivalue::from(std::string("add"))};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_linear_pointwise", "binary",
                                                        stack.data(), TORCH_ABI_VERSION));
    return checked_product(ivalue::to<Tensor>(stack[0]), x);
}

}  // namespace loraxs
