"""The CUDA backend on a GPU that is not there: its launches are executed from the library's PTX.

Everything but the driver is the real thing: the backend's passes, the plan, the C++ checks,
geometry, scratch and Problem (the op ``prepare``), and the PTX that is embedded in the library.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraxs_kernels import _native
from loraxs_kernels.backends.cuda import launch, plan
from tests.cuda_problem import PROBLEM, READ, WRITTEN
from tests.cuda_ptx import Done, Map, run_kernel
from tests.ptx import Kernel, Module
from tools.cuda_resources import library, tool

#: The op's tensors, in the order of its schema; ``dR`` is ``dr`` in Problem.
TENSORS = (
    "x", "w", "base", "a", "core", "b", "bias", "q", "ids", "order", "offsets", "d", "side", "dr",
    "db", "flags", "bad_id",
)  # fmt: skip
SCRATCH = ("side", "t", "partial")


def require_library() -> None:
    """Skips a module of tests where the library is not there, unless it must be."""
    why_not = _native.load("cuda")
    if why_not is not None and os.environ.get("LORAXS_BUILD_CUDA") == "1":
        raise AssertionError(f"LORAXS_BUILD_CUDA=1, but the CUDA library is {why_not}")
    if why_not is not None:
        pytest.skip(f"the CUDA library: {why_not}", allow_module_level=True)


@functools.cache
def _texts() -> dict[str, dict[str, str]]:
    """The PTX files of the library, by architecture (``"sm_80"``) and kernel."""
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [tool("cuobjdump"), "-xptx", "all", str(library())],
            check=True, capture_output=True, cwd=folder,
        )  # fmt: skip
        for file in Path(folder).glob("*.ptx"):
            text = file.read_text()
            arch = re.search(r"^\.target (sm_\w+)", text, re.MULTILINE)
            assert arch is not None, file
            for name in re.findall(r"^\.visible \.entry (\w+)\(", text, re.MULTILINE):
                found.setdefault(arch[1], {})[name] = text
    return found


@functools.cache
def _module(text: str) -> Module:
    return Module(text)


def kernel(name: str, arch: int) -> Kernel:
    """A kernel as compiled for ``arch`` (80, or 90 for sm_90a)."""
    text = _texts()["sm_90a" if arch == 90 else f"sm_{arch}"][name]
    return _module(text).kernels[name]


@dataclass
class Executed:
    """One launch: the kernel's name, the Problem's fields, the tensors by the names of Problem."""

    name: str
    fields: Any
    tensors: dict[str, Tensor]
    grid: int
    done: Done


@dataclass
class Device:
    """Executes what the backend launches, and keeps it."""

    arch: int = 80
    order: Any = "linear"
    residency: int | None = None
    runs: list[Executed] = field(default_factory=list)

    def run(self, *arguments: Any) -> None:
        """Takes the place of ``torch.ops.loraxs_cuda.run``."""
        told, raw, *scratch = torch.ops.loraxs_cuda.prepare(*arguments)
        launched = json.loads(told)
        problem = raw.numpy().view(PROBLEM)[0].copy()
        given = dict(zip(TENSORS, arguments, strict=False))
        given |= {n: t for n, t in zip(SCRATCH, scratch, strict=True) if t is not None}
        tensors = {name: t for name, t in given.items() if t is not None and problem[name]}
        for name in READ + WRITTEN:
            address = tensors[name].data_ptr() if name in tensors else 0
            assert problem[name] == address, f"Problem.{name} is not the address of a tensor"
        for t in (tensors[n] for n in SCRATCH if n in tensors):
            t.fill_(float("nan"))
        maps = [self._map(m, tensors) for m in launched["maps"]]
        done = run_kernel(
            kernel(launched["kernel"], self.arch), problem, tensors, maps,
            grid=launched["grid"], cluster=launched["cluster"], threads=launched["threads"],
            shared=launched["shared"], residency=self.residency, order=self.order,
        )  # fmt: skip
        self.runs.append(Executed(launched["kernel"], problem, tensors, launched["grid"], done))

    @staticmethod
    def _map(described: list[int], tensors: dict[str, Tensor]) -> Map:
        address, *numbers = described
        name = next(n for n, t in tensors.items() if t.data_ptr() == address)
        columns, rows, row_stride, box_columns, box_rows, swizzle = numbers
        return (name, columns, rows, row_stride, box_columns, box_rows, swizzle)


def install(monkeypatch: pytest.MonkeyPatch, device: Device) -> Device:
    """The backend launches on ``device``; fresh memory holds NaN."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def poison(t: Tensor) -> Tensor:
        return t.fill_(float("nan")) if t.is_floating_point() and t.device.type == "cpu" else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(launch, "operator", lambda: device.run)
    monkeypatch.setattr(launch, "plan_override", None)
    monkeypatch.setattr(launch, "_prepared", {})
    return device


def named(kernel: str, **cut: int) -> Any:
    """For ``launch.plan_override``: ``kernel`` with ``DIRECTION`` for the pass's direction."""

    def choose(problem: Any, gpu: Any) -> plan.Plan:
        # A backward is told by what only it has.
        backward = problem.need_dR or problem.need_db
        return plan.Plan(kernel.replace("DIRECTION", "backward" if backward else "forward"), **cut)

    return choose
