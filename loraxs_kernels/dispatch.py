"""Which backend runs a call: one table, one function, explained by ``python -m loraxs_kernels
info``.

A backend that is asked for by name runs the call or raises; it is never replaced in silence.
Without a name the first backend of :data:`PREFERENCE` that runs on the machine and supports the
call gets it; where both GPU backends do, ``backends/gpu.py`` decides by the sizes.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from loraxs_kernels.backends import cuda, gpu, onednn, reference, triton

#: All names of the contract.
NAMES = ("reference", "onednn", "triton", "cuda")

#: The backends of each kind of device in order of preference, fastest first.
PREFERENCE = {"cpu": ("onednn", "reference"), "cuda": ("cuda", "triton", "reference")}

_MODULES: dict[str, ModuleType] = {
    "cuda": cuda, "triton": triton, "onednn": onednn, "reference": reference,
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """What the choice of a backend depends on.

    ``column_block``: x is a block of columns of a wider matrix, and the dropout mask is the wider
    one's. ``row_major``: the rows of weight, A and B are contiguous.
    """

    device: str
    dtype: torch.dtype
    core_dtype: torch.dtype
    has_weight: bool
    per_row: bool
    dropout: bool
    column_block: bool = False
    rank: int = 1
    row_major: bool = True


class Choice(NamedTuple):
    """A backend's name, its module, and why it was chosen."""

    name: str
    module: Any
    reason: str


@functools.cache
def default_name() -> str | None:
    """The backend named by ``LORAXS_BACKEND`` (read once), or ``None``."""
    return os.environ.get("LORAXS_BACKEND") or None


def check_name(name: str | None) -> None:
    """Raise ``ValueError`` unless ``name`` is ``None`` or one of :data:`NAMES`."""
    if name is not None and name not in NAMES:
        raise ValueError(f"backend: got {name!r}, expected None or one of {', '.join(NAMES)}")


def unavailable(name: str) -> str | None:
    """Why this machine (or this release) cannot run the backend ``name``; ``None`` if it can."""
    module = _MODULES.get(name)
    if module is None:
        return f"this release of loraxs_kernels has no {name} kernels"
    reason: str | None = module.unavailable()
    return reason


def _why_not(name: str, call: Call) -> str | None:
    """Why the backend ``name`` cannot run ``call`` here, or ``None``."""
    reason = unavailable(name)
    if reason is not None:
        return reason
    module: Any = _MODULES[name]
    if call.column_block and not getattr(module, "MASKS_COLUMN_BLOCKS", False):
        return "its dropout masks start at column 0, and x is a block of columns of a wider matrix"
    reason = module.unsupported(call)
    return reason


def choose(call: Call, name: str | None) -> Choice:
    """The backend for ``call``.

    Args:
        call: device, dtypes and features of the call.
        name: a backend asked for by name, or ``None`` for ``LORAXS_BACKEND`` or the best one.

    Raises:
        ValueError: ``name`` is not a backend's name.
        RuntimeError: the named backend cannot run the call; the message says why.
    """
    name = name or default_name()
    check_name(name)
    if name is not None:
        why_not = _why_not(name, call)
        if why_not:
            raise RuntimeError(
                f"backend: {name!r} was asked for but cannot run this call: {why_not}"
            )
        return Choice(name, _MODULES[name], "asked for by name")
    passed_over: list[str] = []
    if call.device == "cuda" and not _why_not("cuda", call) and not _why_not("triton", call):
        return Choice("cuda or triton", gpu, "both can: arithmetic on the sizes decides")
    for candidate in PREFERENCE.get(call.device, ("reference",)):
        why_not = _why_not(candidate, call)
        if why_not is None:
            reason = "; ".join(passed_over) or "the fastest backend for this kind of call"
            return Choice(candidate, _MODULES[candidate], reason)
        passed_over.append(f"{candidate}: {why_not}")
    raise RuntimeError(f"backend: none can run {call}: {'; '.join(passed_over)}")
