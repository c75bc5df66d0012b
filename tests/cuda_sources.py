"""The CUDA sources, compiled one by one for the tests that look at a kernel alone."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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


def _run(*command: str) -> str:
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
    return Module(_ptx(source, arch).read_text())


def _ptx(source: str, arch: str) -> Path:
    name = f"{source.replace('/', '-')}-{arch}"
    path = PTX / f"{name}-{_key(_run('nvcc', '--version'), str(cutlass()))}.ptx"
    if not path.exists():
        PTX.mkdir(parents=True, exist_ok=True)
        for old in PTX.glob(f"{name}-*.ptx"):
            old.unlink()
        with tempfile.TemporaryDirectory(dir=PTX) as folder:
            made = Path(folder, "kernels.ptx")
            flags = ["-ptx", f"-arch={arch}", "-O3", "-std=c++20", "--expt-relaxed-constexpr"]
            include = ["-I", str(cutlass()), "-o", str(made), str(SOURCES / f"{source}.cu")]
            _run("nvcc", *flags, *include)
            made.replace(path)
    return path


@dataclass(frozen=True)
class Resources:
    """Of one kernel, as ptxas counts them: registers of a thread, bytes of a thread's stack."""

    registers: int
    stack: int
    spills: int


def resources(source: str, arch: str, ptx_arch: str = "sm_80") -> dict[str, Resources]:
    """What ptxas makes of the kernels of a source for ``arch``."""
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "kernels.cubin"))
        told = _run("ptxas", "-v", f"-arch={arch}", "-o", output, str(_ptx(source, ptx_arch)))
    found = {}
    for part in told.split("Compiling entry function '")[1:]:
        stack, stores, loads = map(
            int, re.findall(r"(\d+) bytes (?:stack|spill stores|spill loads)", part)
        )
        used = re.search(r"Used (\d+) registers", part)
        assert used is not None, told
        found[part.split("'")[0]] = Resources(int(used[1]), stack, stores + loads)
    return found


def modules(*sources: str) -> None:
    """Compile several at once, ahead of their use."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(module, sources))
