"""What ``bench_multi`` says: lines, means, a plot; measured or modelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import roofline, tables
from bench.common import Timing, geomean
from bench.multi_cases import MultiCase, distinct_adapters
from bench.roofline import Chip
from bench.tables import Timed, case_cells, number

#: Peers by the heading of their column; of several contenders the fastest counts.
PEERS = {
    "raw ids": ("ours raw ids",),
    "single": ("single",),
    "loop": ("loop",),
    "bmm": ("bmm",),
    "LoRA": ("lora gather", "lora segments"),
}

_CASE_COLUMNS = (
    "shape (in→out)", "M", "r", "dtype", "pass", "adapters", "present", "popularity", "row order",
)  # fmt: skip
COLUMNS = (
    *_CASE_COLUMNS, "backend", "µs", "GFLOP/s", "× bare", "flop tax",
    *(f"× {peer}" for peer in PEERS),
)  # fmt: skip
MODELLED_COLUMNS = (
    *_CASE_COLUMNS, "modelled µs", "modelled × bare", "flop tax", "modelled × single",
    "modelled × LoRA",
)  # fmt: skip


@dataclass(frozen=True)
class MultiResult(Timed):
    """The timings of one case by contender, and why others are missing."""

    case: MultiCase
    backend: str
    timings: dict[str, Timing]
    skipped: dict[str, str]

    def speedup(self, peer: str) -> float:
        """The time of a peer of :data:`PEERS` over ours; NaN if it did not run."""
        return self.fastest(PEERS[peer]) / self.ours

    def as_json(self) -> dict[str, Any]:
        """Everything, and the derived numbers of the table."""
        speedups = {peer: self.speedup(peer) for peer in PEERS}
        return {
            **asdict(self.case.layer),
            "adapters": self.case.adapters,
            "present": distinct_adapters(self.case.ids),
            "popularity": self.case.popularity,
            "order": self.case.order,
            "backend": self.backend,
            "us": self.ours * 1e6,
            "over_bare": self.over_bare,
            "flop_tax": self.case.layer.flop_tax,
            "speedup_over": {k: v for k, v in speedups.items() if v == v},
            "timings_s": self.timings,
            "skipped": self.skipped,
        }


def _names(case: MultiCase) -> list[str]:
    present = str(distinct_adapters(case.ids))
    return [*case_cells(case.layer), str(case.adapters), present, case.popularity, case.order]


def cells(result: MultiResult) -> list[str]:
    """One measured line of the table; a dash is what was not measured."""
    layer = result.case.layer
    return [
        *_names(result.case),
        result.backend,
        f"{result.ours * 1e6:.1f}",
        f"{layer.flops / result.ours * 1e-9:.1f}",
        f"{result.over_bare:.2f}",
        f"{layer.flop_tax:.3f}",
        *(number(result.speedup(peer), 2) for peer in PEERS),
    ]


def modelled_cells(case: MultiCase, chip: Chip) -> list[str]:
    """One modelled line; see ``roofline.py``."""
    layer, present = case.layer, distinct_adapters(case.ids)

    def time(kernels: Sequence[roofline.Kernel]) -> float:
        return roofline.seconds(kernels, chip, layer.dtype)

    ours = time(roofline.fused(layer, distinct=present, adapters=case.adapters, ids=True))
    lora = time(roofline.ordinary_lora(layer, distinct=present, adapters=case.adapters))
    return [
        *_names(case),
        f"{ours * 1e6:.1f}",
        f"{ours / time(roofline.bare(layer)):.3f}",
        f"{layer.flop_tax:.3f}",
        f"{time(roofline.fused(layer)) / ours:.3f}",
        f"{lora / ours:.2f}",
    ]


def means(results: Sequence[MultiResult]) -> tables.Means:
    """Geometric means over kinds of cases."""
    groups: list[tuple[str, Callable[[MultiCase], bool]]] = [
        ("all", lambda c: True),
        ("fwd", lambda c: not c.layer.trains),
        ("fwdbwd", lambda c: c.layer.trains),
        ("sorted", lambda c: c.order == "sorted"),
        ("shuffled", lambda c: c.order == "shuffled"),
    ]
    kinds = dict.fromkeys(r.case.popularity for r in results)
    groups += [(k, lambda c, k=k: c.popularity == k) for k in kinds]  # type: ignore[misc]
    ratios: dict[str, Callable[[MultiResult], float]] = {"× bare": lambda r: r.over_bare}
    ratios |= {f"× {peer}": lambda r, peer=peer: r.speedup(peer) for peer in PEERS}  # type: ignore[misc]
    return tables.means(results, groups, ratios)


def plot(results: Sequence[MultiResult], path: Path, title: str) -> None:
    """Time over the bare layer by number of adapters, for each contender: mean over the cases.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5))
    axes = figure.subplots(1, 2, sharey=True)
    series: dict[str, Sequence[str]] = {"ours": ("ours",), **PEERS}
    for axis, what in zip(axes, ("fwd", "fwdbwd"), strict=True):
        chosen = [r for r in results if r.case.layer.what == what]
        counts = sorted({r.case.adapters for r in chosen})
        for name, members in series.items():
            points = []
            for count in counts:
                same = (r for r in chosen if r.case.adapters == count)
                ratios = (r.fastest(members) / r.ours * r.over_bare for r in same)
                points.append(geomean(ratio for ratio in ratios if ratio == ratio))
            axis.plot(counts, points, marker="o", label=name)
        axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set(xlabel="adapters", ylabel="time / fastest bare layer", title=what)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    title = f"LoRA-XS with an adapter per row, geometric means\n{title}"
    tables.save_figure(figure, path, title)
