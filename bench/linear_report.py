"""What ``bench_linear`` says about its timings: lines, means, the project's bar, a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import tables
from bench.common import Timing, geomean
from bench.linear_cases import Case, work_dtype
from bench.peak import Peak
from bench.tables import Timed, number

_PACKED = ("bare packed", "bare packed for M")
_PEERS = ("eager", "compile", "eigentune")

COLUMNS = (
    "shape (in→out)", "M", "r", "dtype", "pass", "µs", "GFLOP/s", "% peak", "× bare", "flop tax",
    "× bare / tax", "× eager", "× compile", "× eigentune",
)  # fmt: skip

#: The rows of the README's table.
REPRESENTATIVE = (
    Case(384, 384, 128, 16, "fp32", "fwd"),
    Case(384, 1536, 128, 16, "fp32", "fwdbwd"),
    Case(1024, 1024, 1, 16, "fp32", "fwd"),
    Case(1024, 1024, 16, 16, "fp32", "fwd"),
    Case(1024, 1024, 512, 16, "fp32", "fwd"),
    Case(1024, 1024, 512, 16, "fp32", "fwdbwd"),
    Case(1024, 1024, 512, 256, "fp32", "fwdbwd"),
    Case(1024, 1024, 2048, 64, "fp32", "fwdbwd"),
    Case(1024, 4096, 512, 16, "bf16", "fwdbwd"),
    Case(4096, 4096, 1, 16, "fp32", "fwd"),
    Case(4096, 4096, 16, 16, "fp32", "fwd"),
    Case(4096, 4096, 512, 64, "fp32", "fwd"),
    Case(4096, 4096, 512, 16, "fp32", "fwdbwd"),
    Case(4096, 14336, 128, 16, "fp32", "fwdbwd"),
)


@dataclass(frozen=True)
class Result(Timed):
    """The timings of one case by contender, and why others are missing."""

    case: Case
    timings: dict[str, Timing]
    skipped: dict[str, str]

    @property
    def over_packed_tax(self) -> float:
        """Our time over that of the packed bare layer, beyond the flop tax: 1 is perfect."""
        return self.ours / self.fastest(_PACKED) / self.case.flop_tax

    @property
    def gflops(self) -> float:
        """Layer and adapter together."""
        return self.case.flops / self.ours * 1e-9

    def peak_share(self, peak: Peak) -> float:
        """Percent of the peak in the dtype that the processor multiplies in; NaN if unknown."""
        return 100 * self.gflops / peak.gflops.get(work_dtype(self.case.dtype), math.nan)

    def as_json(self, peak: Peak) -> dict[str, Any]:
        """Everything, and the derived numbers of the table."""
        share = self.peak_share(peak)
        return {
            **asdict(self.case),
            "us": self.ours * 1e6,
            "gflops": self.gflops,
            "percent_of_peak": None if math.isnan(share) else share,
            "over_bare": self.over_bare,
            "flop_tax": self.case.flop_tax,
            "over_bare_and_tax": self.over_bare / self.case.flop_tax,
            "speedup_over": {p: self.speedup(p) for p in _PEERS if p in self.timings},
            "timings_s": self.timings,
            "skipped": self.skipped,
        }


# ------------------------------------------------------------------------------------- the table


def cells(result: Result, peak: Peak) -> list[str]:
    """One line of the table; a dash is what was not measured."""
    case = result.case
    return [
        *tables.case_cells(case),
        f"{result.ours * 1e6:.1f}",
        f"{result.gflops:.1f}",
        number(result.peak_share(peak), 0),
        f"{result.over_bare:.2f}",
        f"{case.flop_tax:.3f}",
        f"{result.over_bare / case.flop_tax:.2f}",
        *(number(result.speedup(peer), 2) for peer in _PEERS),
    ]


def line(values: Sequence[str]) -> str:
    """Aligned columns for a terminal."""
    widths = (14, 5, 4, 5, 6, 10, 8, 6, 7, 8, 12, 7, 9, 11)
    first, *rest = values
    aligned = (value.rjust(w) for value, w in zip(rest, widths[1:], strict=True))
    return " | ".join([first.ljust(widths[0]), *aligned])


def markdown(results: Sequence[Result], peak: Peak) -> str:
    """The README's table: the representative cases that were measured."""
    by_case = {result.case: result for result in results}
    rows = [cells(by_case[case], peak) for case in REPRESENTATIVE if case in by_case]
    missing = [str(case) for case in REPRESENTATIVE if case not in by_case]
    table = tables.markdown(COLUMNS, rows)
    return table + ("\n\nNot measured: " + "; ".join(missing) if missing else "")


# ------------------------------------------------------------------------------------- summaries


