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
         const OptionalTensor& db, const OptionalTensor& flags, const OptionalTensor& bad_id,
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
    const OptionalTensor& db, const OptionalTensor& flags, const OptionalTensor& bad_id,
    double scaling, int64_t kernel, int64_t chunks, int64_t parts, int64_t group) {
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

std::string geometry_json(int64_t kernel, int64_t m, int64_t n, int64_t k, int64_t rank,
                          int64_t adapters, bool has_d, bool has_w, bool has_side, bool need_dr,
                          bool need_db, bool per_row, int64_t chunks, int64_t parts,
                          int64_t group) {
    Sizes sizes{m, n, k, rank, adapters};
    sizes.has_d = has_d;
    sizes.has_w = has_w;
    sizes.has_side = has_side;
    sizes.need_dr = need_dr;
    sizes.need_db = need_db;
    sizes.per_row = per_row;
    const Geometry g = geometry(kernel_number(kernel), sizes, {chunks, parts, group});
    std::ostringstream out;
    out << "{\"grid\": " << g.grid;
    const std::pair<const char*, int64_t> counts[] = {
        {"t_cols", g.t_cols},         {"row_blocks", g.row_blocks},   {"col_tiles", g.col_tiles},
        {"slices", g.slices},         {"slice_parts", g.slice_parts}, {"core_items", g.core_items},
        {"db_items", g.db_items},     {"gemm_items", g.gemm_items},   {"dr_items", g.dr_items},
        {"flag_count", g.flag_count}, {"needs_side", g.needs_side},   {"needs_t", g.needs_t},
        {"partial", g.partial}};
    for (const auto& [name, count] : counts) out << ", \"" << name << "\": " << count;
    out << "}";
    return out.str();
}

}  // namespace
}  // namespace loraxs::gpu

#define LORAXS_LAUNCH_ARGUMENTS                                                                 \
    "(Tensor x, Tensor? w, Tensor? base, Tensor a, Tensor core, Tensor b, Tensor? bias, "       \
    "Tensor? q, Tensor? ids, Tensor? order, Tensor? offsets, Tensor(a!)? d, Tensor(b!)? side, " \
    "Tensor(c!)? dR, Tensor(d!)? db, Tensor(e!)? flags, Tensor(f!)? bad_id, float scaling, "    \
    "int kernel, int chunks, int parts, int group)"

// run(...): one launch on the current stream, in the roles of problem.h. `kernel` is an index into
//   kernels(). d, side, dR and db are written if given; scratch is allocated.
// prepare(...): all that run does but the launch, also for CPU tensors: what the launch consists of
//   as JSON (kernel, grid, cluster, threads, shared, maps), the bytes of the Problem, and the
//   scratch: side, t and partial.
// geometry(...): the counts of a launch as JSON; no tensors.
// kernels(): the architectures built for, and the table of kernels, as JSON.
// problem_layout(): [offset, size] of each field of Problem, and its size, as JSON.
STABLE_TORCH_LIBRARY(loraxs_cuda, m) {
    m.def("run" LORAXS_LAUNCH_ARGUMENTS " -> ()");
    m.def("prepare" LORAXS_LAUNCH_ARGUMENTS " -> (str, Tensor, Tensor?, Tensor?, Tensor?)");
    m.def(
        "geometry(int kernel, int m, int n, int k, int rank, int adapters, bool has_d, bool has_w, "
        "bool has_side, bool need_dR, bool need_db, bool per_row, int chunks, int parts, "
        "int group) -> str");
    m.def("kernels() -> str");
    m.def("problem_layout() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(loraxs_cuda, CompositeExplicitAutograd, m) {
    m.impl("run", TORCH_BOX(&loraxs::gpu::run));
    m.impl("prepare", TORCH_BOX(&loraxs::gpu::prepare_only));
    m.impl("geometry", TORCH_BOX(&loraxs::gpu::geometry_json));
    m.impl("kernels", TORCH_BOX(&loraxs::gpu::kernels_json));
    m.impl("problem_layout", TORCH_BOX(&loraxs::gpu::problem_layout_json));
}
