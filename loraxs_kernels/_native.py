"""The compiled CPU operators of ``csrc/cpu``, if they were built."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch


def _build_detail() -> str:
    """What setup.py wrote down about the build."""
    record = Path(__file__).parent / "_native.json"
    if not record.is_file():
        return "the package runs from a source tree in which nothing was built"
    return str(json.loads(record.read_text()).get("cpu", {}).get("detail", "no detail recorded"))


@functools.cache
def load() -> str | None:
    """Load the library once. Returns ``None``, or why its operators are not there."""
    if os.environ.get("LORAXS_NATIVE", "1") == "0":
        return "switched off by LORAXS_NATIVE=0"
    named = os.environ.get("LORAXS_CPU_LIBRARY")
    found = [Path(named)] if named else sorted(Path(__file__).parent.glob("_cpu.*so"))
    if not found:
        return f"not built: {_build_detail()}"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load beside torch {torch.__version__}: {error}"
    return None


@functools.cache
def operators() -> Any | None:
    """The namespace ``torch.ops.loraxs_cpu``, or ``None``."""
    return torch.ops.loraxs_cpu if load() is None else None
