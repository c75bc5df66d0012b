#include "prepare.h"

#include <utility>

#include "registry.h"

namespace loraxs::gpu {
namespace {

constexpr int64_t kVector = 8;  // 16-bit elements of 16 bytes

struct Device {
    int32_t type, index;
    bool operator==(const Device&) const = default;
};

Device device_of(const Tensor& t) {
    Device device;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device.type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device.index));
    return device;
}

std::string name_of(const Device& device) {
    if (device.type == aoti_torch_device_type_cpu()) return "cpu";
    const bool cuda = device.type == aoti_torch_device_type_cuda();
    return (cuda ? "cuda:" : "another device:") + std::to_string(device.index);
}

int32_t element_code(Element element) {
    return element == Element::kBFloat16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float16();
}

const char* dtype_string(const Tensor& t) { return torch::headeronly::toString(t.scalar_type()); }

// The matrix [rows, cols]; `by_column`: its columns are contiguous, not its rows.
struct Shape {
    int64_t rows, cols;
    bool by_column = false;
};

class Checker {
  public:
    Checker(const Kernel& kernel, const Tensor& x) : kernel_(kernel), device_(device_of(x)) {}

    void on_device(const Tensor& t, const char* name) const {
        LORAXS_CHECK(t.defined() && layout_of(t) == aoti_torch_layout_strided(), name,
                     ": expected a dense strided tensor");
        const Device device = device_of(t);
        LORAXS_CHECK(device == device_, name, ": expected a tensor on ", name_of(device_),
                     " as x is, got ", name_of(device));
    }

    void element(const Tensor& t, const char* name) const {
        LORAXS_CHECK(dtype_of(t) == element_code(kernel_.element), name, ": expected ",
                     element_name(kernel_.element), " for kernel ", kernel_.name, ", got ",
                     dtype_string(t));
    }

    // The distance of its rows (columns) in elements; `vectors`: an aligned kernel reads or writes
    // it 16 bytes at a time.
    int64_t matrix(const Tensor& t, const char* name, const Shape& shape,
                   bool vectors = false) const {
        on_device(t, name);
        LORAXS_CHECK(t.dim() == 2 && t.size(0) == shape.rows && t.size(1) == shape.cols, name,
                     ": expected shape [", shape.rows, ", ", shape.cols, "], got ",
                     shape_string(t));
        element(t, name);
        const int inner = shape.by_column ? 0 : 1;
        const int64_t length = t.size(inner), lines = t.size(1 - inner);
        LORAXS_CHECK(length == 1 || t.stride(inner) == 1, name, ": expected contiguous ",
                     shape.by_column ? "columns" : "rows", " for kernel ", kernel_.name,
                     ", got strides [", t.stride(0), ", ", t.stride(1), "]");
        // The stride of a single line means nothing.
        const int64_t whole = (length + kVector - 1) / kVector * kVector;
        const int64_t pitch = lines == 1 ? whole : t.stride(1 - inner);
        LORAXS_CHECK(pitch >= length, name, ": expected ", shape.by_column ? "columns" : "rows",
                     " that do not overlap, got strides [", t.stride(0), ", ", t.stride(1), "]");
        if (vectors && kernel_.aligned) aligned(t, name, pitch, length);
        return pitch;
    }

    void vector(const Tensor& t, const char* name, int64_t size) const {
        on_device(t, name);
        LORAXS_CHECK(t.dim() == 1 && t.size(0) == size, name, ": expected shape [", size, "], got ",
                     shape_string(t));
        LORAXS_CHECK(size == 1 || t.stride(0) == 1, name, ": expected a contiguous vector");
    }

    const int64_t* indices(const Tensor& t, const char* name, int64_t size) const {
        vector(t, name, size);
        LORAXS_CHECK(dtype_of(t) == aoti_torch_dtype_int64(), name, ": expected int64, got ",
                     dtype_string(t));
        return static_cast<const int64_t*>(t.const_data_ptr());
    }

