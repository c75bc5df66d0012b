#include "side_path.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

namespace loraxs {
namespace {

// Multiply-adds below which waking another thread costs more than it saves (a few microseconds).
constexpr int64_t kWorkPerThread = 64 * 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <typename F>
void parallel(int64_t tasks, int64_t work_per_task, const F& f) {
    const int64_t grain =
        std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, work_per_task));
    if (tasks <= grain) {
        if (tasks > 0) f(0, tasks);
    } else {
        torch::stable::parallel_for(0, tasks, grain, f);
    }
}

// A matrix cut into blocks of rows x cols, of which `body(m0, m1, n0, n1)` does one at a time.
// Rows are cut as given; columns only as far as it takes to give every thread something to do.
template <typename F>
void parallel_blocks(int64_t m, int64_t row_block, int64_t n, int64_t col_unit, int64_t depth,
                     const F& body) {
    if (m == 0) return;
    const int64_t row_blocks = ceil_div(m, row_block);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t splits = std::min(ceil_div(n, col_unit), ceil_div(threads, row_blocks));
    const int64_t col_block = round_up(ceil_div(n, splits), col_unit);
    const int64_t col_blocks = ceil_div(n, col_block);
    const int64_t work = std::min(m, row_block) * col_block * depth;
    parallel(row_blocks * col_blocks, work, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t m0 = task / col_blocks * row_block;
            const int64_t n0 = task % col_blocks * col_block;
            body(m0, std::min(m, m0 + row_block), n0, std::min(n, n0 + col_block));
        }
    });
}

// Into how many parts the rows and the columns of a product are cut.
struct Grid {
    int64_t rows = 1, cols = 1;
};

// One part for each thread. A part of r row tiles and c panels costs r * c, packs r tiles of x
// (about a panel's worth each) and reads or packs c panels (`tiles_per_panel` worth each).
Grid cut_evenly(int64_t row_tiles, int64_t panels, int64_t threads, int64_t tiles_per_panel) {
    Grid best;
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int64_t rows = 1; rows <= std::min(threads, row_tiles); ++rows) {
        const int64_t cols = std::min(threads / rows, panels);
        const int64_t cost =
            (ceil_div(row_tiles, rows) + tiles_per_panel) * (ceil_div(panels, cols) + 1);
        if (cost < least) {
            least = cost;
            best = {rows, cols};
        }
    }
    return best;
}

ConstMatrix core_of(const Cores& cores, int64_t adapter) {
    return rows_from(cores.r, adapter * cores.rank);
}

// Float copy of the transpose of a core, in the calling thread's scratch memory.
ConstMatrix transposed_core(const ConstMatrix& r, int64_t rank) {
    float* data = scratch(Slot::kCore, 2 * rank * rank);
    float* widened = data + rank * rank;
    kernels().convert(r, {widened, DType::kFloat32, rank}, 0, rank, rank);
    for (int64_t i = 0; i < rank; ++i) {
        for (int64_t j = 0; j < rank; ++j) data[j * rank + i] = widened[i * rank + j];
    }
    return {data, DType::kFloat32, rank};
}

// Below this many rows, transposing the core costs more than the slower kernel.
constexpr int64_t kRowsWorthTransposing = 8;

// t[rows] = scale * q[rows] R^T (or R) for `count` rows that share the core r; `rows` may be null.
void apply_one_core(const ConstMatrix& q, const int64_t* rows, int64_t count, const ConstMatrix& r,
                    int64_t rank, bool transposed, float scale, const Matrix& t) {
    if (!transposed && count < kRowsWorthTransposing) {
        const DotArgs args{q, r, t, rows, rank, scale, nullptr, {}};
        kernels().dot(args, 0, count, 0, rank);
        return;
    }
    const ConstMatrix factor = transposed ? r : transposed_core(r, rank);
    const TileArgs args{q, factor, {}, t, rows, rank, scale, nullptr};
    kernels().tile(args, 0, count, 0, rank);
}

void zero_rows(const Matrix& t, const int64_t* rows, int64_t count, int64_t cols) {
    const int64_t size = element_size(t.dtype);
    for (int64_t i = 0; i < count; ++i) {
        std::fill_n(static_cast<char*>(t.data) + rows[i] * t.stride * size, cols * size, char{0});
    }
}

