"""Triton kernels that the interpreter's tests compile: what the library's kernels are made of."""

import triton
import triton.language as tl


@triton.jit
def matmul(
    x_ptr, w_ptr, y_ptr, M, N, K, scale, x_row, x_col, w_row, w_col, y_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    X_TIMES: tl.constexpr,
):  # fmt: skip
    """Y = scale · (X_TIMES · X) Wᵀ, with tails masked on every side."""
    column_tiles = tl.cdiv(N, BN)
    m = tl.program_id(0) // column_tiles * BM + tl.arange(0, BM)
    n = tl.program_id(0) % column_tiles * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x = x_ptr + m[:, None].to(tl.int64) * x_row + k[None, :] * x_col
    w = w_ptr + n[None, :].to(tl.int64) * w_row + k[:, None] * w_col
    acc = tl.zeros((BM, BN), tl.float32)
    for at in range(0, K, BK):
        a = tl.load(x, mask=(m[:, None] < M) & (at + k[None, :] < K), other=0.0)
        b = tl.load(w, mask=(n[None, :] < N) & (at + k[:, None] < K), other=0.0)
        if X_TIMES != 1:
            a = (a * X_TIMES).to(a.dtype)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        x += BK * x_col
        w += BK * w_col
    y = y_ptr + m[:, None].to(tl.int64) * y_row + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(y, (acc * scale).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def matmul_tma(
    x_ptr, w_ptr, y_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Y = X Wᵀ through tensor descriptors made in the kernel."""
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    x = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [BM, BK])
    w = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BN, BK])
    y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BM, BN])
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(x.load([m, k]), w.load([n, k]).T, acc)
    y.store([m, n], acc.to(y_ptr.dtype.element_ty))


@triton.jit
def publish(
    counter_ptr, flag_ptr, q_ptr, x_ptr, y_ptr, seed, n,
    BLOCK: tl.constexpr, BARRIER: tl.constexpr,
):  # fmt: skip
    """The first ticket stores a masked copy of x and publishes it; the others read it."""
    ticket = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    at = tl.arange(0, BLOCK)
    if ticket == 0:
        x = tl.load(x_ptr + at, mask=at < n, other=0.0)
        tl.store(q_ptr + at, tl.where(tl.rand(seed, at) > 0.5, x, 0.0), mask=at < n)
        if BARRIER:
            tl.debug_barrier()
        tl.atomic_add(flag_ptr, 1, sem="release")
    else:
        seen = tl.atomic_add(flag_ptr, 0, sem="acquire")
        while seen == 0:
            seen = tl.atomic_add(flag_ptr, 0, sem="acquire")
        q = tl.load(q_ptr + at, mask=at < n, other=0.0, cache_modifier=".cg")
        total = tl.sum(q, 0)
        tl.store(y_ptr + ticket * BLOCK + at, q + total)


@triton.jit
def copy_box(x_desc, y_ptr, row, column, BM: tl.constexpr, BN: tl.constexpr):
    """A box of a tensor described on the host, stored without gaps."""
    box = x_desc.load([row, column])
    at = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    tl.store(y_ptr + at, box)
