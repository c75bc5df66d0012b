"""A short check of an installed loraxs_kernels: does it import, explain itself, and compute right?

python tools/smoke.py [--compiled yes|no]     exit status 0 if everything is as it should be
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import loraxs_kernels as lxk

Tensors = tuple[torch.Tensor, ...]
Function = Callable[[torch.Tensor, Tensors, float], torch.Tensor]


def check_install(compiled: str | None) -> None:
    """The package is the installed one, with the compiled library there or not, as expected."""
    home = Path(lxk.__file__).resolve().parent
    if not home.is_relative_to(Path(sys.prefix).resolve()):
        raise SystemExit(f"smoke: loraxs_kernels was imported from {home}, not from {sys.prefix}")
    found = "yes" if (home / "_cpu.abi3.so").exists() else "no"
    if (home / "_cuda.abi3.so").exists() and torch.version.cuda is None:
        raise SystemExit("smoke: a CUDA library is installed beside a CPU build of torch")
    print(f"smoke: torch {torch.__version__}, compiled library: {found}", flush=True)
    if compiled not in (None, found):
        raise SystemExit(f"smoke: compiled library there: {found}; expected: {compiled}")


def check_info() -> None:
    """``python -m loraxs_kernels info`` works, started where no checkout can be imported."""
    command = [sys.executable, "-m", "loraxs_kernels", "info"]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            command, cwd=elsewhere, stdout=subprocess.PIPE, text=True, check=False
        )
    print(done.stdout, flush=True)
    if done.returncode != 0 or not done.stdout.strip():
        raise SystemExit(f"smoke: info: exit status {done.returncode}")


def formula(x: torch.Tensor, tensors: Tensors, scaling: float) -> torch.Tensor:
    weight, A, R, B, bias = tensors
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(F.linear(x, A), R), B)


def package(x: torch.Tensor, tensors: Tensors, scaling: float) -> torch.Tensor:
    weight, A, R, B, bias = tensors
    return lxk.lora_xs_linear(x, weight, A, R, B, bias, scaling=scaling)


def results(function: Function, x: torch.Tensor, tensors: Tensors, grad: torch.Tensor) -> Tensors:
    """y, dx and dR of ``function``, in float64."""
    x = x.detach().clone().requires_grad_()
    weight, A, R, B, bias = tensors
    R = R.detach().clone().requires_grad_()
    y = function(x, (weight, A, R, B, bias), 0.75)
    dx, dR = torch.autograd.grad(y, (x, R), grad)
    return y.detach().double(), dx.double(), dR.double()


def check_values(
    rows: int, in_features: int, out_features: int, rank: int, dtype: torch.dtype
) -> None:
    """The error against float64 is at most twice that of plain PyTorch, plus two roundings."""
    generator = torch.Generator().manual_seed(rows + rank)
    shapes = [(out_features, in_features), (rank, in_features), (rank, rank), (out_features, rank)]
    tensors = [
        (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(dtype)
        for shape in [*shapes, (1, out_features)]
    ]
    tensors[-1] = tensors[-1].flatten()
    x = torch.randn(rows, in_features, generator=generator).to(dtype)
    grad = torch.randn(rows, out_features, generator=generator).to(dtype)
    wide = tuple(tensor.double() for tensor in tensors)
    truth = results(formula, x.double(), wide, grad.double())
    plain = results(formula, x, tuple(tensors), grad)
    ours = results(package, x, tuple(tensors), grad)
    for name, t, p, o in zip(("y", "dx", "dR"), truth, plain, ours, strict=True):
        allowed = 2 * (p - t).abs().max() + 2 * torch.finfo(dtype).eps * t.abs().max()
        error = (o - t).abs().max()
        if not error <= allowed:
            raise SystemExit(
                f"smoke: {name} of {rows}x{in_features}->{out_features}, rank {rank}, {dtype}: "
                f"error {error:.3g}, allowed {allowed:.3g}"
            )


def check_loaded() -> None:
    """A compiled library that is there was taken by torch and the package, not passed over."""
    if not any(Path(name).name == "_cpu.abi3.so" for name in torch.ops.loaded_libraries):
        raise SystemExit("smoke: the compiled library is there, but the package did not load it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiled", choices=["yes", "no"], help="what the install should hold")
    compiled = parser.parse_args().compiled
    check_install(compiled)
    check_info()
    # Small shapes: this asks whether the install works. How errors grow with size, the tests ask.
    cases = [(1, 384, 384, 16), (33, 200, 129, 25), (64, 256, 384, 64)]
    dtypes = [torch.float32, torch.bfloat16]  # float64 is the measure
    for dtype in dtypes:
        for case in cases:
            check_values(*case, dtype)
    if compiled == "yes":
        check_loaded()
    print(f"smoke: y, dx and dR right in {len(cases) * len(dtypes)} cases")


if __name__ == "__main__":
    main()
