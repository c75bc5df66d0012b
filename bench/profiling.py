"""``--profile``: a chrome trace and a table of kernels per contender, by ``torch.profiler``.

Passes run as Python launches them, not from a graph: their order and number are what counts here;
the times are those of kernels alone, with whatever the cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

_WARMUPS, _PASSES = 3, 5
_NAME_WIDTH = 88
_MOST_OPERATORS = 12

#: What the GPU does for a pass without a kernel.
_NOT_KERNELS = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Launch:
    """A kernel (or copy) of one pass.

    Attributes:
        name: as the compiler named it.
        count: launches per pass.
        us: microseconds per pass, all its launches together.
    """

    name: str
    count: float
    us: float

    @property
    def is_kernel(self) -> bool:
        return not self.name.startswith(_NOT_KERNELS)


def launches(events: Iterable[Any], passes: int) -> list[Launch]:
    """What ran on the GPU in ``passes`` passes, longest first.

    Args:
        events: of ``torch.profiler.profile.events()``.
        passes: how many passes the events come from.
    """
    found: dict[str, list[float]] = {}
    for event in events:
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    table = [Launch(name, len(us) / passes, sum(us) / passes) for name, us in found.items()]
    return sorted(table, key=lambda launch: -launch.us)


def launches_text(table: Iterable[Launch]) -> list[str]:
    """:func:`launches` for a terminal, with the sums of kernels."""
    table = list(table)
    kernels = [launch for launch in table if launch.is_kernel]
    count, us = sum(k.count for k in kernels), sum(k.us for k in kernels)
    lines = [f"  {count:g} kernel launches per pass, {us:.1f} µs in them"]
    for launch in table:
        name = (
            launch.name if len(launch.name) <= _NAME_WIDTH else launch.name[: _NAME_WIDTH - 1] + "…"
        )
        lines.append(f"  {launch.count:6g} × {launch.us:10.1f} µs  {name}")
    return lines


def _operators_text(averages: Iterable[Any]) -> list[str]:
    """On the CPU there are no launches: the operators that took longest instead."""
    ordered = sorted(averages, key=lambda e: -e.self_cpu_time_total)[:_MOST_OPERATORS]
    lines = ["  operators (a CPU has no kernel launches), calls and time of their own per pass"]
    lines += [
        f"  {e.count / _PASSES:6g} × {e.self_cpu_time_total / _PASSES:10.1f} µs  {e.key}"
        for e in ordered
    ]
    return lines


def profile(calls: Mapping[str, Callable[[], object]], out: Path, stem: str, device: str) -> str:
    """Profile each contender: writes ``out/trace-STEM-CONTENDER.json``, returns the tables.

    To be called with the grad mode of the case.

    Args:
        calls: one pass of each contender.
        out: folder of the chrome traces (``chrome://tracing``, https://ui.perfetto.dev).
        stem: what the files are named after.
        device: ``"cpu"`` or ``"cuda"``.
    """
    out.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    lines: list[str] = []
    for name, call in calls.items():
        for _ in range(_WARMUPS):
            call()
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(_PASSES):
                call()
            if device == "cuda":
                torch.cuda.synchronize()
        path = out / f"trace-{stem}-{name.replace(' ', '-')}.json"
        profiler.export_chrome_trace(str(path))
        lines.append(f"{name}  ({path})")
        if device == "cuda":
            lines += launches_text(launches(profiler.events() or [], _PASSES))
        else:
            lines += _operators_text(profiler.key_averages())
    return "\n".join(lines)
