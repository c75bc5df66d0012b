"""What is built, what this machine can run, and which backend each kind of call gets and why."""

from __future__ import annotations

import platform

import torch

import loraxs_kernels
from loraxs_kernels import _native, dispatch
from loraxs_kernels.backends import onednn, packing
from loraxs_kernels.backends.cuda import plan as cuda_plan


def _devices() -> list[str]:
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    return devices


def _native_line() -> str:
    why_not = _native.load()
    if why_not:
        return f"not used: {why_not}"
    return f"loaded, instruction set {torch.ops.loraxs_cpu.isa()}"


def _cuda_line() -> str:
    why_not = _native.load("cuda")
    if why_not:
        return why_not
    archs, kernels = cuda_plan.kernels()
    return f"loaded, {len(kernels)} kernels for {' '.join(archs)}"


def _product(dtype: torch.dtype) -> str:
    """How the CPU backend multiplies by W with more than a few rows."""
    if dtype == torch.float64:
        return "plain calls"
    if onednn.own_product(dtype):
        return "own product of float32 panels"
    return f"oneDNN, packed in {str(onednn.packed_dtype(dtype)).removeprefix('torch.')}"


def _calls() -> list[str]:
    lines = []
    for device in _devices():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            call = dispatch.Call(device, dtype, torch.float32, True, False, False)
            name = str(dtype).removeprefix("torch.")
            try:
                choice = dispatch.choose(call, None)
                how = ""
                if choice.name == "onednn":
                    how = f"{_product(dtype)}, "
                lines.append(f"  {device:5} {name:9} {choice.name:10} {how}{choice.reason}")
            except RuntimeError as error:
                lines.append(f"  {device:5} {name:9} {error}")
    return lines


def _plans() -> list[str]:
    """What a call gets on this GPU for some sizes, and what tuning has found."""
    if dispatch.unavailable("triton") or not torch.cuda.is_available():
        return []
    from loraxs_kernels.backends import gpu as gpu_choice
    from loraxs_kernels.backends.problem import gpu_of
    from loraxs_kernels.backends.triton.autotune import winners
    from loraxs_kernels.backends.triton.plan import Problem, choose

    gpu = gpu_of(torch.device("cuda"))
    built = dispatch.unavailable("cuda") is None
    lines = ["", "plans for bfloat16 inputs and a 4096 x 4096 layer on this GPU"]
    for rows in (16, 8192):
        for rank in (16, 64, 256):
            problem = Problem(rows, 4096, 4096, rank, 2)
            plan = choose(problem, gpu).describe()
            lines.append(f"  {rows:5} rows, rank {rank:3}   Triton: {plan}")
            if built:
                best = gpu_choice.for_sizes(rows, 4096, 4096, rank, torch.bfloat16)
                lines[-1] += f"; cheapest of both by arithmetic: {best.plan}"
    tuned = [(key, w if isinstance(w, str) else w.describe()) for key, w in winners().items()]
    lines += [f"  measured: {key}: {winner}" for key, winner in tuned]
    return lines


def report() -> str:
    """The text that ``python -m loraxs_kernels info`` prints."""
    tensors, held = packing.packed_bytes()
    lines = [
        f"loraxs_kernels {loraxs_kernels.__version__}",
        f"torch {torch.__version__} (CUDA build: {torch.version.cuda or 'no'}), "
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads",
        f"CPU capability as PyTorch sees it: {torch.backends.cpu.get_cpu_capability()}",
        f"compiled CPU operators: {_native_line()}",
        f"compiled CUDA kernels: {_cuda_line()}",
        f"GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}",
        "",
        "backends",
    ]
    for name in dispatch.NAMES:
        lines.append(f"  {name:10} {dispatch.unavailable(name) or 'available'}")
    named = dispatch.default_name()
    lines += [
        "",
        f"calls (LORAXS_BACKEND: {named or 'not set'}; a weight, A or B that trains: reference)",
        *_calls(),
        *_plans(),
        "",
        f"packed copies: {'on' if packing.enabled() else 'off (LORAXS_PREPACK=0)'}; "
        f"{held / 2**20:.1f} MiB for {tensors} tensors in this process",
    ]
    return "\n".join(lines)
