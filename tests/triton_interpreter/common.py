"""Raw passes of the Triton backend beside the definition, judged by the rule of tests/oracle.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loraxs_kernels import sorting
from loraxs_kernels.backends import reference
from loraxs_kernels.backends import triton as backend
from loraxs_kernels.backends.triton import launch
from loraxs_kernels.backends.triton.plan import RESIDENT, RIDE_ALONG, TICKET, Plan
from tests import oracle

SCHEMES = {"ride-along": RIDE_ALONG, "resident": RESIDENT, "ticket": TICKET}


def small_plan(scheme: int, **changes: Any) -> Plan:
    """So small tiles that a small problem has edges, several row blocks, tiles and chunks."""
    sizes: dict[str, Any] = {
        "BM": 16, "BN": 32, "BK": 32, "BR": 32, "CM": 16, "CL": 16, "CR": 32,
        "DI": 16, "DJ": 32, "stages": 2, "warps": 4,
        "GROUP_M": 2, "parts": 1, "DM": 16, "chunks": 2, "DB_M": 16, "DB_N": 32,
    }  # fmt: skip
    sizes.update(changes)
    return Plan(scheme=scheme, **sizes)


@dataclass
class Case:
    """One layer, both passes."""

    rows: int
    k: int
    n: int
    rank: int
    dtype: torch.dtype = torch.float32
    core: torch.dtype | None = None
    adapters: int | None = None
    ids: Tensor | None = None
    sort: bool = False
    dropout_p: float = 0.0
    block: tuple[int, int] | None = None  # x is these columns' block: first column, whole width
    scaling: float = 0.7
    bias: bool = True
    update: bool = False
    need: tuple[bool, bool, bool] = (True, True, True)
    seed: int = field(default=0, init=False)
    views: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        made = oracle.problem(
            self.rows, self.k, self.n, self.rank, adapters=self.adapters, seed=self.seed
        ).to(self.dtype, self.core)
        names = ("x", "weight", "A", "R", "B", "bias", "grad_y")
        found = {name: getattr(made, name) for name in names}
        for name, view in self.views.items():
            found[name] = view(found[name])
        if self.adapters is not None and self.ids is None:
            self.ids = made.ids
        return found

    def run(self, module: Any, dtype: torch.dtype | None, q: Tensor | None) -> dict[str, Tensor]:
        """Both passes of one backend; ``dtype``: converted to it first; ``q``: the one to save."""
        t = self.tensors()
        if dtype is not None:
            t = {name: value.to(dtype) for name, value in t.items()}
        order = offsets = None
        if self.sort and self.ids is not None:
            order, offsets = sorting.sort_ids(self.ids, t["R"].shape[0])
        seed = torch.tensor([0x1234567887654321]) if self.dropout_p else None
        if seed is not None and self.block is not None:
            seed = reference.column_block_seed(seed, *self.block)
        base = t["grad_y"].flip(0) if self.update else None
        weight = None if self.update else t["weight"]
        bias = t["bias"] if self.bias and not self.update else None
        y, own_q = module.forward(
            t["x"], weight, base, t["A"], t["R"], t["B"], bias, seed, self.ids, order, offsets,
            self.scaling, self.dropout_p, 0,
        )  # fmt: skip
        saved = own_q if q is None else q.to(own_q.dtype)
        dx, dR, db = module.backward(
            t["grad_y"], saved, weight, t["A"], t["R"], t["B"], seed, self.ids, order, offsets,
            self.scaling, self.dropout_p, *self.need, 0,
        )  # fmt: skip
        return {"y": y, "q": own_q, "dx": dx, "dR": dR, "db": db}

    def check(self, plan: Plan | None = None) -> dict[str, Tensor]:
        """Run it, compare everything, and count the launches; the results of the last seed.

        Ranks up to 4 give so few numbers of q and dR that PyTorch's own error is luckily zero too
        often: the errors of several seeds are judged together.
        """
        launch.plan_override = None if plan is None else lambda problem, gpu: plan
        columns: dict[str, list[list[Tensor]]] = {}
        for seed in range(5 if self.rank <= 4 else 1):
            self.seed = seed
            before = launch.launches
            got = self.run(backend, None, None)
            assert launch.launches - before == 1 + any(self.need), "one launch in each direction"
            truth = self.run(reference, torch.float64, None)
            peer = self.run(reference, None, None)
            for name, value in got.items():
                assert value.dtype == peer[name].dtype, name
                assert value.shape == truth[name].shape, name
                found = [truth[name], value.double(), peer[name].double()]
                columns.setdefault(name, []).append([c.flatten() for c in found])
        for name, rows in columns.items():
            true, value, other = (torch.cat(column) for column in zip(*rows, strict=True))
            if value.numel():
                oracle.rule(name, true, value, [other], 2 * torch.finfo(got[name].dtype).eps)
        return got
