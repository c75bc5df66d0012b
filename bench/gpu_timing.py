"""Timing on a GPU: CUDA graphs, a cold L2 cache, contenders in turn, medians.

* Each contender's pass is captured into a CUDA graph and replayed, so that what is timed is what
  the GPU does and not how fast Python launches it. A contender has a graph for each of several
  inputs, which take turns.
* Before each sample a buffer several times the L2 cache is *read*: weights and inputs come from
  memory, as they do in a model. Writing it, as is common, would leave dirty lines whose write-back
  the next kernel pays for.
* The reading keeps the GPU busy while the host queues the two events and the graph between them, so
  that no gap of the host falls into a sample. What a replay costs in itself is in every sample
  alike; :func:`replay_floor` says how much that is.

The order of all this is in :func:`interleaved`, which knows the GPU by a :class:`Gpu` only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.common import Timing, summary
from bench.linear_cases import DTYPES, Step, reason

#: The buffer that evicts the L2 cache: so many times its size, and at least so many bytes.
_FLUSH_TIMES, _FLUSH_LEAST = 4, 256 << 20

#: Input sets per contender: so many that together they exceed the L2 cache so many times.
_ROTATION_TIMES, _MOST_COPIES = 4, 4

_WARMUPS = 3

Replay = Callable[[], Any]
#: ``(x, dL/dy)`` sets.
Inputs = Sequence[tuple[Tensor, Tensor]]


class Gpu(Protocol):
    """What the benchmarks need of a GPU; everything is queued on one stream.

    Attributes:
        device: where tensors are made.
        l2_bytes: size of the L2 cache.
    """

    device: str
    l2_bytes: int

    def evict(self) -> None:
        """Queue something that leaves the L2 cache without any of the contenders' data."""

    def stamp(self) -> Any:
        """Queue a time stamp."""

    def wait(self) -> None:
        """Wait until all that is queued has run."""

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two stamps that have been reached."""

    def graph(self, step: Step, x: Tensor, grad_y: Tensor) -> Replay:
        """Capture one pass; calling it queues it and returns the tensors that it fills."""

    def line(self) -> str:
        """The GPU in one line."""


def flush_bytes(l2_bytes: int) -> int:
    """Size of the buffer that evicts an L2 cache of ``l2_bytes``."""
    return max(_FLUSH_LEAST, _FLUSH_TIMES * l2_bytes)


def copies(input_bytes: int, l2_bytes: int) -> int:
    """How many input sets take turns: more for small inputs, which a cache could keep."""
    return max(1, min(_MOST_COPIES, math.ceil(_ROTATION_TIMES * l2_bytes / max(input_bytes, 1))))


class CudaGpu:
    """The current CUDA device."""

    device = "cuda"

    def __init__(self) -> None:
        self.l2_bytes = int(torch.cuda.get_device_properties().L2_cache_size)
        numbers = flush_bytes(self.l2_bytes) // 4
        self._buffer = torch.zeros(numbers, dtype=torch.float32, device="cuda")
        self._sink = torch.zeros((), dtype=torch.float32, device="cuda")

    def evict(self) -> None:
        torch.amax(self._buffer, dim=0, out=self._sink)

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) * 1e-3

    def graph(self, step: Step, x: Tensor, grad_y: Tensor) -> Replay:
        return Graph(step, x, grad_y)

    def line(self) -> str:
        p = torch.cuda.get_device_properties()
        return (
            f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} SMs, "
            f"L2 {p.L2_cache_size >> 20} MiB, {p.total_memory >> 30} GiB, CUDA {torch.version.cuda}"
        )


def _sample(replay: Replay, gpu: Gpu) -> tuple[Any, Any]:
    gpu.evict()
    start = gpu.stamp()
    replay()
    return start, gpu.stamp()


def interleaved(
    replays: Mapping[str, Sequence[Replay]],
    gpu: Gpu,
    *,
    budget_s: float = 0.5,
    min_rounds: int = 11,
    max_rounds: int = 200,
) -> dict[str, Timing]:
    """Time several contenders against each other: one cold sample of each in turn.

    The order rotates from round to round, so that nobody always runs after the same neighbour; so
    does the input set. A round before the first is thrown away; its length sets the number of
    rounds.

    Args:
        replays: by contender, the same pass over each input set.
        gpu: the GPU.
        budget_s: how long all rounds together may take, roughly; the minimum of rounds goes first.
        min_rounds, max_rounds: bounds on the rounds.

    Returns:
        seconds per pass, by contender.
    """
    names = list(replays)
    if not names:
        return {}
    begin = gpu.stamp()
    for name in names:
        _sample(replays[name][0], gpu)
    end = gpu.stamp()
    gpu.wait()
    round_s = gpu.seconds(begin, end)
    rounds = min(max_rounds, max(min_rounds, int(budget_s / max(round_s, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        marks = {}
        for name in names[first:] + names[:first]:
            ways = replays[name]
            marks[name] = _sample(ways[turn % len(ways)], gpu)
        gpu.wait()
        for name, (start, stop) in marks.items():
            samples[name].append(gpu.seconds(start, stop))
    return {name: summary(samples[name], 1) for name in names}


class Graph:
    """One pass, captured; calling it replays it and returns the tensors that the replay fills."""

    def __init__(self, step: Step, x: Tensor, grad_y: Tensor) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUPS):
                step(x, grad_y)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._result = step(x, grad_y)

    def __call__(self) -> Any:
        self._graph.replay()
        return self._result


def capture(
    steps: Mapping[str, Step],
    inputs: Inputs,
    gpu: Gpu,
    *,
    required: Sequence[str] = ("ours", "eager"),
) -> tuple[dict[str, list[Replay]], dict[str, str]]:
    """``(graphs, skipped)``: by contender a graph per input set, and why one has none.

    To be called with the grad mode of the case.

    Args:
        steps: one pass of each contender.
        inputs: ``(x, dL/dy)`` sets.
        gpu: the GPU.
        required: contenders whose failure is an error and not a reason to go on without them.

    Raises:
        RuntimeError: a required contender could not be captured.
        torch.OutOfMemoryError: there is no memory for a required contender.
    """
    graphs: dict[str, list[Replay]] = {}
    skipped: dict[str, str] = {}
    for name, step in steps.items():
        try:
            graphs[name] = [gpu.graph(step, x, grad_y) for x, grad_y in inputs]
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            if name in required:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise RuntimeError(f"{name} could not be captured: {error}") from error
            skipped[name] = reason(error)
    return graphs, skipped


def input_sets(x: Tensor, grad_y: Tensor, count: int, *, trains: bool) -> Inputs:
    """``count`` copies of the inputs at addresses of their own; x a leaf if it is to get a grad."""

    def leaf() -> Tensor:
        return x.detach().clone().requires_grad_(trains)

    return [(leaf(), grad_y.clone()) for _ in range(count)]


def set_precision(dtype: str) -> None:
    """How float32 is multiplied from here on: tf32 for ``"tf32"``, exactly otherwise."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")


