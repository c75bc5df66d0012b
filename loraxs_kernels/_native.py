"""The compiled operators of ``csrc/cpu`` and ``csrc/cuda``, if they were built."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch


def _build_detail(name: str) -> str:
    """What setup.py wrote down about the build."""
    record = Path(__file__).parent / "_native.json"
    if not record.is_file():
        return "the package runs from a source tree in which nothing was built"
    return str(json.loads(record.read_text()).get(name, {}).get("detail", "no detail recorded"))


@functools.cache
def load(name: str = "cpu") -> str | None:
    """Load the library ``name`` (``"cpu"`` or ``"cuda"``) once.

    Returns ``None``, or why its operators are not there.
    """
    if os.environ.get("LORAXS_NATIVE", "1") == "0":
        return "switched off by LORAXS_NATIVE=0"
    if name == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    named = os.environ.get(f"LORAXS_{name.upper()}_LIBRARY")
    found = [Path(named)] if named else sorted(Path(__file__).parent.glob(f"_{name}.*so"))
    if not found:
        return f"not built: {_build_detail(name)}"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load beside torch {torch.__version__}: {error}"
    return None


@functools.cache
def operators(name: str = "cpu") -> Any | None:
    """The namespace ``torch.ops.loraxs_cpu`` or ``loraxs_cuda``, or ``None``."""
    return getattr(torch.ops, f"loraxs_{name}") if load(name) is None else None