// t = scale * q R^T (or R) for the rows order[begin:end).
void apply_sorted_cores(const ConstMatrix& q, const Cores& cores, bool transposed, float scale,
                        const Matrix& t, int64_t begin, int64_t end) {
    const int64_t* offsets = cores.offsets;
    // Segment 0 holds the rows without adapter, segment a + 1 those of adapter a.
    int64_t segment = std::upper_bound(offsets, offsets + cores.n + 2, begin) - offsets - 1;
    while (begin < end) {
        const int64_t stop = std::min(end, offsets[segment + 1]);
        const int64_t* rows = cores.order + begin;
        if (segment == 0) {
            zero_rows(t, rows, stop - begin, cores.rank);
        } else if (stop > begin) {
            apply_one_core(q, rows, stop - begin, core_of(cores, segment - 1), cores.rank,
                           transposed, scale, t);
        }
        begin = stop;
        ++segment;
    }
}

void run_dot(const DotArgs& args, int64_t m, int64_t ranks) {
    parallel_blocks(m, kDotRows, ranks, 4, args.depth,
                    [&](int64_t m0, int64_t m1, int64_t j0, int64_t j1) {
                        kernels().dot(args, m0, m1, j0, j1);
                    });
}

void run_tile(const TileArgs& args, int64_t m, int64_t n) {
    parallel_blocks(m, kTileRows, n, 4 * kernels().tile_cols, args.depth,
                    [&](int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
                        kernels().tile(args, m0, m1, n0, n1);
                    });
}

}  // namespace

ConstMatrix rows_from(const ConstMatrix& m, int64_t first) {
    const int64_t bytes = first * m.stride * element_size(m.dtype);
    return {static_cast<const char*>(m.data) + bytes, m.dtype, m.stride};
}

Matrix rows_from(const Matrix& m, int64_t first) {
    const int64_t bytes = first * m.stride * element_size(m.dtype);
    return {static_cast<char*>(m.data) + bytes, m.dtype, m.stride};
}

void dense_linear(const ConstMatrix& x, int64_t m, int64_t depth, const ConstMatrix& w, int64_t n,
                  const ConstMatrix& bias, const Matrix& out) {
    run_dot({x, w, out, nullptr, depth, 1.0f, nullptr, bias}, m, n);
}

void packed_product(const ProductArgs& args, int64_t m, int64_t n) {
    const int64_t tile_rows = kernels().tile_rows, tile_cols = kernels().tile_cols;
    const int64_t row_tiles = ceil_div(m, tile_rows), panels = ceil_div(n, tile_cols);
    const int64_t work = m * n * (args.depth + args.rank);
    const int64_t threads =
        std::clamp<int64_t>(work / kWorkPerThread, 1, torch::stable::get_num_threads());
    const Grid grid = cut_evenly(row_tiles, panels, threads, args.panels ? 2 : 3);
    const int64_t rows = ceil_div(row_tiles, grid.rows) * tile_rows;
    const int64_t cols = ceil_div(panels, grid.cols) * tile_cols;
    parallel(grid.rows * grid.cols, kWorkPerThread, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t m0 = task / grid.cols * rows, n0 = task % grid.cols * cols;
            if (m0 >= m || n0 >= n) continue;
            kernels().product(args, m0, std::min(m, m0 + rows), n0, std::min(n, n0 + cols));
        }
    });
}

void shrink(const ConstMatrix& x, int64_t m, int64_t depth, const ConstMatrix& lhs, int64_t rank,
            const Dropout* dropout, const Matrix& q) {
    run_dot({x, lhs, q, nullptr, depth, 1.0f, dropout, {}}, m, rank);
}

void expand(const ConstMatrix& t, int64_t m, int64_t depth, const ConstMatrix& rhs, int64_t n,
            const ConstMatrix& base, const Dropout* dropout, const Matrix& out) {
    run_tile({t, rhs, base, out, nullptr, depth, 1.0f, dropout}, m, n);
}