    Tensor scratch(int64_t rows, int64_t cols, int32_t dtype) const {
        const std::array<int64_t, 2> sizes{rows, cols}, strides{cols, 1};
        AtenTensorHandle handle;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
            2, sizes.data(), strides.data(), dtype, device_.type, device_.index, &handle));
        return Tensor(handle);
    }

  private:
    void aligned(const Tensor& t, const char* name, int64_t pitch, int64_t length) const {
        const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
        LORAXS_CHECK(address % 16 == 0 && pitch % kVector == 0 && length % kVector == 0, name,
                     ": expected data at a multiple of 16 bytes, and lines and distances of lines "
                     "of whole 16 bytes, for kernel ",
                     kernel_.name, ", got address ", address, ", lines of ", length, " and ", pitch,
                     " elements apart");
    }

    const Kernel& kernel_;
    Device device_;
};

template <typename T = const void>
T* pointer(const OptionalTensor& t) {
    if constexpr (std::is_const_v<T>) {
        return t ? static_cast<T*>(t->const_data_ptr()) : nullptr;
    } else {
        return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
    }
}

Sizes sizes_of(const Operands& o) {
    LORAXS_CHECK(o.x.dim() == 2, "x: expected 2 dimensions, got shape ", shape_string(o.x));
    LORAXS_CHECK(o.a.dim() == 2, "a: expected 2 dimensions, got shape ", shape_string(o.a));
    LORAXS_CHECK(o.b.dim() == 2, "b: expected 2 dimensions, got shape ", shape_string(o.b));
    LORAXS_CHECK(o.core.dim() == 2 || o.core.dim() == 3,
                 "core: expected 2 or 3 dimensions, got shape ", shape_string(o.core));
    Sizes s;
    s.m = o.x.size(0);
    s.k = o.x.size(1);
    s.n = o.b.size(0);
    s.rank = o.a.size(0);
    s.adapters = o.core.dim() == 3 ? o.core.size(0) : 1;
    s.has_d = o.d.has_value();
    s.has_side = o.side.has_value();
    s.has_w = o.w.has_value();
    s.per_row = o.ids.has_value();
    s.need_dr = o.dr.has_value();
    s.need_db = o.db.has_value();
    return s;
}

// Whether an aligned kernel wants whole vectors of every matrix, not of X and W alone.
bool reads_all(const Kernel& kernel) { return kernel.family == Family::kCluster; }

void set_read(Problem& p, const Operands& o, const Sizes& s, const Kernel& k,
              const Checker& check) {
    const bool backward = k.direction == Direction::kBackward, all = reads_all(k);
    p.x_row = check.matrix(o.x, "x", {s.m, s.k}, true);
    p.x = o.x.const_data_ptr();
    p.a_row = check.matrix(o.a, "a", {s.rank, s.k, backward}, all);
    p.a = o.a.const_data_ptr();
    p.b_row = check.matrix(o.b, "b", {s.n, s.rank, backward}, all);
    p.b = o.b.const_data_ptr();
    const std::pair<const OptionalTensor*, const char*> with_d[] = {
        {&o.w, "w"}, {&o.base, "base"}, {&o.bias, "bias"}};
    for (const auto& [t, name] : with_d) {
        LORAXS_CHECK(s.has_d || !t->has_value(), name, ": expected None, because d is None");
    }
    if (o.w) p.w_row = check.matrix(*o.w, "w", {s.n, s.k, backward}, true);
    if (o.base) p.base_row = check.matrix(*o.base, "base", {s.m, s.n}, all);
    if (o.bias) {
        check.vector(*o.bias, "bias", s.n);
        check.element(*o.bias, "bias");
    }
    p.w = pointer(o.w);
    p.base = pointer(o.base);
    p.bias = pointer(o.bias);
}

