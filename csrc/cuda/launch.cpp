#include "launch.h"

#include <cuda.h>  // types alone: libcuda is not linked, so that the library loads without a driver
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <map>
#include <mutex>
#include <set>

namespace loraxs::gpu {
namespace {

// `what` failed for `kernel`: raise it, and leave no error behind for the next who asks.
void check(cudaError_t status, const Kernel& kernel, const char* what) {
    if (status == cudaSuccess) [[likely]]
        return;
    cudaGetLastError();
    fail("kernel ", kernel.name, ": ", what, " failed: ", cudaGetErrorString(status), " (",
         cudaGetErrorName(status), ")");
}

int compute_capability(const Kernel& kernel, int32_t device) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kernel,
          "asking for the compute capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), kernel,
          "asking for the compute capability");
    return 10 * major + minor;
}

// Once per kernel and device: may it run there, and how much shared memory it uses.
void introduce(const Kernel& kernel, int32_t device) {
    static std::mutex mutex;
    static std::set<std::pair<const Kernel*, int32_t>> introduced;
    const std::scoped_lock lock(mutex);
    if (introduced.contains({&kernel, device})) return;
    const int arch = compute_capability(kernel, device);
    LORAXS_CHECK(kernel.exact_arch ? arch == kernel.min_arch : arch >= kernel.min_arch, "kernel ",
                 kernel.name, ": needs compute capability ", kernel.min_arch / 10, ".",
                 kernel.min_arch % 10, kernel.exact_arch ? "" : " or newer", ", the device has ",
                 arch / 10, ".", arch % 10);
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kernel.shared),
          kernel, "asking for shared memory");
    if (kernel.cluster > 8) {
        check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeNonPortableClusterSizeAllowed,
                                   1),
              kernel, "asking for a large cluster");
    }
    introduced.insert({&kernel, device});
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled find_encoder(const Kernel& kernel) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result),
          kernel, "looking for cuTensorMapEncodeTiled");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result),
          kernel, "looking for cuTensorMapEncodeTiled");
#endif
    LORAXS_CHECK(result == cudaDriverEntryPointSuccess && found, "kernel ", kernel.name,
                 ": the driver has no cuTensorMapEncodeTiled; it is too old");
    return reinterpret_cast<EncodeTiled>(found);
}

CUtensorMapSwizzle swizzle(int32_t bytes) {
    switch (bytes) {
        case 32:
            return CU_TENSOR_MAP_SWIZZLE_32B;
        case 64:
            return CU_TENSOR_MAP_SWIZZLE_64B;
        case 128:
            return CU_TENSOR_MAP_SWIZZLE_128B;
        default:
            return CU_TENSOR_MAP_SWIZZLE_NONE;
    }
}

CUtensorMap encode(const TensorMap& map, const Kernel& kernel) {
    static const EncodeTiled encoder = find_encoder(kernel);
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(map.columns),
                                static_cast<cuuint64_t>(map.rows)};
    const cuuint64_t strides[] = {2 * static_cast<cuuint64_t>(map.row_stride)};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(map.box_columns),
                              static_cast<cuuint32_t>(map.box_rows)};
    const cuuint32_t steps[] = {1, 1};
    CUtensorMap encoded;
    const CUresult status =
        encoder(&encoded,
                kernel.element == Element::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                     : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                2, const_cast<void*>(map.data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle(map.swizzle),
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    LORAXS_CHECK(status == CUDA_SUCCESS, "kernel ", kernel.name,
                 ": cuTensorMapEncodeTiled failed with CUresult ", static_cast<int>(status),
                 " for a tensor of ", map.rows, " x ", map.columns, ", pitch ", map.row_stride);
    return encoded;
}

}  // namespace

void launch(const Prepared& prepared, int32_t device) {
    const Kernel& kernel = *prepared.kernel;
    const torch::stable::accelerator::DeviceGuard guard(device);
    // This library's own runtime: made to agree with torch's, whose guard sets it back.
    check(cudaSetDevice(device), kernel, "selecting the device");
    introduce(kernel, device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));

    std::array<CUtensorMap, kMaxTensorMaps> maps;
    std::array<void*, 1 + kMaxTensorMaps> arguments;
    arguments[0] = const_cast<Problem*>(&prepared.problem);
    for (int i = 0; i < kernel.maps; ++i) {
        maps[i] = encode(prepared.maps[i], kernel);
        arguments[1 + i] = &maps[i];
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(kernel.cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(prepared.geometry.grid));
    config.blockDim = dim3(static_cast<unsigned>(kernel.threads));
    config.dynamicSmemBytes = static_cast<size_t>(kernel.shared);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = kernel.cluster > 1 ? 1 : 0;
    check(cudaLaunchKernelExC(&config, kernel.function, arguments.data()), kernel, "the launch");
}

}  // namespace loraxs::gpu
