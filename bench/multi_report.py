"""What ``bench_multi`` says: lines, means, a plot; measured or modelled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import roofline
from bench.common import Timing, geomean, number
from bench.multi_cases import MultiCase, distinct_adapters
from bench.roofline import Chip

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
class MultiResult:
    """The timings of one case by contender, and why others are missing."""

    case: MultiCase
    backend: str
    timings: dict[str, Timing]
    skipped: dict[str, str]

    @property
    def ours(self) -> float:
        """Seconds."""
        return self.timings["ours"].median

    def fastest(self, names: Iterable[str]) -> float:
        """Seconds of the fastest of these contenders; NaN if none ran."""
        return min((self.timings[n].median for n in names if n in self.timings), default=math.nan)

    @property
    def over_bare(self) -> float:
        return self.ours / self.fastest(n for n in self.timings if n.startswith("bare"))

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
    layer = case.layer
    return [
        f"{layer.in_features}→{layer.out_features}", str(layer.rows), str(layer.rank), layer.dtype,
        layer.what, str(case.adapters), str(distinct_adapters(case.ids)), case.popularity,
        case.order,
    ]  # fmt: skip


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


def means(results: Sequence[MultiResult]) -> list[tuple[str, int, dict[str, float]]]:
    """Geometric means: ``(which cases, how many, name -> mean)``."""
    groups: list[tuple[str, Callable[[MultiCase], bool]]] = [
        ("all", lambda c: True),
        ("fwd", lambda c: not c.layer.trains),
        ("fwdbwd", lambda c: c.layer.trains),
        ("sorted", lambda c: c.order == "sorted"),
        ("shuffled", lambda c: c.order == "shuffled"),
    ]
    kinds = dict.fromkeys(r.case.popularity for r in results)
    groups += [(k, lambda c, k=k: c.popularity == k) for k in kinds]  # type: ignore[misc]
    table = []
    for name, belongs in groups:
        chosen = [r for r in results if belongs(r.case)]
        if not chosen:
            continue
        numbers = {"× bare": geomean(r.over_bare for r in chosen)}
        for peer in PEERS:
            ran = (r.speedup(peer) for r in chosen)
            numbers[f"× {peer}"] = geomean(value for value in ran if value == value)
        table.append((name, len(chosen), numbers))
    return table


def means_text(results: Sequence[MultiResult]) -> str:
    """:func:`means` for a terminal."""
    lines = [
        "geometric means (× bare: our time over the fastest bare layer; × peer: its over ours)"
    ]
    for name, count, numbers in means(results):
        text = ", ".join(f"{k} {number(v, 2)}" for k, v in numbers.items())
        lines.append(f"  {name} ({count} cases): {text}")
    return "\n".join(lines)


def plot(results: Sequence[MultiResult], path: Path, title: str) -> None:
    """Time over the bare layer by number of adapters, for each contender: mean over the cases.

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
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
    figure.suptitle(f"LoRA-XS with an adapter per row, geometric means\n{title}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
