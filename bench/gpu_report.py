"""What ``bench_linear`` says about a GPU: lines, means, a plot; measured or modelled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import roofline, tables
from bench.common import Timing, geomean
from bench.gpu_timing import GpuPeak
from bench.linear_cases import Case
from bench.linear_report import ratios
from bench.roofline import Chip
from bench.tables import Timed, case_cells, number

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
class GpuResult(Timed):
    """The timings of one case by contender, and why others are missing."""

    case: Case
    backend: str
    timings: dict[str, Timing]
    skipped: dict[str, str]

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


def cells(result: GpuResult, peak: GpuPeak) -> list[str]:
    """One measured line of the table; a dash is what was not measured."""
    case = result.case
    return [
        *case_cells(case),
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
        *case_cells(case),
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


def means(results: Sequence[GpuResult]) -> tables.Means:
    """Geometric means over kinds of cases."""
    groups: list[tuple[str, Callable[[Case], bool]]] = [
        ("all", lambda c: True),
        ("fwd", lambda c: not c.trains),
        ("fwdbwd", lambda c: c.trains),
        ("M ≤ 64", lambda c: c.rows <= 64),
        ("M > 64", lambda c: c.rows > 64),
    ]
    return tables.means(results, groups, ratios(PEERS))


def plot(results: Sequence[GpuResult], path: Path, title: str) -> None:
    """Our time over bare and the gain over eager, by rows, at the rank that has most cases.

    Raises:
        ImportError: there is no matplotlib.
    """
    panels: tuple[tuple[str, Callable[[GpuResult], float]], ...] = (
        ("time / fastest bare", lambda r: r.over_bare),
        ("gain over eager (×)", lambda r: r.speedup("eager")),
    )
    ranks = [r.case.rank for r in results]
    rank = max(set(ranks), key=ranks.count)
    chosen = [r for r in results if r.case.rank == rank]
    title = f"LoRA-XS linear layer, r = {rank}\n{title}"
    tables.plot_by_rows(chosen, panels, lambda c: f"{case_cells(c)[0]} {c.dtype}", path, title)