void apply_core(const ConstMatrix& q, int64_t m, const Cores& cores, bool transposed, float scale,
                const Matrix& t) {
    const int64_t rank = cores.rank;
    if (cores.per_row()) {
        parallel(m, rank * rank, [&](int64_t begin, int64_t end) {
            apply_sorted_cores(q, cores, transposed, scale, t, begin, end);
        });
    } else if (!transposed && m < kRowsWorthTransposing) {
        run_dot({q, cores.r, t, nullptr, rank, scale, nullptr, {}}, m, rank);
    } else {
        const ConstMatrix factor = transposed ? cores.r : transposed_core(cores.r, rank);
        run_tile({q, factor, {}, t, nullptr, rank, scale, nullptr}, m, rank);
    }
}

void core_gradient(const ConstMatrix& p, const ConstMatrix& q, int64_t m, const Cores& cores,
                   float scale, const Matrix& d_core) {
    if (cores.n == 0) return;
    const int64_t rank = cores.rank;
    const int64_t unit = kernels().tile_rows;
    // Few adapters: cut each gradient finely. Many: one task each is plenty.
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t cuts = std::min(ceil_div(rank, unit), cores.n == 1 ? threads : 2 * threads);
    const int64_t block = round_up(ceil_div(rank, cuts), unit);
    const int64_t blocks = ceil_div(rank, block);
    const int64_t work = std::max<int64_t>(1, m / cores.n) * block * rank;
    // Adapters vary fastest, so that the blocks of one with many rows go to different threads.
    parallel(blocks * cores.n, work, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t adapter = task % cores.n;
            const int64_t i0 = task / cores.n * block;
            GradCoreArgs args{p, q, rows_from(d_core, adapter * rank), nullptr, m, rank, scale};
            if (cores.per_row()) {
                args.rows = cores.order + cores.offsets[adapter + 1];
                args.count = cores.offsets[adapter + 2] - cores.offsets[adapter + 1];
            }
            kernels().grad_core(args, i0, std::min(rank, i0 + block));
        }
    });
}

void gram_rows(const ConstMatrix& x, int64_t k, const ConstMatrix& w, int64_t m, int64_t n,
               float* partial, const Matrix& out) {
    constexpr int64_t kBlockRows = 64;
    const int64_t per_chunk = round_up(ceil_div(m, kGramChunks), kBlockRows);
    const int64_t chunks = ceil_div(m, per_chunk);
    parallel(chunks, per_chunk * k * n, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            const Matrix sum{partial + chunk * k * n, DType::kFloat32, n};
            const int64_t stop = std::min(m, (chunk + 1) * per_chunk);
            for (int64_t row = chunk * per_chunk; row < stop; row += kBlockRows) {
                const int64_t rows = std::min(kBlockRows, stop - row);
                const ConstMatrix block = rows_from(w, row);
                const Matrix t{scratch(Slot::kCore, k * kBlockRows), DType::kFloat32, rows};
                kernels().dot({x, block, t, nullptr, n, 1.0f, nullptr, {}}, 0, k, 0, rows);
                const bool first = row == chunk * per_chunk;
                const ConstMatrix before = first ? ConstMatrix{} : as_const(sum);
                kernels().tile({as_const(t), block, before, sum, nullptr, rows, 1.0f, nullptr}, 0,
                               k, 0, n);
            }
        }
    });
    float* total = static_cast<float*>(out.data);
    parallel(k, chunks * n, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * n; i < end * n; ++i) {
            float value = partial[i];
            for (int64_t chunk = 1; chunk < chunks; ++chunk) value += partial[chunk * k * n + i];
            total[i] = value;
        }
    });
}

void sum_rows(const ConstMatrix& g, int64_t m, int64_t n, const Matrix& out) {
    parallel_blocks(1, 1, n, 64, m, [&](int64_t, int64_t, int64_t n0, int64_t n1) {
        kernels().column_sum(g, m, out, n0, n1);
    });
}

void convert(const ConstMatrix& src, const Matrix& dst, int64_t m, int64_t cols) {
    parallel(m, cols, [&](int64_t m0, int64_t m1) { kernels().convert(src, dst, m0, m1, cols); });
}

void keep_mask(const Dropout& dropout, int64_t rows, int64_t cols, bool* out) {
    // About forty operations per element.
    parallel(rows, 40 * cols,
             [&](int64_t m0, int64_t m1) { kernels().keep_mask(dropout, m0, m1, cols, out); });
}

}  // namespace loraxs