def replay_floor(gpu: Gpu) -> float:
    """Seconds that a graph of one tiny kernel reads: part of every sample, never subtracted."""
    small = torch.zeros(1, device=gpu.device)
    graph = gpu.graph(lambda x, grad_y: x + 1, small, small)
    return interleaved({"floor": [graph]}, gpu, budget_s=0.05)["floor"].median


#: The peaks: a product of this size cubed, a copy of so many bytes.
PEAK_SIZE, COPY_BYTES = 8192, 1 << 30


@dataclass
class GpuPeak:
    """The best product and the best copy seen in this run.

    Attributes:
        flops: FLOP/s by dtype of cuBLAS at :data:`PEAK_SIZE` cubed.
        bandwidth: bytes per second of a large copy, read and written bytes together.
    """

    flops: dict[str, float] = field(default_factory=dict)
    bandwidth: float = math.nan

    def lines(self) -> list[str]:
        """The result for a reader."""
        found = [
            f"peak {dtype}: {value * 1e-12:.0f} TFLOP/s, "
            f"measured: cuBLAS {PEAK_SIZE}×{PEAK_SIZE}×{PEAK_SIZE}"
            for dtype, value in self.flops.items()
        ]
        if self.bandwidth == self.bandwidth:
            copy = f"{COPY_BYTES >> 20} MiB"
            found.append(f"memory: {self.bandwidth * 1e-9:.0f} GB/s, measured: copy of {copy}")
        return found


class PeakMeter:
    """Measures the peaks anew from time to time: clocks drift, the best reading counts."""

    _EVERY_S = 60.0

    def __init__(self, gpu: Gpu) -> None:
        self.best = GpuPeak()
        self._gpu = gpu
        self._last: dict[str, float] = {}

    def update(self, dtype: str) -> None:
        """Measure ``dtype``, and the copy, if the last time is long ago."""
        now = time.monotonic()
        if now - self._last.get(dtype, -math.inf) < self._EVERY_S:
            return
        set_precision(dtype)
        best = self.best
        best.flops[dtype] = max(self._product(dtype), best.flops.get(dtype, 0.0))
        copied = self._copy()
        best.bandwidth = copied if math.isnan(best.bandwidth) else max(copied, best.bandwidth)
        self._last[dtype] = time.monotonic()

    def _product(self, dtype: str) -> float:
        # Normal numbers, as in the cases: zeros draw less power and run at higher clocks.
        a, b = (
            torch.randn(PEAK_SIZE, PEAK_SIZE, device=self._gpu.device).to(DTYPES[dtype])
            for _ in range(2)
        )
        graph = self._gpu.graph(lambda x, y: x @ y.t(), a, b)
        timing = interleaved({"peak": [graph]}, self._gpu, budget_s=0.3)["peak"]
        return 2.0 * PEAK_SIZE**3 / timing.median

    def _copy(self) -> float:
        source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=self._gpu.device)
        target = torch.empty_like(source)
        graph = self._gpu.graph(lambda x, y: y.copy_(x), source, target)
        timing = interleaved({"copy": [graph]}, self._gpu, budget_s=0.1)["copy"]
        return 2.0 * COPY_BYTES / timing.median
