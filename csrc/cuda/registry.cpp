#include "registry.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <sstream>

#ifndef LORAXS_CUDA_ARCHS
#error "the build defines LORAXS_CUDA_ARCHS, as in \"8.0 9.0a\""
#endif

namespace loraxs::gpu {

const KernelTable*& KernelTable::head() {
    static const KernelTable* first = nullptr;
    return first;
}

KernelTable::KernelTable(const Kernel* kernels, int count)
    : kernels(kernels), count(count), next(head()) {
    head() = this;
}

const std::vector<const Kernel*>& kernels() {
    static const std::vector<const Kernel*> sorted = [] {
        std::vector<const Kernel*> found;
        for (const KernelTable* table = KernelTable::head(); table; table = table->next) {
            for (int i = 0; i < table->count; ++i) found.push_back(table->kernels + i);
        }
        std::sort(found.begin(), found.end(), [](const Kernel* a, const Kernel* b) {
            return std::strcmp(a->name, b->name) < 0;
        });
        return found;
    }();
    return sorted;
}

const char* family_name(Family family) {
    static const char* const names[] = {"ride-along", "ticket", "few-rows", "cluster"};
    return names[static_cast<int>(family)];
}

const char* element_name(Element element) {
    return element == Element::kBFloat16 ? "bfloat16" : "float16";
}

const char* direction_name(Direction direction) {
    return direction == Direction::kForward ? "forward" : "backward";
}

std::string kernels_json() {
    std::ostringstream out;
    out << "{\"archs\": \"" << LORAXS_CUDA_ARCHS << "\", \"kernels\": [";
    const char* separator = "";
    for (const Kernel* k : kernels()) {
        out << separator << "{\"name\": \"" << k->name << "\", \"family\": \""
            << family_name(k->family) << "\", \"element\": \"" << element_name(k->element)
            << "\", \"direction\": \"" << direction_name(k->direction) << "\"";
        const std::pair<const char*, int> numbers[] = {{"min_arch", k->min_arch},
                                                       {"exact_arch", k->exact_arch},
                                                       {"aligned", k->aligned},
                                                       {"max_rows", k->max_rows},
                                                       {"max_rank", k->max_rank},
                                                       {"threads", k->threads},
                                                       {"cluster", k->cluster},
                                                       {"shared", k->shared},
                                                       {"bm", k->bm},
                                                       {"bn", k->bn},
                                                       {"bk", k->bk},
                                                       {"br", k->br},
                                                       {"cr", k->cr},
                                                       {"di", k->di},
                                                       {"dj", k->dj},
                                                       {"dm", k->dm},
                                                       {"db_columns", k->db_columns},
                                                       {"maps", k->maps}};
        for (const auto& [name, value] : numbers) out << ", \"" << name << "\": " << value;
        out << "}";
        separator = ", ";
    }
    out << "]}";
    return out.str();
}

// clang-format off
#define LORAXS_FIELDS(FIELD) \
    FIELD(x) FIELD(w) FIELD(base) FIELD(a) FIELD(core) FIELD(b) FIELD(bias) FIELD(q) FIELD(ids) \
    FIELD(order) FIELD(offsets) FIELD(d) FIELD(side) FIELD(t) FIELD(dr) FIELD(db) FIELD(partial) \
    FIELD(flags) FIELD(bad_id) FIELD(x_row) FIELD(w_row) FIELD(base_row) FIELD(a_row) \
    FIELD(b_row) FIELD(d_row) FIELD(side_row) FIELD(t_row) FIELD(q_row) FIELD(core_adapter) \
    FIELD(core_row) FIELD(core_col) FIELD(m) FIELD(n) FIELD(k) FIELD(rank) FIELD(adapters) \
    FIELD(t_cols) FIELD(core_is_fp32) FIELD(row_blocks) FIELD(col_tiles) FIELD(slices) \
    FIELD(chunks) FIELD(parts) FIELD(slice_parts) FIELD(core_items) FIELD(group) FIELD(db_items) \
    FIELD(gemm_items) FIELD(dr_items) FIELD(flag_count) FIELD(fraction) FIELD(before) \
    FIELD(after) FIELD(dr_scale)
// clang-format on

std::string problem_layout_json() {
    std::ostringstream out;
    out << "{\"size\": " << sizeof(Problem);
#define LORAXS_FIELD(field)                                                                    \
    out << ", \"" #field "\": [" << offsetof(Problem, field) << ", " << sizeof(Problem::field) \
        << "]";
    LORAXS_FIELDS(LORAXS_FIELD)
#undef LORAXS_FIELD
    out << "}";
    return out.str();
}

}  // namespace loraxs::gpu
