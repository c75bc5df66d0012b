"""What the reports share: lines of a table, geometric means, markdown, the files at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import loraxs_kernels
from bench.common import Timing, geomean, write_json
from bench.linear_cases import Case
from loraxs_kernels import info

#: Of each group of cases: its name, how many they are, and a mean by heading.
Means = list[tuple[str, int, dict[str, float]]]


class Timed:
    """The timings of one case by contender: what all results have."""

    timings: dict[str, Timing]

    @property
    def ours(self) -> float:
        """Seconds of ``backend=None``."""
        return self.timings["ours"].median

    def fastest(self, names: Iterable[str]) -> float:
        """Seconds of the fastest of these contenders; NaN if none ran."""
        return min((self.timings[n].median for n in names if n in self.timings), default=math.nan)

    @property
    def over_bare(self) -> float:
        """Our time over that of the fastest bare layer."""
        return self.ours / self.fastest(n for n in self.timings if n.startswith("bare"))

    def speedup(self, peer: str) -> float:
        """The peer's time over ours; NaN if it did not run."""
        return self.fastest([peer]) / self.ours


# ------------------------------------------------------------------------------------- lines


def number(value: float, digits: int) -> str:
    """Fixed digits; a dash for what was not measured (NaN)."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def case_cells(case: Case) -> list[str]:
    """What tells a layer's case from others: shape, M, r, dtype, pass."""
    shape = f"{case.in_features}→{case.out_features}"
    return [shape, str(case.rows), str(case.rank), case.dtype, case.what]


def table_line(values: Sequence[str], columns: Sequence[str], first: int = 14) -> str:
    """One line of a table for a terminal, aligned below its ``columns``."""
    aligned = (v.rjust(max(len(c), 6)) for v, c in zip(values[1:], columns[1:], strict=True))
    return " | ".join([values[0].ljust(first), *aligned])


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], align: str = "---:") -> str:
    """A table; the first column is aligned to the left, the others as ``align`` says."""
    lines = [columns, ["---", *[align] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def skipped_text(skipped: Iterable[Mapping[str, str]]) -> str:
    """Contenders that did not run, with the reason and the number of cases.

    Args:
        skipped: of each case, contender -> reason.
    """
    counts: dict[tuple[str, str], int] = {}
    for case in skipped:
        for name, reason in case.items():
            counts[name, reason] = counts.get((name, reason), 0) + 1
    return "\n".join(
        f"not compared with {name} in {count} cases: {reason}"
        for (name, reason), count in counts.items()
    )


# ------------------------------------------------------------------------------------- means


def means(
    results: Sequence[Any],
    groups: Iterable[tuple[str, Callable[[Any], bool]]],
    ratios: Mapping[str, Callable[[Any], float]],
) -> Means:
    """Geometric means of ``ratios`` over the results of each group; NaN where nothing ran.

    Args:
        results: each with a ``case``.
        groups: name, and whether a case belongs; a group without cases is left out.
        ratios: heading, and the number of a result; its NaNs do not count.
    """
    table = []
    for name, belongs in groups:
        chosen = [r for r in results if belongs(r.case)]
        if chosen:
            found = {
                heading: geomean(value for value in map(ratio, chosen) if value == value)
                for heading, ratio in ratios.items()
            }
            table.append((name, len(chosen), found))
    return table


def means_text(table: Means) -> str:
    """:func:`means` for a terminal."""
    lines = [
        "geometric means (× bare: our time over the fastest bare layer; × peer: its over ours)"
    ]
    for name, count, numbers in table:
        text = ", ".join(f"{k} {number(v, 2)}" for k, v in numbers.items())
        lines.append(f"  {name} ({count} cases): {text}")
    return "\n".join(lines)


def means_json(table: Means) -> list[dict[str, Any]]:
    """:func:`means` without what was not measured."""
    return [
        {"cases": name, "count": count, "means": {k: v for k, v in m.items() if v == v}}
        for name, count, m in table
    ]


# ------------------------------------------------------------------------------------- files


def write_results(
    out: Path, name: str, content: Mapping[str, Any], plot: Callable[[Path], None] | None
) -> list[str]:
    """Write ``out/name.json`` and a plot; a sentence for each.

    Args:
        out: folder.
        name: of both files.
        content: of the JSON, beside the versions, the machine and what ``info`` says.
        plot: draws to a path; ``None`` if nothing was measured.
    """
    about = {"loraxs_kernels": loraxs_kernels.__version__, "info": info.report().splitlines()}
    written = [f"wrote {write_json(out, name, {**about, **content})}"]
    if plot is None:
        return [*written, "no plot: nothing was measured"]
    try:
        plot(out / f"{name}.png")
        written.append(f"wrote {out / f'{name}.png'}")
    except ImportError as error:
        written.append(f"no plot: {error}")
    return written


def plot_by_rows(
    results: Sequence[Any],
    panels: Sequence[tuple[str, Callable[[Any], float]]],
    label: Callable[[Case], str],
    path: Path,
    title: str,
) -> None:
    """Numbers of layers over their rows: a panel for each number and pass, a curve per ``label``.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4 * len(panels)))
    axes = figure.subplots(len(panels), 2, sharex=True, squeeze=False)
    for column, what in enumerate(("fwd", "fwdbwd")):
        chosen = [r for r in results if r.case.what == what]
        for row, (name, value) in enumerate(panels):
            axis = axes[row][column]
            for curve in dict.fromkeys(label(r.case) for r in chosen):
                points = [(r.case.rows, value(r)) for r in chosen if label(r.case) == curve]
                xs, ys = zip(*sorted(points), strict=True)
                axis.plot(xs, ys, marker="o", label=curve)
            axis.axhline(1.0, color="gray", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set(ylabel=name, xlabel="rows M", title=what)
            axis.grid(alpha=0.3)
            if chosen:
                axis.legend(fontsize=8)
    save_figure(figure, path, title)


def save_figure(figure: Any, path: Path, title: str) -> None:
    """Write a figure of matplotlib, with a title of one or more lines."""
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
