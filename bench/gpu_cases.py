"""What ``bench_linear`` runs on a GPU: the cases, and one pass of each contender."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.linear_cases import (
    DTYPES,
    MODELS,
    PASSES,
    Case,
    Operands,
    Step,
    attempt,
    eager_layer,
    eigentune_layer,
    ours_layer,
    step,
)
from loraxs_kernels import dispatch
from loraxs_kernels.backends import gpu

#: Our backends that are timed by name too, beside the one that is chosen.
NAMED_BACKENDS = ("triton", "cuda")

ROWS = (1, 16, 64, 256, 1024, 4096, 16384)
RANKS = (16, 64, 128, 256)

#: The layers of these models make up the default list.
DEFAULT_MODELS = ("mistral-7b", "llama-8b", "roberta-large", "smollm2-1.7b", "smollm2-135m")


def default_shapes() -> list[tuple[int, int]]:
    """The layers of the default list; those that several models share once."""
    return list(dict.fromkeys(shape for model in DEFAULT_MODELS for shape in MODELS[model]))


def select(
    shapes: list[tuple[int, int]] | None = None,
    ranks: list[int] | None = None,
    rows: list[int] | None = None,
    dtypes: list[str] | None = None,
    passes: list[str] | None = None,
) -> list[Case]:
    """The cases of a run; ``None``: the default list, bf16, thinned so that a run takes minutes.

    Thinned means: rank 64 everywhere, the other ranks at 16 and 4096 rows only.
    """
    cases = [
        Case(*shape, m, r, dtype, what)
        for shape in shapes or default_shapes()
        for dtype in dtypes or ("bf16",)
        for m in rows or ROWS
        for r in ranks or RANKS
        for what in passes or PASSES
    ]

    def kept(case: Case) -> bool:
        listed = ranks is not None or case.rank == 64 or case.rows in (16, 4096)
        return listed and case.rank <= min(case.shape)

    return [case for case in cases if kept(case)]


def quick_cases() -> list[Case]:
    """A few cases, for a look within a minute."""
    points = [((1024, 1024), 16), ((4096, 4096), 1), ((4096, 4096), 512), ((4096, 4096), 4096)]
    return [Case(*shape, m, 64, "bf16", what) for shape, m in points for what in PASSES]


def profiled_cases() -> list[Case]:
    """What ``--profile`` looks at unless cases are asked for."""
    return [Case(4096, 4096, 4096, 64, "bf16", what) for what in PASSES]


def wants_compile(case: Case) -> bool:
    """The small subset for which ``torch.compile`` runs by default: autotuning takes a minute."""
    point = (case.shape, case.rows)
    return case.rank == 64 and point in (((4096, 4096), 16), ((4096, 4096), 4096))


# ------------------------------------------------------------------------------- contenders


def bare(case: Case, ops: Operands) -> dict[str, Step]:
    """The layer alone by raw products, without autograd: the hardest to keep up with.

    Two ways to write it, and once more with cuBLASLt in place of what PyTorch prefers: the fastest
    counts.
    """
    W = ops.linear.weight.detach()
    b: Tensor | None = None if ops.linear.bias is None else ops.linear.bias.detach()

    def linear(x: Tensor, grad_y: Tensor) -> Any:
        y = F.linear(x.detach(), W, b)
        return (y, torch.matmul(grad_y, W)) if case.trains else y

    def addmm(x: Tensor, grad_y: Tensor) -> Any:
        x = x.detach()
        y = torch.mm(x, W.t()) if b is None else torch.addmm(b, x, W.t())
        return (y, torch.mm(grad_y, W)) if case.trains else y

    def cublaslt(x: Tensor, grad_y: Tensor) -> Any:
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library("cublaslt")
        try:
            return addmm(x, grad_y)
        finally:
            torch.backends.cuda.preferred_blas_library(before)

    return {"bare linear": linear, "bare addmm": addmm, "bare cublasLt": cublaslt}


def two_step(case: Case, ops: Operands, scaling: float = 1.0) -> Step:
    """LoRAFusion's idea for LoRA-XS in plain PyTorch, with as few launches as that allows.

    LoRAFusion splits a LoRA layer at its small intermediate and fuses the base
    product with the expansion: two Triton kernels forward. Here it is cuBLAS, which cannot fuse
    that; instead A rides along in the base product and the expansion adds to its result in place::

        [Y | Q]  = X [W; A]ᵀ      T = Q Rᵀ      Y  += s T Bᵀ          (beta = 1)
        [dX | P] = G [W | B]      T = P R       dX += s T A           dR = s Pᵀ Q

    Three launches forward, four backward. The joined weights are made once and cost their memory
    twice; Y and dX are views with a row stride of N + r and K + r, which a caller may have to copy.
    No autograd, as in the bare layers.
    """
    (N, K), r = ops.linear.weight.shape, case.rank
    W, b = ops.linear.weight.detach(), ops.linear.bias
    A, B, R = ops.A, ops.B, ops.R.to(DTYPES[case.dtype])
    down = torch.cat((W, A)).t()
    up = torch.cat((W, B), dim=1) if case.trains else None
    bias = None if b is None else torch.cat((b.detach(), b.new_zeros(r)))

    def run(x: Tensor, grad_y: Tensor) -> Any:
        x = x.detach()
        joined = torch.mm(x, down) if bias is None else torch.addmm(bias, x, down)
        y, q = joined[:, :N], joined[:, N:]
        y.addmm_(torch.mm(q, R.t()), B.t(), alpha=scaling)
        if up is None:
            return y
        joined = torch.mm(grad_y, up)
        dx, p = joined[:, :K], joined[:, K:]
        dx.addmm_(torch.mm(p, R), A, alpha=scaling)
        return dx, torch.addmm(R, p.t(), q, beta=0, alpha=scaling)

    return run


def _compiled(case: Case, ops: Operands) -> Step:
    # The mode "max-autotune" captures CUDA graphs by itself, which cannot be captured again; here
    # every contender gets its graph from gpu_timing, so it is that mode without them.
    torch.compiler.reset()
    eager = eager_layer(case, ops)
    compiled = torch.compile(
        eager, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True
    )
    return step(case, compiled, [eager.lora_R.weight])


def _eigentune(case: Case, ops: Operands) -> Step:
    layer = eigentune_layer(case, ops)
    return step(case, layer, [layer.core])


def contenders(
    case: Case, ops: Operands, *, with_compile: bool
) -> tuple[dict[str, Step], dict[str, str]]:
    """``(steps, skipped)``: one pass of each contender, and why one is not among them."""

    def ours(backend: str | None) -> Step:
        layer = ours_layer(case, ops, backend)
        return step(case, layer, [layer.R])

    eager = eager_layer(case, ops)
    steps: dict[str, Step] = {"ours": ours(None), **bare(case, ops)}
    steps["eager"] = step(case, eager, [eager.lora_R.weight])
    optional: dict[str, Callable[[], Step]] = {
        "two-step": lambda: two_step(case, ops),
        "eigentune": lambda: _eigentune(case, ops),
    }
    skipped: dict[str, str] = {}
    for name in NAMED_BACKENDS:
        why_not = dispatch.unavailable(name)
        if why_not is None:
            optional[f"ours {name}"] = lambda name=name: ours(name)  # type: ignore[misc]
        else:
            skipped[f"ours {name}"] = why_not
    if with_compile:
        optional["compile"] = lambda: _compiled(case, ops)
    made, failed = attempt(optional)
    return steps | made, skipped | failed


def chosen_backend(case: Case, device: str, *, per_row: bool = False) -> str:
    """The backend that ``backend=None`` stands for, in the forward pass (without tuning)."""
    call = dispatch.Call(
        device, DTYPES[case.dtype], torch.float32, True, per_row, False, rank=case.rank
    )
    choice = dispatch.choose(call, None)
    if choice.module is not gpu:
        return choice.name
    sizes = case.rows, case.out_features, case.in_features, case.rank
    plan = gpu.for_sizes(*sizes, DTYPES[case.dtype], per_row=per_row)
    return plan.backend