def means(results: Sequence[Result]) -> tables.Means:
    """Geometric means over kinds of cases."""
    groups: list[tuple[str, Callable[[Case], bool]]] = [
        ("all", lambda c: True),
        ("fp32, M ≥ 16", lambda c: c.dtype == "fp32" and c.rows >= 16),
        ("fp32, M ≥ 16, fwd", lambda c: c.dtype == "fp32" and c.rows >= 16 and not c.trains),
        ("fp32, M ≥ 16, fwdbwd", lambda c: c.dtype == "fp32" and c.rows >= 16 and c.trains),
        ("fp32, M < 16", lambda c: c.dtype == "fp32" and c.rows < 16),
        ("16-bit", lambda c: c.dtype != "fp32"),
    ]
    return tables.means(results, groups, ratios(_PEERS))


def ratios(peers: Sequence[str]) -> dict[str, Callable[[Any], float]]:
    """What :func:`means` averages: our time over bare, with and without the tax; the gains."""
    found: dict[str, Callable[[Any], float]] = {
        "× bare": lambda r: r.over_bare,
        "× bare / tax": lambda r: r.over_bare / r.case.flop_tax,
    }
    return found | {f"× {peer}": lambda r, peer=peer: r.speedup(peer) for peer in peers}


@dataclass(frozen=True)
class Demand:
    """One demand of the project on itself, beside what was measured."""

    what: str
    demand: str
    measured: str
    met: bool | None


def _ratio_demand(
    by_case: dict[Case, Result], limit: float, shape: int, rows: int, what: str
) -> Iterable[Demand]:
    product = "packed bare" if what == "fwd" else "two packed bare products"
    for rank in (16, 64):
        result = by_case.get(Case(shape, shape, rows, rank, "fp32", what))
        name = f"{what} {rows}×{shape}² r={rank} fp32: time / (flop tax × {product})"
        if result is None:
            yield Demand(name, f"≤ {limit:.2f}", "not run", None)
        else:
            ratio = result.over_packed_tax
            yield Demand(name, f"≤ {limit:.2f}", f"{ratio:.3f}", ratio <= limit)


def demands(results: Sequence[Result], isa: str) -> list[Demand]:
    """The project's own bar. ``isa``: the mean over eager is demanded where there is AVX-512."""
    by_case = {result.case: result for result in results}
    table: list[Demand] = []
    for limit, shape, rows in (
        (1.05, 4096, 512), (1.10, 1024, 512), (1.10, 1024, 2048), (1.10, 4096, 1), (1.10, 4096, 16),
    ):  # fmt: skip
        table += _ratio_demand(by_case, limit, shape, rows, "fwd")
    for shape, rows in ((4096, 512), (1024, 512), (1024, 2048), (4096, 1), (4096, 16)):
        table += _ratio_demand(by_case, 1.10, shape, rows, "fwdbwd")
    many = [r.speedup("eager") for r in results if r.case.dtype == "fp32" and r.case.rows >= 16]
    if many:
        mean = geomean(many)
        applies = "AVX512" in isa.upper()
        name = "geometric mean over eager, fp32, M ≥ 16"
        name += "" if applies else " (demanded with AVX-512 only)"
        table.append(Demand(name, "≥ 2.00", f"{mean:.2f}", mean >= 2.0 if applies else None))
    if results:
        worst = min(results, key=lambda r: r.speedup("eager"))
        ratio = worst.speedup("eager")
        table.append(
            Demand(
                f"never slower than eager; worst: {worst.case}",
                "≥ 1.00", f"{ratio:.2f}", ratio >= 1.0,
            )
        )  # fmt: skip
    return table


def demands_text(table: Sequence[Demand]) -> str:
    """:func:`demands` for a terminal."""
    width = max((len(d.what) for d in table), default=0)
    verdict = {True: "met", False: "NOT MET", None: "-"}
    lines = ["the project's bar"]
    for d in table:
        lines.append(
            f"  {d.what.ljust(width)} | {d.demand:>6} | {d.measured:>7} | {verdict[d.met]}"
        )
    return "\n".join(lines)


def worst_text(results: Sequence[Result], count: int = 5) -> str:
    """The cases in which we gain least over eager."""
    ordered = sorted(results, key=lambda r: r.speedup("eager"))
    lines = [f"the {min(count, len(ordered))} cases with the smallest gain over eager"]
    lines += [f"  × {r.speedup('eager'):.2f}  {r.case}" for r in ordered[:count]]
    return "\n".join(lines)


def plot(results: Sequence[Result], path: Path, title: str) -> None:
    """Our time over bare (beyond the flop tax) and the gain over eager, by rows.

    Raises:
        ImportError: there is no matplotlib.
    """
    panels: tuple[tuple[str, Callable[[Result], float]], ...] = (
        ("time / (fastest bare × flop tax)", lambda r: r.over_bare / r.case.flop_tax),
        ("gain over eager (×)", lambda r: r.speedup("eager")),
    )
    chosen = [r for r in results if r.case.dtype == "fp32" and r.case.rank == 16]
    title = f"LoRA-XS linear layer, fp32, r = 16\n{title}"
    tables.plot_by_rows(chosen, panels, lambda c: tables.case_cells(c)[0], path, title)
