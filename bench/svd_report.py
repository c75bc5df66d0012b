"""What ``bench_svd`` says about its measurements: lines, the project's bar, tables, a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import tables
from bench.svd_contenders import ARPACK, DEFAULT, LAPACK, LOWRANK_2R, LOWRANK_16, OFFICIAL
from bench.svd_measure import Measured, Result

#: What the default settings promise.
PROMISED_PVE = 1e-3

# ------------------------------------------------------------------------------------ every result


def heading(result: Result) -> str:
    """One job in words."""
    layers = f", all {result.layers} matrices" if result.is_model else ""
    return f"{result.job}, r={result.rank}{layers}"


def result_text(result: Result) -> str:
    """A job's measurements for a terminal."""
    default = result.measured.get(DEFAULT)
    over = "layers" if result.is_model else "seeds"
    lines = [
        f"{heading(result)}: pve and rms sine as median / worst over the {over}",
        f"  {'':52} {'ms':>9} {'× ours':>7} {'pve':>17} {'rel. s':>8} {'rms sine':>17}",
    ]
    for m in result.measured.values():
        ratio = f"{m.seconds / default.seconds:7.2f}" if default else f"{'-':>7}"
        lines.append(
            f"  {m.name:52} {m.seconds * 1e3:9.1f} {ratio} {_pair(m):>17} "
            f"{m.worst('value_error'):8.1e} {_pair(m, 'sine'):>17}"
        )
    return "\n".join([*lines, f"  {result.others}"]).rstrip()


def _pair(m: Measured, field: str = "pve") -> str:
    return f"{m.median(field):.1e} / {m.worst(field):.1e}"


# ----------------------------------------------------------------------------------------- the bar


@dataclass(frozen=True)
class Line:
    """A demand of the project on itself, and what was measured.

    ``ratio``: the peer's time over ours; ``pve`` pairs are median / worst. ``met`` is None where
    the job or one side was not run.
    """

    against: str
    job: str
    demand: str
    ratio: float | None = None
    setting: str = "-"
    our_pve: str = "-"
    its_pve: str = "-"
    met: bool | None = None


@dataclass(frozen=True)
class Demand:
    """The peer has to take ``times`` as long as our fastest setting that is accurate enough.

    ``at_most``: accurate enough is a worst pve of that; None: ``share`` of the peer's own pve,
    median and worst.
    """

    peer: str
    times: float
    at_most: float | None = None
    share: float = 1.0

    def __str__(self) -> str:
        if self.at_most is not None:
            where = f"at pve ≤ {self.at_most:g}"
        else:
            where = "at its pve" if self.share == 1.0 else f"at ≤ {self.share:g} of its pve"
        return f"≥ {self.times:g}× {where}"

    def accurate(self, m: Measured, peer: Measured) -> bool:
        """Whether this setting of ours counts."""
        if self.at_most is not None:
            return m.worst() <= self.at_most
        bounds = (self.share * peer.median(), self.share * peer.worst())
        return m.median() <= bounds[0] and m.worst() <= bounds[1]

    def judge(self, result: Result) -> Line:
        """Against one job."""
        job, peer = heading(result), result.measured.get(self.peer)
        if peer is None:
            return Line(self.peer, job, str(self))
        good = [m for m in result.ours if self.accurate(m, peer)]
        if not good:
            return Line(self.peer, job, str(self), None, "none", "-", _pair(peer), False)
        ratio = peer.seconds / good[0].seconds
        return Line(
            self.peer, job, str(self), ratio, good[0].name, _pair(good[0]), _pair(peer),
            ratio >= self.times,
        )  # fmt: skip


def _matrix_demands(size: int, rank: int) -> Iterable[Demand]:
    yield Demand(LOWRANK_16, 8.0)
    yield Demand(LOWRANK_16, 5.0, at_most=1e-3)
    yield Demand(LOWRANK_2R, 6.0)
    yield Demand(ARPACK, 2.0 if rank == 16 else 3.0, at_most=1e-5)
    if size == 4096:
        yield Demand(LAPACK, 250.0 if rank == 16 else 75.0, at_most=1e-3)


#: The jobs that the demands on single matrices speak of.
SIZES, RANKS = (4096, 2048), (16, 64)


