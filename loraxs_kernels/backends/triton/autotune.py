"""The measured choice of a plan, on request: ``LORAXS_AUTOTUNE=1``, or ``with lxk.autotune():``.

For each kind of call that is met while it is on, every scheme's plan, some neighbours of the
cheapest one and the way by library products (``two_step.py``) run on the operands of that call, in
turns, and the fastest is remembered: in this process, and in a file for the next one. So after
tuning the backend is not slower than eager PyTorch.

Never during the capture of a CUDA graph, nor where deterministic algorithms are demanded: the
choice may change the order of additions in dR from one machine (or tuning) to the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from loraxs_kernels.backends.cuda.plan import Plan as CudaPlan
from loraxs_kernels.backends.triton.plan import Gpu, Plan, Problem, candidates, shared_bytes

#: What the library's way is called among the winners.
TWO_STEP = "two-step"

#: Rounds in which every candidate is timed once; the median counts.
_ROUNDS = 7

_asked = 0
_winners: dict[str, Plan | CudaPlan | str] | None = None


@contextlib.contextmanager
def autotune() -> Iterator[None]:
    """Measure, within this context, the kernels of every kind of call that is met.

    A no-op without a GPU, during CUDA-graph capture, and under
    ``torch.use_deterministic_algorithms(True)``.
    """
    global _asked
    _asked += 1
    try:
        yield
    finally:
        _asked -= 1


def measuring() -> bool:
    """Whether a call that is met now shall be measured."""
    asked = _asked > 0 or os.environ.get("LORAXS_AUTOTUNE", "0") == "1"
    if not asked or torch.are_deterministic_algorithms_enabled():
        return False
    return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def cache_file() -> Path:
    """Where winners are kept: ``LORAXS_AUTOTUNE_CACHE``, or the user's cache folder."""
    named = os.environ.get("LORAXS_AUTOTUNE_CACHE")
    if named:
        return Path(named)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "loraxs_kernels" / "autotune.json"


def winners() -> dict[str, Any]:
    """All remembered winners; a key names GPU, software, dtypes and problem."""
    global _winners
    if _winners is None:
        _winners = {}
        try:
            stored: dict[str, Any] = json.loads(cache_file().read_text())
        except FileNotFoundError:
            stored = {}
        except (OSError, ValueError) as error:
            warnings.warn(
                f"autotune: {cache_file()} cannot be read ({error}), ignored", stacklevel=2
            )
            stored = {}
        for key, value in stored.items():
            _winners[key] = value if value == TWO_STEP else _plan(value)
    return _winners


def _plan(fields: dict[str, Any]) -> Plan | CudaPlan:
    """A plan of the Triton kernels, or of the CUDA kernels, which have names."""
    return CudaPlan(**fields) if "kernel" in fields else Plan(**fields)


def key_of(name: str, problem: Problem, dtypes: str) -> str:
    """The key of a winner. ``name``: the GPU and the software the measurement is good for."""
    sizes = ", ".join(f"{k}={v}" for k, v in asdict(problem).items())
    return f"{name} | {dtypes} | {sizes}"


def neighbours(problem: Problem, gpu: Gpu) -> list[Plan]:
    """The plans that are measured: one per scheme, and other depths, groups and (by tensor
    descriptors or not) copies of the cheapest.
    """
    plans = candidates(problem, gpu)
    best = plans[0]
    for stages in (2, 3, 4, 5):
        plans.append(replace(best, stages=stages))
    plans += [replace(best, GROUP_M=4), replace(best, GROUP_M=16)]
    if gpu.arch >= 90 and problem.descriptors:
        plans.append(replace(best, tma=not best.tma))
    fitting = [p for p in plans if shared_bytes(problem, p) <= gpu.shared - 2048]
    return list(dict.fromkeys(fitting))


def race(
    runners: Mapping[Any, Callable[[], None]], time: Callable[[Callable[[], None]], float]
) -> Any:
    """The key of the fastest runner. Interleaved, so that a clock that drifts hits all alike."""
    times: dict[Any, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run()  # compiles, and warms up
    for _ in range(_ROUNDS):
        for name, run in runners.items():
            times[name].append(time(run))
    return min(times, key=lambda name: statistics.median(times[name]))


def remember(key: str, winner: Plan | CudaPlan | str) -> None:
    """Keep a winner for this process and, if the cache folder can be written, for the next."""
    known = winners()
    known[key] = winner
    stored = {k: v if isinstance(v, str) else asdict(v) for k, v in known.items()}
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(stored, indent=1, sort_keys=True))
        part.replace(path)
    except OSError as error:
        warnings.warn(f"autotune: {path} cannot be written ({error})", stacklevel=2)


def time_on_gpu(run: Callable[[], None]) -> float:
    """Milliseconds of one run, with a cold L2 cache."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.empty(256 * 2**20, dtype=torch.int8, device="cuda").zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
