// The ops of the library: schemas and registration.
#include <cstring>
#include <tuple>

#include "launch.h"
#include "prepare.h"
#include "registry.h"

namespace loraxs::gpu {
namespace {

const Kernel& kernel_number(int64_t number) {
    const int64_t count = static_cast<int64_t>(kernels().size());
    LORAXS_CHECK(number >= 0 && number < count, "kernel: expected 0 to ", count - 1,
                 ", the index of a kernel of kernels(), got ", number);
    return *kernels()[static_cast<size_t>(number)];
}

void run(const Tensor& x, const OptionalTensor& w, const OptionalTensor& base, const Tensor& a,
         const Tensor& core, const Tensor& b, const OptionalTensor& bias, const OptionalTensor& q,
         const OptionalTensor& ids, const OptionalTensor& order, const OptionalTensor& offsets,
         const OptionalTensor& d, const OptionalTensor& side, const OptionalTensor& dr,
         const OptionalTensor& db, const Tensor& flags, const OptionalTensor& bad_id,
         double scaling, int64_t kernel, int64_t chunks, int64_t parts, int64_t group) {
    LORAXS_CHECK(x.is_cuda(), "x: expected a CUDA tensor");
    const Operands operands{x,     w,       base, a,    core, b,  bias,  q,     ids,
                            order, offsets, d,    side, dr,   db, flags, bad_id};
    launch(prepare(operands, scaling, kernel_number(kernel), {chunks, parts, group}),
           x.get_device_index());
}

// "[[address, columns, rows, row stride, box columns, box rows, swizzle], ...]"
std::string maps_json(const Prepared& prepared) {
    std::ostringstream out;
    out << "[";
    for (int i = 0; i < prepared.kernel->maps; ++i) {
        const TensorMap& m = prepared.maps[i];
        out << (i ? ", [" : "[") << reinterpret_cast<uintptr_t>(m.data) << ", " << m.columns << ", "
            << m.rows << ", " << m.row_stride << ", " << m.box_columns << ", " << m.box_rows << ", "
            << m.swizzle << "]";
    }
    out << "]";
    return out.str();
}

Tensor bytes_of(const Problem& problem) {
    const int64_t size = sizeof(Problem), stride = 1;
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        1, &size, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, &handle));
    Tensor bytes(handle);
    std::memcpy(bytes.mutable_data_ptr(), &problem, sizeof(Problem));
    return bytes;
}

std::tuple<std::string, Tensor, OptionalTensor, OptionalTensor, OptionalTensor> prepare_only(
    const Tensor& x, const OptionalTensor& w, const OptionalTensor& base, const Tensor& a,
    const Tensor& core, const Tensor& b, const OptionalTensor& bias, const OptionalTensor& q,
    const OptionalTensor& ids, const OptionalTensor& order, const OptionalTensor& offsets,
    const OptionalTensor& d, const OptionalTensor& side, const OptionalTensor& dr,
    const OptionalTensor& db, const Tensor& flags, const OptionalTensor& bad_id, double scaling,
    int64_t kernel, int64_t chunks, int64_t parts, int64_t group) {
    const Operands operands{x,     w,       base, a,    core, b,  bias,  q,     ids,
                            order, offsets, d,    side, dr,   db, flags, bad_id};
    const Kernel& k = kernel_number(kernel);
    Prepared made = prepare(operands, scaling, k, {chunks, parts, group});
    std::ostringstream out;
    out << "{\"kernel\": \"" << k.name << "\", \"grid\": " << made.geometry.grid
        << ", \"cluster\": " << k.cluster << ", \"threads\": " << k.threads
        << ", \"shared\": " << k.shared << ", \"maps\": " << maps_json(made) << "}";
    return {out.str(), bytes_of(made.problem), made.side, made.t, made.partial};
}

}  // namespace
}  // namespace loraxs::gpu

#define LORAXS_LAUNCH_ARGUMENTS                                                                 \
    "(Tensor x, Tensor? w, Tensor? base, Tensor a, Tensor core, Tensor b, Tensor? bias, "       \
    "Tensor? q, Tensor? ids, Tensor? order, Tensor? offsets, Tensor(a!)? d, Tensor(b!)? side, " \
    "Tensor(c!)? dR, Tensor(d!)? db, Tensor(e!) flags, Tensor(f!)? bad_id, float scaling, "     \
    "int kernel, int chunks, int parts, int group)"

// run(...): one launch on the current stream, in the roles of problem.h. `kernel` is an index into
//   kernels(). d, side, dR and db are written if given; scratch is allocated.
// prepare(...): all that run does but the launch, also for CPU tensors: what the launch consists of
//   as JSON (kernel, grid, cluster, threads, shared, maps), the bytes of the Problem, and the
//   scratch: side, t and partial.
// kernels(): the architectures built for, and the table of kernels, as JSON.
// problem_layout(): [offset, size] of each field of Problem, and its size, as JSON.
STABLE_TORCH_LIBRARY(loraxs_cuda, m) {
    m.def("run" LORAXS_LAUNCH_ARGUMENTS " -> ()");
    m.def("prepare" LORAXS_LAUNCH_ARGUMENTS " -> (str, Tensor, Tensor?, Tensor?, Tensor?)");
    m.def("kernels() -> str");
    m.def("problem_layout() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(loraxs_cuda, CompositeExplicitAutograd, m) {
    m.impl("run", TORCH_BOX(&loraxs::gpu::run));
    m.impl("prepare", TORCH_BOX(&loraxs::gpu::prepare_only));
    m.impl("kernels", TORCH_BOX(&loraxs::gpu::kernels_json));
    m.impl("problem_layout", TORCH_BOX(&loraxs::gpu::problem_layout_json));
}
