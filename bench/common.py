"""What the benchmarks share: the machine's description, interleaved timing, results as JSON."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

#: Where results go unless a command is told otherwise; git ignores it.
OUT = Path(__file__).parent / "out"

#: A sample shorter than this is mostly clock; several calls are timed together instead.
MIN_SAMPLE_S = 2e-4

#: A call slower than this is measured by that one call: repeating it would take minutes.
SLOW_CALL_S = 3.0

_ISA_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd")


# --------------------------------------------------------------------------------- the machine


def _proc_cpuinfo() -> dict[str, str]:
    """The first processor of Linux's /proc/cpuinfo; empty on other systems."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_flags() -> list[str]:
    """The instruction sets that matter here, as the system names them (empty if it does not)."""
    cpu = _proc_cpuinfo()
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return [flag for flag in _ISA_FLAGS if flag in flags]


def machine() -> dict[str, Any]:
    """CPU model, instruction sets, threads and versions: what a timing means nothing without."""
    cpu = _proc_cpuinfo()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "flags": cpu_flags(),
        "logical_cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def machine_line(description: Mapping[str, Any] | None = None) -> str:
    """:func:`machine` in one line."""
    m = machine() if description is None else description
    flags = f" ({' '.join(m['flags'])})" if m["flags"] else ""
    return (
        f"{m['cpu']}, {m['isa']}{flags}, {m['threads']} of {m['logical_cpus']} threads, "
        f"torch {m['torch']}, Python {m['python']}, {m['system']}"
    )


def load_warning() -> str:
    """A sentence if others seem to use the processors, which no timing survives; else empty."""
    if not hasattr(os, "getloadavg"):
        return ""
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    # This process itself is a load of up to its number of threads.
    if load <= torch.get_num_threads() + 0.5 and load <= cpus + 0.5:
        return ""
    return f"WARNING: load average {load:.1f} on {cpus} CPUs: others compute too, do not trust this"


class Others:
    """How much of the processors everybody else has used since this was made, hypervisor included.

    Unlike the load average it leaves this process out, and looks at no more than the time between.
    Linux only.
    """

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds: of all processors together, of those busy, of this process."""
        path = Path("/proc/stat")
        if not path.exists():
            return None
        fields = path.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
        own = os.times()
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], own.user + own.system

    def share(self) -> float:
        """From 0 (all ours, or idle) to 1; NaN where the system does not tell."""
        now = self._read()
        if now is None or self._start is None or now[0] <= self._start[0]:
            return math.nan
        total, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return min(1.0, max(0.0, (busy - own) / total))

    def sentence(self) -> str:
        """The share in words, with a warning if it is more than a few percent; empty if unknown."""
        share = self.share()
        if math.isnan(share):
            return ""
        text = f"others used {share:.0%} of the processors meanwhile"
        return text if share <= 0.05 else f"WARNING: {text}: do not trust these times"


# ------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the quartiles of the samples, each of ``calls`` calls."""

    median: float
    low: float
    high: float
    samples: int
    calls: int


def summary(samples: Sequence[float], calls: int) -> Timing:
    """Median and quartiles of ``samples``, seconds per call."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1, calls)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples), calls)


def _sample(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    budget_s: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 50,
    min_sample_s: float = MIN_SAMPLE_S,
    pause_s: float = 0.0,
    slow_call_s: float = SLOW_CALL_S,
) -> dict[str, Timing]:
    """Time several callables against each other: one sample of each in turn, round after round.

    Taking turns spreads what the machine does meanwhile (clock changes, other programs) over all of
    them; the order rotates, so that nobody always runs after the same neighbour. Every callable is
    warmed up first. A sample lasts at least ``min_sample_s``.

    Args:
        calls: what to time, by name.
        budget_s: how long all rounds together may take, roughly; the minimum of rounds goes first.
        min_rounds, max_rounds: bounds on the rounds.
        min_sample_s: a call shorter than this is repeated within a sample.
        pause_s: wait before each sample. Threads of another library (OpenBLAS beside PyTorch's)
            spin for tens of milliseconds after their last work, at the expense of who is next.
        slow_call_s: a callable that needs more is measured by its first call alone.

    Returns:
        seconds per call, by name.
    """
    slow: dict[str, Timing] = {}
    repeats: dict[str, int] = {}
    round_s = 0.0
    for name, call in calls.items():
        time.sleep(pause_s)
        first = _sample(call, 1)
        if first > slow_call_s:
            slow[name] = summary([first], 1)
            continue
        second = min(_sample(call, 1) for _ in range(2 if first < 0.2 else 1))
        repeats[name] = max(1, math.ceil(min_sample_s / max(second, 1e-8)))
        round_s += repeats[name] * second
    rounds = min(max_rounds, max(min_rounds, int(budget_s / max(round_s, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in repeats}
    names = list(repeats)
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds if names else 0):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                time.sleep(pause_s)
                samples[name].append(_sample(calls[name], repeats[name]))
    finally:
        if was_enabled:
            gc.enable()
    timed = {name: summary(samples[name], repeats[name]) for name in names}
    return {name: slow.get(name) or timed[name] for name in calls}


def geomean(values: Iterable[float]) -> float:
    """The geometric mean; NaN of nothing.

    Raises:
        ValueError: a value is not positive.
    """
    numbers = list(values)
    if any(not v > 0 for v in numbers):
        raise ValueError(f"values: got {min(numbers)}, expected positive numbers")
    if not numbers:
        return math.nan
    return math.exp(sum(map(math.log, numbers)) / len(numbers))


# ------------------------------------------------------------------------------------- results


def plain(value: object) -> Any:
    """``value`` as JSON can hold it.

    Raises:
        TypeError: it cannot.
    """
    if isinstance(value, Timing):
        return asdict(value)
    if isinstance(value, (Path, torch.dtype)):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def write_json(folder: Path | str, name: str, results: Mapping[str, Any]) -> Path:
    """Write ``results`` with the machine's description and the date to ``folder/name.json``.

    Returns:
        the file's path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    date = time.strftime("%Y-%m-%d %H:%M:%S %z")
    content = {"date": date, "machine": machine(), **results}
    path.write_text(json.dumps(content, indent=1, default=plain) + "\n", encoding="utf-8")
    return path
