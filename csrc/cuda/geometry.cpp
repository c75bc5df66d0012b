#include "geometry.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/fail.h"

namespace loraxs::gpu {
namespace {

// The first flags of device/sync.cuh: ticket, left, published, one spare.
constexpr int64_t kFixedFlags = 4;
// Few rows (few_rows/few_rows.cuh): columns of X that a CTA shrinks, columns of T that it computes.
constexpr int64_t kSlicePart = 512;
constexpr int64_t kCoreColumns = 32;
constexpr int64_t kVector = 8;  // 16-bit elements of 16 bytes

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int32_t narrow(int64_t value, const char* what) {
    LORAXS_CHECK(value >= 0 && value <= std::numeric_limits<int32_t>::max(), what,
                 ": expected at most 2147483647, got ", value);
    return static_cast<int32_t>(value);
}

void check_sizes(const Kernel& kernel, const Sizes& s, const Split& split) {
    narrow(s.m, "x: rows");
    narrow(s.k, "x: columns");
    narrow(s.n, "b: rows");
    LORAXS_CHECK(s.m >= 1 && s.k >= 1, "x: expected at least one row and one column, got [", s.m,
                 ", ", s.k, "]");
    LORAXS_CHECK(s.n >= 1, "b: expected at least one row, got ", s.n);
    LORAXS_CHECK(s.rank >= 1 && s.rank <= kernel.max_rank, "a: expected 1 to ", kernel.max_rank,
                 " rows (the rank) for kernel ", kernel.name, ", got ", s.rank);
    LORAXS_CHECK(kernel.max_rows == 0 || s.m <= kernel.max_rows, "x: expected at most ",
                 kernel.max_rows, " rows for kernel ", kernel.name, ", got ", s.m);
    LORAXS_CHECK(s.adapters >= 1, "core: expected at least one adapter, got ", s.adapters);
    narrow(s.adapters, "core: adapters");
    LORAXS_CHECK(split.chunks >= 1 && split.chunks <= s.m, "chunks: expected 1 to ", s.m, ", got ",
                 split.chunks);
    LORAXS_CHECK(split.group >= 1, "group: expected at least 1, got ", split.group);
    narrow(split.group, "group");
    const int64_t steps = ceil_div(s.k, kernel.bk);
    const int64_t most = kernel.family == Family::kFewRows && s.has_w ? steps : 1;
    LORAXS_CHECK(split.parts >= 1 && split.parts <= most, "parts: expected 1 to ", most,
                 " for kernel ", kernel.name, ", got ", split.parts);
}

}  // namespace

Geometry geometry(const Kernel& kernel, const Sizes& s, const Split& split) {
    check_sizes(kernel, s, split);
    const bool rides = kernel.family == Family::kRideAlong || kernel.family == Family::kCluster;
    const bool few = kernel.family == Family::kFewRows;
    LORAXS_CHECK(s.has_d || !rides, "d: kernel ", kernel.name,
                 " computes Q beside D only; got no d");
    Geometry g{};
    const int64_t row_blocks = ceil_div(s.m, kernel.bm);
    const int64_t col_tiles = s.has_d ? ceil_div(s.n, kernel.bn) : 0;
    const int64_t slices = rides ? 0 : ceil_div(s.rank, kernel.br);
    const bool has_gemm = s.has_d || s.need_dr || s.has_side;
    const int64_t dr_tiles =
        s.need_dr ? s.adapters * ceil_div(s.rank, kernel.di) * ceil_div(s.rank, kernel.dj) : 0;
    g.t_cols = narrow(ceil_div(s.rank, kernel.cr) * kernel.cr, "a: rank");
    g.row_blocks = narrow(row_blocks, "x: row blocks");
    g.col_tiles = narrow(col_tiles, "b: column tiles");
    g.slices = narrow(slices, "a: slices");
    g.slice_parts = few ? narrow(ceil_div(s.k, kSlicePart), "a: parts") : 1;
    const int64_t core_rows = s.per_row ? s.m : 1;
    g.core_items =
        few && s.has_d ? narrow(core_rows * ceil_div(g.t_cols, kCoreColumns), "ids: items") : 0;
    // A cluster has a row of tiles of D, and an item of db or dR for each of its CTAs.
    const int64_t per_block =
        slices * g.slice_parts + ceil_div(col_tiles, kernel.cluster) * split.parts;
    g.db_items = s.need_db ? narrow(ceil_div(s.k, kernel.db_columns), "db: blocks") : 0;
    g.gemm_items = has_gemm ? narrow(row_blocks * per_block + g.core_items, "d: tiles") : 0;
    g.dr_items = narrow(dr_tiles * split.chunks, "dR: chunks");
    const int64_t counters = few ? row_blocks * (col_tiles + slices) : 0;
    // A tile that computes its own Q waits for nobody; only dR does.
    const bool hands_over = !rides || s.need_dr;
    const int64_t flags = kFixedFlags + 2 * row_blocks + dr_tiles + counters;
    g.flag_count = hands_over ? narrow(flags, "flags") : 0;
    const int64_t items =
        ceil_div(g.db_items, kernel.cluster) + g.gemm_items + ceil_div(g.dr_items, kernel.cluster);
    LORAXS_CHECK(items >= 1, "d, dR, db: expected at least one of them");
    g.grid = narrow(items * kernel.cluster, "grid");
    g.needs_side = s.has_side || s.need_dr || (s.has_d && !rides);
    g.needs_t = s.has_d && !rides;
    g.side_cols = ceil_div(s.rank, kVector) * kVector;
    g.partial = split.chunks > 1 ? g.dr_items * int64_t{kernel.di} * kernel.dj : 0;
    const int64_t rows = row_blocks * kernel.bm;
    if (split.parts > 1) g.partial += rows * col_tiles * kernel.bn * split.parts;
    if (g.slice_parts > 1) g.partial += rows * slices * kernel.br * g.slice_parts;
    return g;
}

Scaling split_scaling(double s) {
    if (!(std::fabs(s) > 1.0) || !std::isfinite(s)) return {static_cast<float>(s), 1.0f, 1.0f};
    int exponent;
    std::frexp(s, &exponent);
    exponent = std::min(exponent, 120);
    return {static_cast<float>(std::ldexp(s, -exponent)), std::ldexp(1.0f, -exponent),
            std::ldexp(1.0f, exponent)};
}

}  // namespace loraxs::gpu
