"""What ``bench_linear`` says about a GPU: lines, means, a plot; measured or modelled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import roofline
from bench.common import Timing, geomean, number
from bench.gpu_timing import GpuPeak
from bench.linear_cases import Case
from bench.roofline import Chip

PEERS = ("eager", "compile", "two-step", "eigentune", "ours triton", "ours cuda")

COLUMNS = (
    "shape (in→out)", "M", "r", "dtype", "pass", "backend", "µs", "TFLOP/s", "GB/s", "% peak",
    "× bare", "flop tax", "× bare / tax", *(f"× {peer}" for peer in PEERS),
)  # fmt: skip

MODELLED_COLUMNS = (
    "shape (in→out)", "M", "r", "dtype", "pass", "modelled µs", "modelled TFLOP/s",
    "modelled GB/s", "modelled limit", "modelled × bare", "flop tax", "modelled × eager",
)  # fmt: skip


@dataclass(frozen=True)
class GpuResult:
    """The timings of one case by contender, and why others are missing."""

    case: Case
    backend: str
    timings: dict[str, Timing]
    skipped: dict[str, str]

    @property
    def ours(self) -> float:
        """Seconds of ``backend=None``."""
        return self.timings["ours"].median

    @property
    def bare(self) -> float:
        """Seconds of the fastest bare layer."""
        return min(t.median for name, t in self.timings.items() if name.startswith("bare"))

    @property
    def over_bare(self) -> float:
        return self.ours / self.bare

    def speedup(self, peer: str) -> float:
        """The peer's time over ours; NaN if it did not run."""
        return self.timings[peer].median / self.ours if peer in self.timings else math.nan

    @property
    def flops(self) -> float:
        """FLOP/s, layer and adapter together."""
        return self.case.flops / self.ours

    @property
    def bandwidth(self) -> float:
        """The least bytes that a layer has to move, per second."""
        return roofline.minimum_bytes(self.case) / self.ours

    def peak_share(self, peak: GpuPeak) -> float:
        """Percent of the peak in the case's dtype; NaN if that was not measured."""
        return 100 * self.flops / peak.flops.get(self.case.dtype, math.nan)

    def as_json(self, peak: GpuPeak) -> dict[str, Any]:
        """Everything, and the derived numbers of the table."""
        share = self.peak_share(peak)
        return {
            **asdict(self.case),
            "backend": self.backend,
            "us": self.ours * 1e6,
            "tflops": self.flops * 1e-12,
            "gb_per_s": self.bandwidth * 1e-9,
            "percent_of_peak": None if math.isnan(share) else share,
            "over_bare": self.over_bare,
            "flop_tax": self.case.flop_tax,
            "speedup_over": {p: self.speedup(p) for p in PEERS if p in self.timings},
            "timings_s": self.timings,
            "skipped": self.skipped,
        }


def _names(case: Case) -> list[str]:
    shape = f"{case.in_features}→{case.out_features}"
    return [shape, str(case.rows), str(case.rank), case.dtype, case.what]


def cells(result: GpuResult, peak: GpuPeak) -> list[str]:
    """One measured line of the table; a dash is what was not measured."""
    case = result.case
    return [
        *_names(case),
        result.backend,
        f"{result.ours * 1e6:.1f}",
        f"{result.flops * 1e-12:.1f}",
        f"{result.bandwidth * 1e-9:.0f}",
        number(result.peak_share(peak), 0),
        f"{result.over_bare:.3f}",
        f"{case.flop_tax:.3f}",
        f"{result.over_bare / case.flop_tax:.3f}",
        *(number(result.speedup(peer), 2) for peer in PEERS),
    ]


