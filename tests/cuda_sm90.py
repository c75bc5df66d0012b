"""The cluster kernels of csrc/cuda/sm90 on a GPU that is not there.

One layer, both passes, executed from PTX by ``tests/ptx``; and what a launch should cost, by the
formulas of csrc/cuda/sm90/cluster.cuh and device/gradient.cuh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.cuda_layer import ELEMENTS, Pass, up
from tests.cuda_problem import Facts, ceil_div
from tests.cuda_ptx import Map, operands
from tests.cuda_sm80 import Case as Sm80Case
from tests.cuda_sm80 import segments

CLUSTER, BM, BN, BK, BLOCK = 4, 128, 256, 64, 64
SCHEMES = {"cluster_64": 16, "cluster_128": 32, "cluster_256": 64}  # to columns of Q per CTA


def facts(scheme: str, dtype: torch.dtype, direction: str) -> Facts:
    """What ``sm90::describe`` says of a kernel."""
    br = SCHEMES[scheme]
    ring = 4 * 2 * BK * (BM + BN + br)
    barriers = 8 * (2 * 4 + CLUSTER * br // BLOCK) + 12
    return Facts(
        f"loraxs_sm90_{scheme}_{ELEMENTS[dtype]}_{direction}", "cluster", direction, bm=BM, bn=BN,
        bk=BK, br=br, cr=BLOCK, di=64, dj=64, dm=64, db_columns=64, threads=384,
        shared=up(ring + 4 * BN + barriers, 1024), cluster=CLUSTER,
        element=str(dtype).removeprefix("torch."), maps=4,
    )  # fmt: skip


def maps_of(f: Facts, has_w: bool, p: dict[str, Any]) -> list[Map]:
    """``sm90::tensor_maps``: name, columns, rows, pitch, box, swizzle."""
    m, n, k, rank = (p[name] for name in ("m", "n", "k", "rank"))
    x: Map = ("x", k, m, p["x_row"], BK, BM // CLUSTER, 128)
    if f.direction == "forward":
        w: Map = ("w", k, n, p.get("w_row", 0), BK, BN, 128)
        a: Map = ("a", k, rank, p["a_row"], BK, f.br, 128)
        b: Map = ("b", rank, n, p["b_row"], BLOCK, BN, 128)
    else:
        w = ("w", n, k, p.get("w_row", 0), BLOCK, BK, 128)
        a = ("a", rank, k, p["a_row"], f.br, BK, 2 * f.br)
        b = ("b", n, rank, p["b_row"], BLOCK, BLOCK, 128)
    return [x, w if has_w else x, a, b]


@dataclass
class Case(Sm80Case):
    """One layer, both passes; ``scheme`` is one of ``SCHEMES``."""

    def launch(self, direction: str, given: dict[str, Any]) -> Pass:
        f = facts(self.scheme, self.dtype, direction)
        has_w = given["w"] is not None
        own: dict[str, Any] = {"group": 2, "maps": lambda p: maps_of(f, has_w, p)}
        if direction == "backward":
            own["chunks"] = self.chunks
        return self.executed(f, operands(f, **(own | given)))


# ---------------------------------------------------------------------------------------- costs


def flops(p: Pass) -> int:
    """The formulas of cluster.cuh, in whole tiles. Slices of Q are kBR columns in every CTA."""
    f = p.operands.fields
    m, k, rank = up(f["m"], BM), up(f["k"], BK), f["rank"]
    tiles = f["col_tiles"]
    main = 2 * m * k * BN * tiles if "w" in p else 0
    expand = 2 * m * BN * tiles * up(rank, BLOCK)
    gradient = 0
    if "dr" in p:
        gradient = sum(2 * up(s, 64) * up(rank, 16) * up(rank, 8) for s in segments(p))
    return main + _clusters(p) * _side(p) + expand + gradient


def again(p: Pass) -> int:
    """Those of Q and its core, which every cluster of a row block but the first computes again."""
    return (_clusters(p) - 1) * _side(p)


def _clusters(p: Pass) -> int:
    """Of one row block."""
    return ceil_div(p.operands.fields["col_tiles"], CLUSTER)


def _side(p: Pass) -> int:
    """Q and its core, once for all row blocks."""
    f = p.operands.fields
    m, width, products = up(f["m"], BM), CLUSTER * p.facts.br, 2 if f["core_is_fp32"] else 1
    return 2 * m * width * (up(f["k"], BK) + products * up(f["rank"], 32))


def needed(p: Pass) -> int:
    """FLOPs that the formula itself takes, dR included."""
    f = p.operands.fields
    m, n, k, rank = (f[name] for name in ("m", "n", "k", "rank"))
    return 2 * m * (n * k * ("w" in p) + rank * (k + n) + rank**2 * (2 if "dr" in p else 1))


def least(p: Pass) -> int:
    """Bytes, every operand once per tile; X and A once per cluster; what only rows and columns that
    are there need."""
    f, e = p.operands.fields, 2
    m, n, k, rank, core = f["m"], f["n"], f["k"], f["rank"], 4 if f["core_is_fp32"] else 2
    blocks, clusters = f["row_blocks"], ceil_div(f["col_tiles"], CLUSTER)
    total = clusters * (m * k + blocks * rank * k) * e + blocks * clusters * rank**2 * core
    total += (n * k * ("w" in p) + n * rank + n * ("bias" in p)) * blocks * e
    total += m * n * e * (2 if "base" in p else 1) + m * rank * e * ("side" in p)
    if "dr" in p:
        tiles = ceil_div(rank, 64)
        total += 2 * sum(segments(p)) * rank * tiles * e + rank**2 * core
        if f["chunks"] > 1:
            total += 2 * 4 * f["chunks"] * tiles**2 * 64 * 64
    if "db" in p:
        total += m * k * e + k * e
    return total
