"""The CUDA kernels' Problem and launch geometry as Python sees them.

``PROBLEM`` names the fields of csrc/cuda/problem.h in its order. ``geometry`` says what the
comments of problem.h, kernel.h and device/sync.cuh say, independently of csrc/cuda/geometry.cpp,
which the tests compare with it. A kernel that is not in the library yet is described by ``Facts``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Pointers, read and written.
READ = ("x", "w", "base", "a", "core", "b", "bias", "q", "ids", "order", "offsets")
WRITTEN = ("d", "side", "t", "dr", "db", "partial", "flags", "bad_id")
STRIDES = (
    "x_row", "w_row", "base_row", "a_row", "b_row", "d_row", "side_row", "t_row", "q_row",
    "core_adapter", "core_row", "core_col",
)  # fmt: skip
COUNTS = (
    "m", "n", "k", "rank", "adapters", "t_cols", "core_is_fp32", "row_blocks", "col_tiles",
    "slices", "chunks", "parts", "group", "db_items", "gemm_items", "dr_items",
    "flag_count", "slice_parts", "core_items",
)  # fmt: skip
NUMBERS = ("fraction", "before", "after", "dr_scale")

PROBLEM = np.dtype(
    [
        *((name, "<u8") for name in READ + WRITTEN),
        *((name, "<i8") for name in STRIDES),
        *((name, "<i4") for name in COUNTS),
        *((name, "<f4") for name in NUMBERS),
    ],
    align=True,
)

FAMILIES = ("ride-along", "ticket", "few-rows", "cluster")
FIXED_FLAGS = 4


@dataclass(frozen=True)
class Facts:
    """What kernel.h says of a kernel, as far as a launch depends on it."""

    name: str
    family: str
    direction: str  # "forward" or "backward"
    bm: int
    bn: int
    bk: int
    br: int
    cr: int
    di: int
    dj: int
    dm: int
    db_columns: int
    threads: int
    shared: int = 0
    cluster: int = 1
    element: str = "bfloat16"
    maps: int = 0


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def split_scaling(s: float) -> tuple[float, float, float]:
    """``(fraction, before, after)``: see problem.h."""
    if not abs(s) > 1.0 or not math.isfinite(s):
        return s, 1.0, 1.0
    exponent = min(math.frexp(s)[1], 120)
    return s / 2.0**exponent, 2.0**-exponent, 2.0**exponent


def geometry(
    k: Facts, m: int, n: int, depth: int, rank: int, *, has_d: bool = True, need_dr: bool = False,
    need_db: bool = False, adapters: int = 1, per_row: bool = False, chunks: int = 1,
    parts: int = 1, group: int = 8,
) -> dict[str, int]:  # fmt: skip
    """The counts of one launch, by the names of Problem. ``depth``: K."""
    row_blocks = ceil_div(m, k.bm)
    col_tiles = ceil_div(n, k.bn) if has_d else 0
    few = k.family == "few-rows"
    slices = 0 if k.family in ("ride-along", "cluster") else ceil_div(rank, k.br)
    slice_parts = ceil_div(depth, 512) if few else 1
    t_cols = ceil_div(rank, k.cr) * k.cr
    core_items = (m if per_row else 1) * ceil_div(t_cols, 32) if few and has_d else 0
    dr_tiles = adapters * ceil_div(rank, k.di) * ceil_div(rank, k.dj) if need_dr else 0
    per_block = slices * slice_parts + ceil_div(col_tiles, k.cluster) * parts
    gemm = row_blocks * per_block + core_items
    hands_over = k.family not in ("ride-along", "cluster") or need_dr
    flags = FIXED_FLAGS + 2 * row_blocks + dr_tiles + (row_blocks * (col_tiles + slices) * few)
    return {
        "m": m, "n": n, "k": depth, "rank": rank, "adapters": adapters, "t_cols": t_cols,
        "row_blocks": row_blocks, "col_tiles": col_tiles, "slices": slices, "chunks": chunks,
        "parts": parts, "slice_parts": slice_parts, "core_items": core_items, "group": group,
        "db_items": ceil_div(depth, k.db_columns) if need_db else 0,
        "gemm_items": gemm if has_d or need_dr else 0, "dr_items": dr_tiles * chunks,
        "flag_count": flags if hands_over else 0,
    }  # fmt: skip


def partial_sums(k: Facts, counts: dict[str, int]) -> int:
    """Floats of scratch: chunks of dR, parts of D, parts of Q."""
    total = counts["dr_items"] * k.di * k.dj if counts["chunks"] > 1 else 0
    rows = counts["row_blocks"] * k.bm
    for parts, columns in (("parts", counts["col_tiles"] * k.bn),
                           ("slice_parts", counts["slices"] * k.br)):  # fmt: skip
        total += counts[parts] * rows * columns if counts[parts] > 1 else 0
    return total


def fill(fields: dict[str, Any]) -> Any:
    """A Problem with ``fields``; the others are zero.

    Raises:
        KeyError: no field of that name.
    """
    problem = np.zeros((), PROBLEM)
    for name, value in fields.items():
        if name not in PROBLEM.fields:  # type: ignore[operator]
            raise KeyError(f"Problem has no field {name}")
        problem[name] = value
    return problem