def modelled_cells(case: Case, chip: Chip) -> list[str]:
    """One modelled line; see ``roofline.py``."""
    fused = roofline.fused(case)
    seconds = roofline.seconds(fused, chip, case.dtype)
    bound = {kernel.is_memory_bound(chip, case.dtype) for kernel in fused}
    limit = "both" if len(bound) == 2 else ("memory" if True in bound else "FLOPs")
    return [
        *_names(case),
        f"{seconds * 1e6:.1f}",
        f"{case.flops / seconds * 1e-12:.1f}",
        f"{roofline.minimum_bytes(case) / seconds * 1e-9:.0f}",
        limit,
        f"{seconds / roofline.seconds(roofline.bare(case), chip, case.dtype):.3f}",
        f"{case.flop_tax:.3f}",
        f"{roofline.seconds(roofline.eager(case), chip, case.dtype) / seconds:.2f}",
    ]


def modelled_means_text(cases: Sequence[Case], chip: Chip) -> str:
    """Geometric means of the model over all cases."""

    def mean(kernels: Callable[[Case], list[roofline.Kernel]]) -> float:
        return geomean(
            roofline.seconds(roofline.fused(c), chip, c.dtype)
            / roofline.seconds(kernels(c), chip, c.dtype)
            for c in cases
        )

    return (
        f"modelled geometric means of {len(cases)} cases: "
        f"modelled × bare {mean(roofline.bare):.3f}, "
        f"modelled × eager {1 / mean(roofline.eager):.2f}"
    )


def means(results: Sequence[GpuResult]) -> list[tuple[str, int, dict[str, float]]]:
    """Geometric means: ``(which cases, how many, name -> mean)``."""
    groups: list[tuple[str, Callable[[Case], bool]]] = [
        ("all", lambda c: True),
        ("fwd", lambda c: not c.trains),
        ("fwdbwd", lambda c: c.trains),
        ("M ≤ 64", lambda c: c.rows <= 64),
        ("M > 64", lambda c: c.rows > 64),
    ]
    table = []
    for name, belongs in groups:
        chosen = [r for r in results if belongs(r.case)]
        if not chosen:
            continue
        numbers = {
            "× bare": geomean(r.over_bare for r in chosen),
            "× bare / tax": geomean(r.over_bare / r.case.flop_tax for r in chosen),
        }
        for peer in PEERS:
            ran = [r for r in chosen if peer in r.timings]
            numbers[f"× {peer}"] = geomean(r.speedup(peer) for r in ran)
        table.append((name, len(chosen), numbers))
    return table


def means_text(results: Sequence[GpuResult]) -> str:
    """:func:`means` for a terminal."""
    lines = [
        "geometric means (× bare: our time over the fastest bare layer; × peer: its over ours)"
    ]
    for name, count, numbers in means(results):
        text = ", ".join(f"{k} {number(v, 2)}" for k, v in numbers.items())
        lines.append(f"  {name} ({count} cases): {text}")
    return "\n".join(lines)


def plot(results: Sequence[GpuResult], path: Path, title: str) -> None:
    """Our time over bare and the gain over eager, by rows, at the rank that has most cases.

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ranks = [r.case.rank for r in results]
    rank = max(set(ranks), key=ranks.count)
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), sharex=True)
    panels: tuple[tuple[str, Callable[[GpuResult], float]], ...] = (
        ("time / fastest bare", lambda r: r.over_bare),
        ("gain over eager (×)", lambda r: r.speedup("eager")),
    )
    for column, what in enumerate(("fwd", "fwdbwd")):
        chosen = [r for r in results if r.case.what == what and r.case.rank == rank]
        for row, (label, value) in enumerate(panels):
            axis = axes[row][column]
            for kind in dict.fromkeys((r.case.shape, r.case.dtype) for r in chosen):
                points = sorted(
                    (r.case.rows, value(r)) for r in chosen if (r.case.shape, r.case.dtype) == kind
                )
                (K, N), dtype = kind
                xs, ys = zip(*points, strict=True)
                axis.plot(xs, ys, marker="o", label=f"{K}→{N} {dtype}")
            axis.axhline(1.0, color="gray", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set(ylabel=label, xlabel="rows M", title=what)
            axis.grid(alpha=0.3)
            if chosen:
                axis.legend(fontsize=7)
    figure.suptitle(f"LoRA-XS linear layer, r = {rank}\n{title}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
