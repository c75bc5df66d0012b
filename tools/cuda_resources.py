"""What the kernels of the built CUDA library need, read off it by cuobjdump."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from loraxs_kernels import _native

#: Machine instructions that tell how a kernel multiplies (mma.sync, wgmma) and copies (cp.async,
#: TMA), and whether its warps share registers unevenly.
MATRIX = ("HMMA", "HGMMA")
TELLING = (*MATRIX, "LDGSTS", "UTMALDG", "USETMAXREG")


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture. ``static``: bytes of shared memory beside the dynamic
    ones; ``spills``: loads and stores of local memory in the machine code; ``instructions``: those
    of :data:`TELLING` that it has."""

    registers: int
    stack: int
    local: int
    static: int
    spills: int
    instructions: frozenset[str]


def tool(name: str) -> str:
    """A program of the CUDA toolkit; Triton's wheel brings some."""
    return shutil.which(name) or str(
        Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / name
    )


def library() -> Path:
    """The CUDA library that this process loads.

    Raises:
        RuntimeError: it is not there.
    """
    why_not = _native.load("cuda")
    if why_not is not None:
        raise RuntimeError(f"the CUDA library: {why_not}")
    return next(Path(p) for p in torch.ops.loaded_libraries if Path(p).name.startswith("_cuda"))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _arch(code: str) -> str:
    """ "9.0a" of "90a"."""
    digits = re.match(r"\d+", code)
    assert digits is not None
    return f"{digits[0][:-1]}.{digits[0][-1]}{code[digits.end() :]}"


@functools.cache
def find() -> dict[tuple[str, str], Resources]:
    """By kernel and architecture ("8.0", "9.0a")."""
    usage = _usage(_run(tool("cuobjdump"), "-res-usage", str(library())))
    code = _code(_run(tool("cuobjdump"), "-sass", str(library())))
    return {key: Resources(*numbers, *code[key]) for key, numbers in sorted(usage.items())}


def _usage(text: str) -> dict[tuple[str, str], tuple[int, int, int, int]]:
    found = {}
    arch = name = ""
    for line in text.splitlines():
        if place := re.search(r"^arch = sm_(\w+)", line):
            arch = _arch(place[1])
        elif function := re.search(r"Function (\w+):", line):
            name = function[1]
        elif "REG:" in line and name.startswith("loraxs_"):
            numbers = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
            found[name, arch] = (
                numbers["REG"], numbers["STACK"], numbers["LOCAL"], numbers["SHARED"]
            )  # fmt: skip
    return found


def _code(text: str) -> dict[tuple[str, str], tuple[int, frozenset[str]]]:
    found = {}
    arch = ""
    for part in re.split(r"^\s*(?=Function : |arch = )", text, flags=re.MULTILINE):
        if place := re.match(r"arch = sm_(\w+)", part):
            arch = _arch(place[1])
        if function := re.match(r"Function : (\w+)", part):
            spills = len(re.findall(r"\b(?:STL|LDL)\b", part))
            telling = frozenset(re.findall(rf"\b({'|'.join(TELLING)})\b", part))
            found[function[1], arch] = (spills, telling)
    return found
