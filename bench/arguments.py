"""Lists on the command line, as the benchmarks' options take them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from bench.linear_cases import parse_shapes


def names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of ``a,b`` that knows which names there are."""

    def parse(text: str) -> list[str]:
        items = text.split(",")
        for item in items:
            if item not in allowed:
                raise argparse.ArgumentTypeError(f"got {item!r}, expected {', '.join(allowed)}")
        return items

    return parse


def numbers(text: str) -> list[int]:
    """``1,16`` as positive numbers."""
    items = text.split(",")
    if not all(item.isdigit() and int(item) > 0 for item in items):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected positive numbers and commas")
    return [int(item) for item in items]


def shapes(text: str) -> list[tuple[int, int]]:
    """Model names or INxOUT."""
    try:
        return parse_shapes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
