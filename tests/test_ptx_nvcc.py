"""What nvcc makes of CUDA C++, executed by the interpreter."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ptx import Kernel, Memory, Module, errors, launch

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>

struct Problem { const float* x; float* y; int rows, columns; float scale; };

// y[row] = scale * sum(x[row, :]) by one CTA per row: shared memory, shuffles, a tree.
extern "C" __global__ void row_sums(const Problem p) {
    __shared__ float partial[32];
    const float* x = p.x + (size_t)blockIdx.x * p.columns;
    float sum = 0.f;
    for (int c = threadIdx.x; c < p.columns; c += blockDim.x) sum = fmaf(x[c], p.scale, sum);
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    BARRIER
    if (threadIdx.x < 32) {
        sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.f;
        for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
        if (threadIdx.x == 0) p.y[blockIdx.x] = sum;
    }
}

// One warp: C[16, 8] = A[16, 16] B[8, 16]^T in bf16, by cp.async, ldmatrix and mma.
extern "C" __global__ void tile(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
    __shared__ __align__(16) __nv_bfloat16 sa[16][16], sb[8][16];
    const int lane = threadIdx.x;
    auto smem = [](const void* p) { return (unsigned)__cvta_generic_to_shared(p); };
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;"
        :: "r"(smem(&sa[lane / 2][lane % 2 * 8])), "l"(a + 8 * lane));
    if (lane < 16)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16;"
            :: "r"(smem(&sb[lane / 2][lane % 2 * 8])), "l"(b + 8 * lane));
    asm volatile("cp.async.commit_group;\n cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    unsigned ra[4], rb[2];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(ra[0]), "=r"(ra[1]), "=r"(ra[2]), "=r"(ra[3])
        : "r"(smem(&sa[lane % 16][lane / 16 * 8])));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
        : "=r"(rb[0]), "=r"(rb[1]) : "r"(smem(&sb[lane % 8][lane / 8 % 2 * 8])));
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "r"(rb[0]), "r"(rb[1]));
    for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// Half precision, integer division, a local array and a histogram by atomics.
extern "C" __global__ void mixed(
    const __half2* x, unsigned* histogram, float* out, int n, int bins) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    __half2 v = __hfma2(x[i], __floats2half2_rn(2.f, 0.5f), __float2half2_rn(1.f));
    float2 f = __half22float2(v);
    int digits[4];
    for (int k = 0, r = i; k < 4; ++k, r /= 7) digits[k] = r % 7;
    out[i] = f.x + f.y + digits[i % 4] + __float2int_rn(f.x * 3.f);
    atomicAdd(&histogram[__umulhi(i * 2654435761u, bins)], 1u);
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("nvcc")

    def build(barrier: str) -> dict[str, Kernel]:
        source = folder / "kernels.cu"
        source.write_text(SOURCE.replace("BARRIER", barrier))
        command = [
            str(NVCC),
            "-ptx",
            "-arch=sm_80",
            "-std=c++17",
            "-o",
            str(folder / "out.ptx"),
            str(source),
        ]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return Module((folder / "out.ptx").read_text()).kernels

    return build("__syncthreads();"), build("")


@pytest.mark.parametrize("threads", [64, 256])
def test_row_sums(compiled: Any, threads: int) -> None:
    memory = Memory()
    x = np.random.default_rng(0).integers(-8, 8, (5, 300)).astype(np.float32)
    source, out = memory.buffer(x, "x", False), memory.buffer(np.full(5, np.nan, np.float32), "y")
    problem = np.zeros(
        (),
        np.dtype(
            [
                ("x", "u8"),
                ("y", "u8"),
                ("rows", "i4"),
                ("columns", "i4"),
                ("scale", "f4"),
                ("_", "i4"),
            ]
        ),
    )
    problem["x"], problem["y"], problem["rows"], problem["columns"], problem["scale"] = (
        source.address,
        out.address,
        5,
        300,
        0.5,
    )
    args = [problem.tobytes()]
    launch(compiled[0]["row_sums"], grid=(5,), args=args, memory=memory, threads=threads)
    assert np.array_equal(out.array(), 0.5 * x.sum(1)) and (out.write_counts == 1).all()
    with pytest.raises(errors.SharedRace):
        launch(compiled[1]["row_sums"], grid=(5,), args=args, memory=memory, threads=threads)
    with pytest.raises(errors.OutOfBounds, match=r"bytes into [xy], which has"):
        launch(compiled[0]["row_sums"], grid=(6,), args=args, memory=memory, threads=threads)


def test_cp_async_ldmatrix_mma(compiled: Any) -> None:
    import torch

    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 16, generator=g).bfloat16() for rows in (16, 8))
    memory = Memory()
    out = memory.buffer(np.zeros((16, 8), np.float32), "c")
    args = [memory.buffer(a, "a", False), memory.buffer(b, "b", False), out]
    report = launch(compiled[0]["tile"], grid=(1,), args=args, memory=memory, threads=32)
    want = (a.double() @ b.double().T).float().numpy()
    assert np.array_equal(out.array(), want)
    assert report.tensor_flops == 2 * 16 * 8 * 16


def test_mixed_arithmetic(compiled: Any) -> None:
    n, bins = 300, 13
    x = (np.random.default_rng(1).integers(-64, 64, (n, 2)) / 16).astype(np.float16)
    memory = Memory()
    histogram, out = (
        memory.buffer(np.zeros(bins, np.uint32)),
        memory.buffer(np.zeros(n, np.float32)),
    )
    args = [memory.buffer(x, "x", False), histogram, out, n, bins]
    launch(compiled[0]["mixed"], grid=(3,), args=args, memory=memory, threads=128)
    i = np.arange(n)
    f = x.astype(np.float32) * [2, 0.5] + 1
    digits = np.stack([i // 7**k % 7 for k in range(4)], 1)
    want = f.sum(1) + digits[i, i % 4] + np.rint(f[:, 0] * 3)
    assert np.array_equal(out.array(), want.astype(np.float32))
    slot = (i.astype(np.uint64) * 2654435761 % 2**32 * bins) >> 32
    assert np.array_equal(histogram.array(), np.bincount(slot.astype(np.int64), minlength=bins))


def test_every_instruction_of_these_kernels_is_known(compiled: Any) -> None:
    names = {i.opcode for kernel in compiled[0].values() for i in kernel.instructions}
    assert not [n for n in names if re.match(r"call|wmma", n)]
