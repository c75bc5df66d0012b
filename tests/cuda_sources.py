"""The CUDA sources, compiled one by one for the tests that look at a kernel alone."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.ptx import Module

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
PTX = Path(__file__).parents[1] / "build" / "ptx"


def cutlass() -> Path | None:
    """The folder with ``cute/tensor.hpp``, found as setup.py finds it."""
    named = os.environ.get("CUTLASS_PATH")
    places = [Path(named, "include"), Path(named)] if named else []
    spec = None if named else importlib.util.find_spec("cutlass_library")
    if spec is not None and spec.submodule_search_locations:
        places = [Path(p, "source", "include") for p in spec.submodule_search_locations]
    return next((p for p in places if (p / "cute" / "tensor.hpp").is_file()), None)


def require_compiler() -> None:
    """Skips a test that cannot compile."""
    if shutil.which("nvcc") is None or cutlass() is None:
        pytest.skip("nvcc or the headers of CUTLASS (CUTLASS_PATH) are not there")


def nvcc(source: str, output: Path, *flags: str) -> str:
    """Compile ``csrc/cuda/<source>.cu``; what the compiler says."""
    command = ["nvcc", "-O3", "-std=c++20", "--expt-relaxed-constexpr", *flags]
    command += ["-I", str(cutlass()), "-o", str(output), str(SOURCES / f"{source}.cu")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def _key(*facts: str) -> str:
    """A digest of all CUDA sources and of what else the PTX depends on."""
    digest = hashlib.sha256("\0".join(facts).encode())
    for path in sorted(SOURCES.rglob("*.*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def module(source: str, arch: str = "sm_80") -> Module:
    """The PTX of ``csrc/cuda/<source>.cu``; kept below ``build/ptx`` until a source changes."""
    version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True)
    name = f"{source.replace('/', '-')}-{arch}"
    path = PTX / f"{name}-{_key(version.stdout, str(cutlass()))}.ptx"
    if not path.exists():
        PTX.mkdir(parents=True, exist_ok=True)
        for old in PTX.glob(f"{name}-*.ptx"):
            old.unlink()
        with tempfile.TemporaryDirectory(dir=PTX) as folder:
            made = Path(folder, "kernels.ptx")
            nvcc(source, made, "-ptx", f"-arch={arch}")
            made.replace(path)
    return Module(path.read_text())


def modules(*sources: str, arch: str = "sm_80") -> None:
    """Compile several at once, ahead of their use."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: module(source, arch), sources))
