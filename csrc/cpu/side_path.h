// The stages of the low-rank side path over whole matrices, shared among torch's threads.
#pragma once

#include "kernels.h"

namespace loraxs {

// Rows [first, ...) of a matrix.
ConstMatrix rows_from(const ConstMatrix& m, int64_t first);
Matrix rows_from(const Matrix& m, int64_t first);

// Which core each row uses. With `offsets` unset: one core for all rows. Otherwise `order` lists
// the rows sorted by adapter, those without adapter first: rows order[offsets[0] : offsets[1]] have
// none, rows order[offsets[a + 1] : offsets[a + 2]] use core a.
struct Cores {
    ConstMatrix r;  // [n, rank, rank], stride = rank
    int64_t n = 1;
    int64_t rank = 0;
    const int64_t* order = nullptr;
    const int64_t* offsets = nullptr;
    // Not by `order`, which is null for a batch without rows.
    bool per_row() const { return offsets != nullptr; }
};

// out [M, N] = x [M, depth] w^T + bias, w [N, depth]; bias may have no data.
void dense_linear(const ConstMatrix& x, int64_t m, int64_t depth, const ConstMatrix& w, int64_t n,
                  const ConstMatrix& bias, const Matrix& out);

// args.out [M, N] = x w^T + t rhs + bias; see ProductArgs.
void packed_product(const ProductArgs& args, int64_t m, int64_t n);

// q [M, rank] = dropout(x [M, depth]) lhs^T, lhs [rank, depth].
void shrink(const ConstMatrix& x, int64_t m, int64_t depth, const ConstMatrix& lhs, int64_t rank,
            const Dropout* dropout, const Matrix& q);

// t = scale * q R^T, or scale * q R if `transposed`; zero for rows without adapter.
void apply_core(const ConstMatrix& q, int64_t m, const Cores& cores, bool transposed, float scale,
                const Matrix& t);

// out [M, N] = base + dropout(t [M, depth] rhs [depth, N]).
void expand(const ConstMatrix& t, int64_t m, int64_t depth, const ConstMatrix& rhs, int64_t n,
            const ConstMatrix& base, const Dropout* dropout, const Matrix& out);

// d_core [n, rank, rank]: scale * sum over the rows m of each adapter of p[m]^T q[m], summed in an
// order that does not depend on the number of threads; exact zeros for adapters without rows.
void core_gradient(const ConstMatrix& p, const ConstMatrix& q, int64_t m, const Cores& cores,
                   float scale, const Matrix& d_core);

// out [N] = sum of the rows of g [M, N].
void sum_rows(const ConstMatrix& g, int64_t m, int64_t n, const Matrix& out);

// dst = src, where one of the two is float32.
void convert(const ConstMatrix& src, const Matrix& dst, int64_t m, int64_t cols);

// out [rows, cols] = the elements that dropout keeps.
void keep_mask(const Dropout& dropout, int64_t rows, int64_t cols, bool* out);

// out[k, n] = x W^T W for x [k, n] and W [m, n], all float32: W is read from memory once, its
// second use finds it in cache. `partial` has room for kGramChunks * k * n floats. The sum over the
// rows of W is cut the same way for any number of threads.
constexpr int64_t kGramChunks = 8;
void gram_rows(const ConstMatrix& x, int64_t k, const ConstMatrix& w, int64_t m, int64_t n,
               float* partial, const Matrix& out);

}  // namespace loraxs