def bar(results: Sequence[Result]) -> list[Line]:
    """Every demand; of several spectra of one size the one where it is met worst."""
    lines: list[Line] = []
    for size in SIZES:
        for rank in RANKS:
            jobs = [r for r in results if r.size == size and r.rank == rank]
            for demand in _matrix_demands(size, rank):
                judged = [demand.judge(job) for job in jobs]
                missing = Line(demand.peer, f"{size}², r={rank}", str(demand))
                lines.append(min(judged, key=lambda line: line.ratio or 0.0, default=missing))
    models = [r for r in results if r.is_model]
    lines += [Demand(LOWRANK_16, 4.0).judge(r) for r in models]
    official = Demand(OFFICIAL, 15.0, share=0.1)
    lines += [official.judge(r) for r in models if r.job.startswith("SmolLM2") and r.rank == 16]
    return lines + [_default_line(r) for r in models if DEFAULT in r.measured]


def _default_line(result: Result) -> Line:
    ours = result.measured[DEFAULT]
    met = ours.worst() <= PROMISED_PVE
    demand = f"pve ≤ {PROMISED_PVE:g} in every layer"
    return Line("the truth", heading(result), demand, None, ours.name, _pair(ours), "-", met)


_BAR_COLUMNS = ("against", "on", "demand", "measured", "with", "our pve", "its pve", "met?")


def _bar_cells(line: Line) -> tuple[str, ...]:
    verdict = {True: "yes", False: "NO", None: "not run"}[line.met]
    ratio = "-" if line.ratio is None else f"{line.ratio:.1f}×"
    return (
        line.against, line.job, line.demand, ratio, line.setting, line.our_pve, line.its_pve,
        verdict,
    )  # fmt: skip


def bar_text(lines: Sequence[Line]) -> str:
    """:func:`bar` for a terminal."""
    rows = [_BAR_COLUMNS, *map(_bar_cells, lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_BAR_COLUMNS))]
    text = (
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "the project's bar (of several spectra the worst)\n" + "\n".join(
        "  " + line.rstrip() for line in text
    )


# ---------------------------------------------------------------------------------------- markdown


def markdown(results: Sequence[Result], lines: Sequence[Line]) -> str:
    """Tables for the documentation: the bar, and every contender on every job."""
    parts = [tables.markdown(_BAR_COLUMNS, map(_bar_cells, lines), "---")]
    head = ("", "ms", "× ours, default", "pve median / worst", "worst value error", "rms sine")
    for result in results:
        default = result.measured.get(DEFAULT)
        rows = [
            (
                m.name,
                f"{m.seconds * 1e3:,.1f}",
                f"{m.seconds / default.seconds:.2f}" if default else "-",
                _pair(m),
                f"{m.worst('value_error'):.1e}",
                f"{m.median('sine'):.1e}",
            )
            for m in result.measured.values()
        ]
        parts.append(f"{heading(result)}:\n\n{tables.markdown(head, rows, '---')}")
    return "\n\n".join(parts)


# -------------------------------------------------------------------------------------------- plot


def plot(results: Sequence[Result], path: Path, title: str) -> None:
    """Worst pve over time, a panel for each job; below and left is better.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.figure import Figure

    columns = min(3, max(1, len(results)))
    rows = -(-max(1, len(results)) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * rows + 1.2))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat[len(results) :]:
        axis.set_visible(False)
    markers = "osD^vP*X"
    for axis, result in zip(grid.flat, results, strict=False):
        _curve(axis, [m for m in result.ours if "tol" in _kind(m)], "C0o-", "ours, tol")
        _curve(axis, [m for m in result.ours if "max" in _kind(m)], "C1.--", "ours, max_iter")
        at_once = [m for m in result.ours if "once" in _kind(m)]
        if result.is_model:
            _curve(axis, sorted(at_once, key=_shown), "kx", "ours, layers at once")
        peers = [m for m in result.measured.values() if not m.ours]
        for index, m in enumerate(peers):
            axis.plot(
                m.seconds * 1e3, _shown(m), markers[index % len(markers)], color=f"C{index + 2}",
                label=m.name, markersize=7,
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="ms", title=heading(result))
        axis.set_ylabel("pve, worst " + ("layer" if result.is_model else "seed"))
        axis.grid(alpha=0.3)
    named = [axis.get_legend_handles_labels() for axis in grid.flat]
    handles, labels = max(named, key=lambda pair: len(pair[1]))
    figure.suptitle(f"Truncated SVD: error over time\n{title}", fontsize=9)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _shown(m: Measured) -> float:
    return max(m.worst(), 1e-9)  # a logarithmic axis has no zero


def _kind(m: Measured) -> str:
    if "at once" in m.name or "all factors" in m.name:
        return "at once"
    return "max_iter" if "max_iter" in m.name else "tol"


def _curve(axis: Any, points: Sequence[Measured], style: str, label: str) -> None:
    axis.plot([p.seconds * 1e3 for p in points], list(map(_shown, points)), style, label=label)
