"""``python -m loraxs_kernels svd-report MODEL``: the singular value spectra of a model's layers."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from loraxs_kernels.initialization.pool import run_at_once
from loraxs_kernels.model_files import NOT_ADAPTED, StoredMatrix, matrices
from loraxs_kernels.svd import randomized_svd

RANKS = (4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Spectrum:
    """The leading singular values of one layer.

    Attributes:
        values: fp64, descending.
        energy: the squared Frobenius norm of the weight, the sum of *all* squared values.
        error: the certificate of :func:`~loraxs_kernels.randomized_svd`.
        seconds: what the decomposition took, several layers running beside each other.
    """

    name: str
    shape: tuple[int, int]
    values: Tensor
    energy: float
    error: float
    seconds: float

    def captured(self, rank: int) -> float | None:
        """The share of the energy in the first ``rank`` directions; ``None`` if not known."""
        if rank > min(self.shape):
            return 1.0
        if rank > len(self.values):
            return None
        return float(self.values[:rank].square().sum()) / (self.energy or 1.0)


def spectrum(matrix: StoredMatrix, rank: int, seed: int = 0) -> Spectrum:
    """The first ``rank`` singular values of a stored matrix, or all if it has fewer."""
    weight = matrix.load()
    started = time.perf_counter()
    try:
        found = randomized_svd(weight, min(rank, *weight.shape), seed=seed)
    except ValueError as error:
        raise ValueError(f"{matrix.name}: {error}") from error
    seconds = time.perf_counter() - started
    energy = float(torch.linalg.vector_norm(weight.double())) ** 2
    return Spectrum(matrix.name, matrix.shape, found.S.double(), energy, found.error, seconds)


def rank_for(spectra: Sequence[Spectrum], share: float) -> int | None:
    """The smallest rank at which the layers together keep ``share`` of their energy.

    ``None`` if more singular values would be needed than were computed.
    """
    known = max(len(s.values) for s in spectra)
    total = sum(s.energy for s in spectra)
    captured = torch.zeros(known, dtype=torch.float64)
    for s in spectra:
        sums = s.values.square().cumsum(0)
        captured += torch.nn.functional.pad(sums, (0, known - len(sums)), value=float(sums[-1]))
    enough = captured >= share * total * (1 - 1e-9)
    return int(enough.int().argmax()) + 1 if bool(enough.any()) else None


def table(spectra: Sequence[Spectrum], share: float) -> str:
    """The report as text."""
    ranks = [r for r in RANKS if r <= max(len(s.values) for s in spectra)]
    head = ["layer", "shape", "rank", "s1", "s2", "s3", "s4"]
    head += [f"r={r}" for r in ranks] + [f"r for {share:.0%}", "error", "ms"]
    rows = [head]
    for s in spectra:
        top = [f"{value:.4g}" for value in s.values[:4].tolist()]
        needed = rank_for([s], share)
        rows.append(
            [s.name, f"{s.shape[0]}x{s.shape[1]}", str(len(s.values)), *top, *[""] * (4 - len(top))]
            + ["?" if (c := s.captured(r)) is None else f"{c:.1%}" for r in ranks]
            + [f"> {len(s.values)}" if needed is None else str(needed)]
            + [f"{s.error:.1e}", f"{1e3 * s.seconds:.1f}"]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def summary(spectra: Sequence[Spectrum], share: float) -> str:
    """What the layers say together."""
    known = max(len(s.values) for s in spectra)
    needed = rank_for(spectra, share)
    if needed is None:
        advice = f"more than the {known} directions computed (--rank computes more)"
    else:
        weights = len(spectra)
        advice = f"rank {needed}: R then trains {weights * needed**2:,} numbers in {weights} layers"
    return (
        f"r=...: share of the squared Frobenius norm that the first r singular directions hold.\n"
        f"error: bound on the relative per-vector error, see docs/svd.md.\n"
        f"For {share:.0%} of the energy of all layers together: {advice}.\n"
        "A pretrained weight has a long tail, and adapting it does not need most of it: the paper "
        "works with ranks 4 to 128."
    )


def plot(spectra: Sequence[Spectrum], file: Path) -> None:
    """One curve s_i / s_1 for each layer, coloured by the kind of layer, on logarithmic axes."""
    from matplotlib.figure import Figure

    kinds = sorted({_kind(s.name) for s in spectra})
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    seen: set[str] = set()
    for s in spectra:
        kind = _kind(s.name)
        relative = s.values / s.values[0].clamp_min(torch.finfo(torch.float64).tiny)
        axes.loglog(
            range(1, len(relative) + 1),
            relative.clamp_min(1e-8).numpy(),
            color=f"C{kinds.index(kind) % 10}",
            linewidth=0.8,
            alpha=0.7,
            label=None if kind in seen else kind,
        )
        seen.add(kind)
    axes.set_xlabel("i")
    axes.set_ylabel("singular value i / largest singular value")
    axes.set_title(f"Singular value spectra of {len(spectra)} layers")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)


def _kind(name: str) -> str:
    """A layer's name without its number: ``layers.3.q_proj.weight`` to ``q_proj``."""
    parts = [part for part in name.removesuffix(".weight").split(".") if not part.isdigit()]
    return ".".join(parts[-2:]) if parts[-1] in ("dense", "linear") else parts[-1]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m loraxs_kernels svd-report",
        description="The singular value spectra of a model's layers, and a rank for a share of "
        "their energy.",
    )
    made.add_argument(
        "model",
        help=".safetensors or .gguf file, folder with some, or name of an installed package",
    )
    made.add_argument("--rank", type=int, default=256, help="singular values to compute (256)")
    made.add_argument("--energy", type=float, default=0.5, help="share to find a rank for (0.5)")
    made.add_argument("--include", default="", help="regular expression: only names it occurs in")
    made.add_argument(
        "--exclude", default=NOT_ADAPTED, help="regular expression: no names it occurs in"
    )
    made.add_argument(
        "--plot", type=Path, default=Path("svd-report.png"), help="file of the plot (%(default)s)"
    )
    made.add_argument("--no-plot", action="store_true", help="only the table")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the report; 0, or 2 if an argument is wrong or the model cannot be read."""
    options = parser().parse_args(argv)
    try:
        if options.rank < 1:
            raise ValueError(f"--rank: got {options.rank}, expected at least 1")
        if not 0.0 < options.energy <= 1.0:
            raise ValueError(f"--energy: got {options.energy}, expected 0 < energy <= 1")
        found = matrices(options.model, include=options.include, exclude=options.exclude)
        done: dict[str, Spectrum] = {}
        sizes = [m.shape[0] * m.shape[1] for m in found]
        with tqdm(total=len(found), desc="SVD", leave=False) as bar:
            for matrix, result in run_at_once(
                lambda matrix: spectrum(matrix, options.rank), found, sizes
            ):
                done[matrix.name] = result
                bar.update()
    except ValueError as error:
        print(f"svd-report: {error}", file=sys.stderr)
        return 2
    spectra = [done[matrix.name] for matrix in found]
    print(table(spectra, options.energy))
    print()
    print(summary(spectra, options.energy))
    if options.no_plot:
        return 0
    if importlib.util.find_spec("matplotlib") is None:
        print("svd-report: no plot, since matplotlib is not installed", file=sys.stderr)
        return 0
    plot(spectra, options.plot)
    print(f"Plot: {options.plot}")
    return 0