void set_core(Prepared& made, const Operands& o, const Sizes& s, const Checker& check) {
    Problem& p = made.problem;
    const Tensor& core = o.core;
    check.on_device(core, "core");
    const int64_t last = core.dim() - 1;
    LORAXS_CHECK(core.size(last) == s.rank && core.size(last - 1) == s.rank,
                 "core: expected shape [", s.rank, ", ", s.rank, "] or [n, ", s.rank, ", ", s.rank,
                 "], got ", shape_string(core));
    p.core_is_fp32 = dtype_of(core) == aoti_torch_dtype_float32();
    if (!p.core_is_fp32) check.element(core, "core");
    p.core = core.const_data_ptr();
    p.core_adapter = core.dim() == 3 ? core.stride(0) : 0;
    p.core_row = core.stride(last - 1);
    p.core_col = core.stride(last);
    LORAXS_CHECK((core.dim() == 3) == o.ids.has_value(),
                 "ids: expected a tensor if core has three dimensions, and None if it has two; "
                 "core has shape ",
                 shape_string(core));
    const Family family = made.kernel->family;
    LORAXS_CHECK(!o.ids || (family != Family::kRideAlong && family != Family::kCluster),
                 "ids: kernel ", made.kernel->name, " takes one core for all rows");
    LORAXS_CHECK(o.order.has_value() == o.offsets.has_value() && (o.ids || !o.order),
                 "order, offsets: expected both or none, and none without ids");
    if (o.ids) p.ids = check.indices(*o.ids, "ids", s.m);
    if (o.order) {
        p.order = check.indices(*o.order, "order", s.m);
        p.offsets = check.indices(*o.offsets, "offsets", s.adapters + 2);
    }
    const bool reports = o.ids.has_value() && !o.order.has_value();
    LORAXS_CHECK(reports == o.bad_id.has_value(), "bad_id: expected ",
                 reports ? "a tensor, because ids come without order" : "None");
    if (!reports) return;
    LORAXS_CHECK(o.bad_id->is_cpu() && o.bad_id->numel() == 1 &&
                     dtype_of(*o.bad_id) == aoti_torch_dtype_int32(),
                 "bad_id: expected one int32 in (pinned) host memory, got shape ",
                 shape_string(*o.bad_id), " of ", dtype_string(*o.bad_id));
    p.bad_id = pointer<int>(o.bad_id);
}

void set_gradients(Prepared& made, const Operands& o, const Sizes& s, const Checker& check) {
    Problem& p = made.problem;
    const bool backward = made.kernel->direction == Direction::kBackward;
    LORAXS_CHECK(backward || !(s.need_dr || s.need_db), s.need_dr ? "dR" : "db",
                 ": expected None for kernel ", made.kernel->name, ", which is a forward");
    LORAXS_CHECK(o.q.has_value() == s.need_dr, "q: expected ",
                 s.need_dr ? "a tensor, because dR is given" : "None, because dR is None");
    if (s.need_dr) {
        p.q_row = check.matrix(*o.q, "q", {s.m, s.rank}, reads_all(*made.kernel));
        check.on_device(*o.dr, "dR");
        bool same = o.dr->dim() == o.core.dim() && dtype_of(*o.dr) == dtype_of(o.core);
        for (int64_t i = 0; same && i < o.core.dim(); ++i) same = o.dr->size(i) == o.core.size(i);
        LORAXS_CHECK(same && o.dr->is_contiguous(), "dR: expected a contiguous tensor like core, ",
                     shape_string(o.core), " of ", dtype_string(o.core), ", got ",
                     shape_string(*o.dr), " of ", dtype_string(*o.dr));
    }
    p.q = pointer(o.q);
    p.dr = pointer<void>(o.dr);
    if (s.need_db) {
        check.vector(*o.db, "db", s.k);
        check.element(*o.db, "db");
    }
    p.db = pointer<void>(o.db);
}

