"""A kernel of the CUDA extension executed from its PTX, without a GPU.

``execute`` runs any kernel that takes a Problem: of the built library, or of a bare ``.ptx`` file::

    kernel = Module(Path("ticket.ptx").read_text()).kernels["loraxs_sm80_ticket_bf16_forward"]
    tensors = operands(facts, x=x, w=w, a=a, core=R.mT, b=b, scaling=0.7)
    done = execute(kernel, facts, tensors)
    tensors["d"], done.report.tensor_flops, done.buffers["d"].write_counts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.cuda_problem import (
    READ,
    WRITTEN,
    Facts,
    ceil_div,
    fill,
    geometry,
    partial_sums,
    split_scaling,
)
from tests.ptx import Buffer, Kernel, Memory, Report, launch
from tests.ptx.ops import tensormap

#: A tensor map as the host describes it (kernel.h): the tensor's name, columns, rows, pitch,
#: columns and rows of the box, swizzle.
Map = tuple[str, int, int, int, int, int, int]


@dataclass
class Operands:
    """One pass: tensors by the names of Problem's pointers, and all other fields."""

    tensors: dict[str, Tensor]
    fields: dict[str, Any]
    maps: Sequence[Map] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass
class Done:
    """What a launch left behind."""

    report: Report
    buffers: dict[str, Buffer] = field(default_factory=dict)


def operands(
    kernel: Facts, *, x: Tensor, a: Tensor, core: Tensor, b: Tensor, scaling: float,
    w: Tensor | None = None, base: Tensor | None = None, bias: Tensor | None = None,
    q: Tensor | None = None, ids: Tensor | None = None, order: Tensor | None = None,
    offsets: Tensor | None = None, has_d: bool = True, store_side: bool = True,
    need_dr: bool = False, need_db: bool = False,
    chunks: int = 1, parts: int = 1, group: int = 8, side_cols: int | None = None,
    d_row: int | None = None, maps: Callable[[dict[str, Any]], Sequence[Map]] | None = None,
) -> Operands:  # fmt: skip
    """Workspace and fields for operands in the roles of problem.h, as csrc/cuda/ops.cpp makes them.

    ``core``: [r, r] or [n, r, r], already in its role (the forward passes ``R.mT``). Everything
    that the launch has to write is NaN, flags are zero. ``maps`` gets the fields.
    """
    (m, depth), n, rank = x.shape, b.shape[0], a.shape[0]
    adapters = core.shape[0] if core.dim() == 3 else 1
    counts = geometry(
        kernel, m, n, depth, rank, has_d=has_d, need_dr=need_dr, need_db=need_db,
        adapters=adapters, per_row=ids is not None, chunks=chunks, parts=parts, group=group,
    )  # fmt: skip
    vector = 16 // x.element_size()

    def empty(*shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    t: dict[str, Tensor | None] = {
        "x": x, "w": w, "base": base, "a": a, "core": core, "b": b, "bias": bias, "q": q,
        "ids": ids, "order": order, "offsets": offsets,
    }  # fmt: skip
    if has_d:
        t["d"] = empty(m, d_row or n)[:, :n]
    if store_side or need_dr or kernel.family in ("ticket", "few-rows"):
        t["side"] = empty(m, side_cols or ceil_div(rank, vector) * vector)[:, :rank]
    if kernel.family in ("ticket", "few-rows"):
        t["t"] = empty(m, counts["t_cols"])
    if need_dr:
        t["dr"] = empty(*((adapters, rank, rank) if core.dim() == 3 else (rank, rank)),
                        dtype=core.dtype)  # fmt: skip
    if need_db:
        t["db"] = empty(depth)
    if counts["flag_count"]:
        t["flags"] = torch.zeros(counts["flag_count"], dtype=torch.int32)
    if ids is not None and order is None:
        t["bad_id"] = torch.zeros(1, dtype=torch.int32)
    sums = partial_sums(kernel, counts)
    if sums:
        t["partial"] = empty(sums, dtype=torch.float32)
    tensors = {name: tensor for name, tensor in t.items() if tensor is not None}
    fraction, before, after = split_scaling(scaling)
    fields: dict[str, Any] = counts | {
        "core_is_fp32": int(core.dtype == torch.float32), "fraction": fraction, "before": before,
        "after": after, "dr_scale": scaling,
        "core_adapter": core.stride(0) if core.dim() == 3 else 0,
        "core_row": core.stride(-2), "core_col": core.stride(-1),
    }  # fmt: skip
    for name in ("x", "w", "base", "a", "b", "d", "side", "t", "q"):
        if name in tensors:
            fields[f"{name}_row"] = pitch(tensors[name])
    return Operands(tensors, fields, maps(fields) if maps else ())


def pitch(t: Tensor) -> int:
    """The stride that is not 1, of a matrix in either layout."""
    return t.stride(0) if t.stride(1) == 1 else t.stride(1)


def grid_of(kernel: Facts, fields: dict[str, Any]) -> int:
    """Number of CTAs."""
    beside = sum(ceil_div(int(fields[name]), kernel.cluster) for name in ("db_items", "dr_items"))
    return (beside + int(fields["gemm_items"])) * kernel.cluster


def execute(
    kernel: Kernel, facts: Facts, operands: Operands, *, residency: int | None = None,
    order: Any = "linear", skew: dict[str, int] | None = None, grid: int | None = None,
) -> Done:  # fmt: skip
    """Run one launch; what it writes goes back into the tensors of ``operands``.

    ``skew``: bytes by which the address of a named tensor misses a multiple of 256.
    """
    return run_kernel(
        kernel, fill(operands.fields), operands.tensors, operands.maps,
        grid=grid or grid_of(facts, operands.fields), cluster=facts.cluster,
        threads=facts.threads, shared=facts.shared, residency=residency, order=order, skew=skew,
    )  # fmt: skip


def run_kernel(
    kernel: Kernel, problem: Any, tensors: dict[str, Tensor], maps: Sequence[Map], *, grid: int,
    cluster: int, threads: int, shared: int, residency: int | None = None, order: Any = "linear",
    skew: dict[str, int] | None = None,
) -> Done:  # fmt: skip
    """Run one launch with a Problem whose pointers become the interpreter's."""
    memory = Memory()
    buffers = {}
    for name, tensor in tensors.items():
        assert name in READ + WRITTEN, name
        buffers[name] = memory.buffer(
            tensor, name, writable=name in WRITTEN, skew=(skew or {}).get(name, 0)
        )
        problem[name] = buffers[name].address
    args: list[Any] = [problem.tobytes()]
    args += [_encode(m, buffers, tensors) for m in maps]
    report = launch(
        kernel,
        grid=(grid,),
        args=args,
        memory=memory,
        threads=threads,
        shared_bytes=shared,
        residency=residency,
        order=order,
        cluster=cluster,
    )
    for name in buffers.keys() & set(WRITTEN):
        tensors[name].copy_(buffers[name].array())
    return Done(report, buffers)


def _encode(m: Map, buffers: dict[str, Buffer], tensors: dict[str, Tensor]) -> bytes:
    name, columns, rows, row_stride, box_columns, box_rows, swizzle = m
    kinds = {torch.bfloat16: "bf16", torch.float16: "f16"}
    size = tensors[name].element_size()
    return tensormap.encode(
        buffers[name].address, kinds[tensors[name].dtype], (columns, rows), (row_stride * size,),
        (box_columns, box_rows), swizzle,
    )  # fmt: skip


def flags_are_zero(operands: Operands) -> bool:
    """Whether the launch left its flags as it found them."""
    return "flags" not in operands.tensors or not operands["flags"].any()
