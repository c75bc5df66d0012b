"""The command lines of the benchmarks: options that several of them have, and lists."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import common, devices
from bench.linear_cases import CPU_DTYPES, DTYPES, PASSES, parse_shapes


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for ``python -m bench.<program>``; ``--help`` prints the description as it is."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{program}", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def names(allowed: Sequence[str], *, or_none: bool = False) -> Callable[[str], list[str]]:
    """A parser of ``a,b`` that knows which names there are; ``or_none``: ``none`` is no name."""
    expected = ("none or some of " if or_none else "") + ", ".join(allowed)

    def parse(text: str) -> list[str]:
        items = [] if or_none and text == "none" else text.split(",")
        for item in items:
            if item not in allowed:
                raise argparse.ArgumentTypeError(f"got {item!r}, expected {expected}")
        return items

    return parse


def numbers(text: str) -> list[int]:
    """``1,16`` as positive numbers."""
    items = text.split(",")
    if not all(item.isdigit() and int(item) > 0 for item in items):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected positive numbers and commas")
    return [int(item) for item in items]


def numbers_or_none(text: str) -> list[int]:
    """:func:`numbers`; ``none`` is no number."""
    return [] if text == "none" else numbers(text)


def shapes(text: str) -> list[tuple[int, int]]:
    """Model names or INxOUT."""
    try:
        return parse_shapes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_run_options(
    parser: argparse.ArgumentParser, *, minutes: float = 9.0, threads: int | None = None
) -> None:
    """How long, with how many threads, and where results go."""
    add = parser.add_argument
    add(
        "--minutes", type=float, default=minutes,
        help="start no case after so long (default %(default)g)",
    )  # fmt: skip
    chosen = "what PyTorch chooses" if threads is None else threads
    add("--threads", type=int, default=threads, help=f"default: {chosen}")
    add("--out", type=Path, default=common.OUT, help="folder for JSON and plot (default bench/out)")


def add_layer_options(parser: argparse.ArgumentParser, *, case_seconds: float) -> None:
    """Which cases of a layer, on which device."""
    devices.add_options(parser)
    add = parser.add_argument
    add("--shapes", type=shapes, help="model names or INxOUT, e.g. minilm,4096x4096")
    add("--ranks", type=numbers, help="e.g. 4,16,64,256")
    add("--rows", type=numbers, help="e.g. 1,16,128,512,2048,4096")
    add("--dtypes", type=names(tuple(DTYPES)), help="e.g. fp32,bf16; on a GPU also tf32")
    add("--passes", type=names(PASSES), help="e.g. fwd,fwdbwd")
    add(
        "--case-seconds", type=float,
        help=f"timing per case (default {case_seconds:g}, with --quick 0.3)",
    )  # fmt: skip


def set_threads(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Do what ``--threads`` says; a wrong number ends the program."""
    if args.threads is None:
        return
    if args.threads < 1:
        parser.error(f"--threads: got {args.threads}, expected at least 1")
    torch.set_num_threads(args.threads)


def check_layer_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace, device: str, *, asked: bool
) -> None:
    """End the program if ``--quick`` comes with cases, or a CPU shall multiply tf32."""
    if args.quick and asked:
        parser.error("--quick chooses its own cases; leave out --shapes, --ranks and the like")
    if device == "cpu" and "tf32" in (args.dtypes or ()):
        parser.error(f"--dtypes: got tf32 on a CPU, expected {', '.join(CPU_DTYPES)}")