void set_written(Prepared& made, const Operands& o, const Sizes& s, const Checker& check) {
    Problem& p = made.problem;
    const Geometry& g = made.geometry;
    if (o.d) p.d_row = check.matrix(*o.d, "d", {s.m, s.n}, reads_all(*made.kernel));
    p.d = pointer<void>(o.d);
    const int32_t element = element_code(made.kernel->element);
    if (o.side) {
        p.side_row = check.matrix(*o.side, "side", {s.m, s.rank}, reads_all(*made.kernel));
        p.side = pointer<void>(o.side);
    } else if (g.needs_side) {
        made.side = check.scratch(s.m, g.side_cols, element);
        p.side_row = g.side_cols;
        p.side = pointer<void>(made.side);
    }
    if (g.needs_t) {
        made.t = check.scratch(s.m, g.t_cols, element);
        p.t = pointer<void>(made.t);
        p.t_row = g.t_cols;
    }
    if (g.partial > 0) {
        made.partial = check.scratch(1, g.partial, aoti_torch_dtype_float32());
        p.partial = pointer<float>(made.partial);
    }
    if (g.flag_count == 0) return;
    LORAXS_CHECK(o.flags.has_value(), "flags: expected ", g.flag_count, " int32, got None");
    check.on_device(*o.flags, "flags");
    LORAXS_CHECK(dtype_of(*o.flags) == aoti_torch_dtype_int32() && o.flags->is_contiguous() &&
                     o.flags->numel() >= g.flag_count,
                 "flags: expected at least ", g.flag_count, " contiguous int32, got ",
                 o.flags->numel(), " of ", dtype_string(*o.flags));
    p.flags = pointer<int>(o.flags);
}

// What tensor copies ask of a tensor; its name is the one of its address.
void check_map(const TensorMap& map, const Problem& p, const Kernel& kernel) {
    const std::pair<const void*, const char*> names[] = {
        {p.x, "x"}, {p.w, "w"}, {p.a, "a"}, {p.b, "b"},       {p.base, "base"},
        {p.q, "q"}, {p.d, "d"}, {p.t, "t"}, {p.side, "side"}, {map.data, "tensor map"}};
    const char* name = "";
    for (const auto& [address, called] : names) {
        if (address == map.data && *name == 0) name = called;
    }
    const auto address = reinterpret_cast<uintptr_t>(map.data);
    LORAXS_CHECK(address % 16 == 0 && map.row_stride % kVector == 0, name,
                 ": expected data and distances of lines at multiples of 16 bytes for kernel ",
                 kernel.name, ", got address ", address, " and lines ", map.row_stride,
                 " elements apart");
}

void set_counts(Problem& p, const Sizes& s, const Split& split, const Geometry& g) {
    p.m = static_cast<int32_t>(s.m);
    p.n = static_cast<int32_t>(s.n);
    p.k = static_cast<int32_t>(s.k);
    p.rank = static_cast<int32_t>(s.rank);
    p.adapters = static_cast<int32_t>(s.adapters);
    p.t_cols = g.t_cols;
    p.row_blocks = g.row_blocks;
    p.col_tiles = g.col_tiles;
    p.slices = g.slices;
    p.chunks = static_cast<int32_t>(split.chunks);
    p.parts = static_cast<int32_t>(split.parts);
    p.slice_parts = g.slice_parts;
    p.core_items = g.core_items;
    p.group = static_cast<int32_t>(split.group);
    p.db_items = g.db_items;
    p.gemm_items = g.gemm_items;
    p.dr_items = g.dr_items;
    p.flag_count = g.flag_count;
}

}  // namespace

Prepared prepare(const Operands& o, double scaling, const Kernel& kernel, const Split& split) {
    const Sizes sizes = sizes_of(o);
    const Checker check(kernel, o.x);
    Prepared made{&kernel, geometry(kernel, sizes, split), {}, {}, {}, {}, {}};
    Problem& p = made.problem;
    set_read(p, o, sizes, kernel, check);
    set_core(made, o, sizes, check);
    set_gradients(made, o, sizes, check);
    set_counts(p, sizes, split, made.geometry);
    const Scaling parts = split_scaling(scaling);
    p.fraction = parts.fraction;
    p.before = parts.before;
    p.after = parts.after;
    p.dr_scale = static_cast<float>(scaling);
    set_written(made, o, sizes, check);
    if (kernel.maps > 0) {
        kernel.tensor_maps(p, made.maps.data());
        for (int i = 0; i < kernel.maps; ++i) check_map(made.maps[i], p, kernel);
    }
    return made;
}

}  // namespace loraxs::gpu
