"""``--device``, and the assumed chip of the model for where there is no GPU."""

from __future__ import annotations

import argparse

import torch

from bench.roofline import Chip

#: An H100: what it sustains, not what its data sheet says.
_BANDWIDTH_TB, _TFLOPS = 3.0, 700.0


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number") from error
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive number")
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--device`` and the constants of the model."""
    add = parser.add_argument
    add(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto: the GPU if there is one; cuda without a GPU: a model instead of timings",
    )  # fmt: skip
    add(
        "--model-bandwidth", type=_positive, default=_BANDWIDTH_TB, metavar="TB/S",
        help="assumed memory bandwidth of the model (default %(default)s, an H100)",
    )  # fmt: skip
    add(
        "--model-tflops", type=_positive, default=_TFLOPS, metavar="TFLOP/S",
        help="assumed sustained 16-bit arithmetic of the model (default %(default)s, an H100)",
    )  # fmt: skip


def resolve(name: str) -> str:
    """``"cpu"`` or ``"cuda"``; ``"cuda"`` also where there is no GPU, which callers then model."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def chip(args: argparse.Namespace) -> Chip:
    """The assumed chip of the options."""
    return Chip(args.model_bandwidth * 1e12, args.model_tflops * 1e12)
