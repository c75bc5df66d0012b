"""One layer, what the compiled CPU ops should give for it, and calls of both passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

SCALING = 0.7


@dataclass
class Layer:
    """One problem: the operands, and what the ops should give for them in a dtype of choice."""

    x: torch.Tensor
    grad_y: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    A: torch.Tensor
    R: torch.Tensor
    Bt: torch.Tensor
    ids: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    dropout_p: float = 0.0

    @property
    def groups(self) -> tuple[torch.Tensor | None, ...]:
        """ids, order, offsets."""
        if self.ids is None:
            return None, None, None
        counts = torch.bincount(self.ids + 1, minlength=self.R.shape[0] + 1)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return self.ids, torch.argsort(self.ids, stable=True), offsets

    def apply_core(self, q: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
        """scaling * (q R^T), with each row's own R, in R's dtype."""
        q = q.to(R.dtype)
        if self.ids is None:
            return SCALING * (q @ R.T)
        padded = torch.cat([R.new_zeros(1, *R.shape[1:]), R])  # the first stands for "no adapter"
        return SCALING * torch.einsum("mj,mij->mi", q, padded[self.ids + 1])

    def expected(self, dtype: torch.dtype | None, kind: str) -> dict[str, torch.Tensor]:
        """y, q and the gradients by autograd; ``dtype=None``: the eager expression as it stands.

        Of ``kind`` "base", the base product is a given: no gradient passes through it to x.
        """

        def cast(t: torch.Tensor) -> torch.Tensor:
            return t if dtype is None else t.to(dtype)

        weight, A, Bt = cast(self.weight), cast(self.A), cast(self.Bt)
        x, bias, R = (cast(t).clone().requires_grad_() for t in (self.x, self.bias, self.R))
        masked = x if self.keep is None else x * self.keep.to(x.dtype) / (1 - self.dropout_p)
        q = masked @ A.T
        base = torch.nn.functional.linear(x.detach() if kind == "base" else x, weight, bias)
        y = base + self.apply_core(q, R).to(x.dtype) @ Bt
        grads = torch.autograd.grad(y, (x, R), cast(self.grad_y), materialize_grads=True)
        db = cast(self.grad_y).sum(0)
        named = {"y": y, "q": q, "dx": grads[0], "dR": grads[1], "db": db}
        return {name: value.detach() for name, value in named.items()}


def make_layer(
    shape: tuple[int, int, int],
    rank: int,
    dtype: torch.dtype,
    *,
    core_dtype: torch.dtype = torch.float32,
    ids: torch.Tensor | None = None,
    adapters: int = 0,
    seed: int = 0,
) -> Layer:
    rows, k, n = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * scale

    core = (adapters, rank, rank) if adapters else (rank, rank)
    return Layer(
        x=normal(rows, k).to(dtype),
        grad_y=normal(rows, n).to(dtype),
        weight=normal(n, k, scale=k**-0.5).to(dtype),
        bias=normal(n).to(dtype),
        A=normal(rank, k, scale=k**-0.5).to(dtype),
        R=normal(*core, scale=rank**-0.5).to(core_dtype),
        Bt=normal(rank, n, scale=rank**-0.5).to(dtype),
        ids=ids,
    )


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Packed for float32 arithmetic, which runs on every machine; 16-bit rows go through it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.float().contiguous())


def panels(weight: torch.Tensor) -> torch.Tensor:
    """In panels of rows for the operators' own product, written out from its description."""
    columns = torch.ops.loraxs_cpu.panel_columns()
    missing = -len(weight) % columns
    rows = torch.nn.functional.pad(weight.float(), (0, 0, 0, missing))
    return rows.view(-1, columns, weight.shape[1]).transpose(1, 2).contiguous()


def dense(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous()


def transposed(weight: torch.Tensor) -> torch.Tensor:
    """Column by column, as W^T is a view of W; for more than 24 rows."""
    return weight.T.contiguous().T


#: The kinds of weight that the operators take for any number of rows, and all of them.
KINDS = ["packed", "panels", "dense"]
PREPARE = {"packed": pack, "panels": panels, "dense": dense, "transposed": transposed}


def call_forward(
    native: Any,
    layer: Layer,
    weight: torch.Tensor | None,
    base: torch.Tensor | None = None,
    **kw: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return native.forward(
        kw.get("x", layer.x),
        weight,
        None if weight is None else layer.bias,
        base,
        layer.A,
        layer.R,
        layer.Bt,
        kw.get("shrink_packed"),
        kw.get("expand_packed"),
        kw.get("seed"),
        kw.get("row_offset", 0),
        *layer.groups,
        SCALING,
        layer.dropout_p,
    )


def call_backward(
    native: Any, layer: Layer, q: torch.Tensor, weight_t: torch.Tensor | None, **kw: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return native.backward(
        kw.get("grad_y", layer.grad_y),
        q,
        weight_t,
        layer.A,
        layer.R,
        layer.Bt,
        kw.get("shrink_packed"),
        kw.get("expand_packed"),
        kw.get("seed"),
        kw.get("row_offset", 0),
        *layer.groups,
        SCALING,
        layer.dropout_p,
        *kw.get("needed", (True, True, True)),
        weight_t is not None,
    )


def error_of(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Maximum and RMS."""
    error = (got.double() - exact).abs()
    return torch.stack([error.max(), error.square().mean().sqrt()])


def packed_error(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The error of oneDNN's bare product, which for long sums is a few times that of F.linear."""
    linear = torch.ops.mkldnn._linear_pointwise
    product = linear(x.float().contiguous(), pack(weight), None, "none", [], "")
    return error_of(product.to(x.dtype), x.double() @ weight.double().T)


def eager_errors(layer: Layer, kind: str) -> dict[str, torch.Tensor]:
    """The errors of the same-dtype eager expression; for a packed product, at least oneDNN's own.

    In float32 they are mostly luck where an output is one long sum (dR of rank 1): the largest of
    four orders of summation counts.
    """
    exact = layer.expected(torch.float64, kind)
    rows, k, n = (torch.arange(size) for size in (*layer.x.shape, layer.bias.shape[0]))
    errors: dict[str, torch.Tensor] = {}
    if kind == "packed":
        errors["y"] = packed_error(layer.x, layer.weight)
        errors["dx"] = packed_error(layer.grad_y, layer.weight.T)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4 if layer.x.dtype == torch.float32 else 1):
        keep = None if layer.keep is None else layer.keep[rows][:, k]
        permuted = Layer(
            x=layer.x[rows][:, k],
            grad_y=layer.grad_y[rows][:, n],
            weight=layer.weight[n][:, k],
            bias=layer.bias[n],
            A=layer.A[:, k],
            R=layer.R,
            Bt=layer.Bt[:, n],
            ids=None if layer.ids is None else layer.ids[rows],
            keep=keep,
            dropout_p=layer.dropout_p,
        )
        eager = permuted.expected(None, kind)
        targets = {
            "y": exact["y"][rows][:, n],
            "q": exact["q"][rows],
            "dx": exact["dx"][rows][:, k],
            "dR": exact["dR"],
            "db": exact["db"][n],
        }
        for name, target in targets.items():
            assert eager[name].dtype == (layer.R if name == "dR" else layer.x).dtype
            error = error_of(eager[name], target)
            errors[name] = torch.maximum(errors.get(name, error), error)
        rows, k, n = (torch.randperm(len(order), generator=generator) for order in (rows, k, n))
    return errors


def assert_accurate(layer: Layer, kind: str, results: tuple[torch.Tensor, ...]) -> None:
    """y, q, dx, dR, db: at most twice the eager error plus 2 eps max|exact|, maximum and RMS."""
    eager = eager_errors(layer, kind)
    exact = layer.expected(torch.float64, kind)
    for name, got in zip(("y", "q", "dx", "dR", "db"), results, strict=True):
        want = exact[name]
        assert got.dtype == (layer.R if name == "dR" else layer.x).dtype, name
        assert got.shape == want.shape, (name, got.shape, want.shape)
        error = error_of(got, want)
        limit = 2 * eager[name] + 2 * torch.finfo(got.dtype).eps * want.abs().max()
        assert (error <= limit).all(), (name, error.tolist(), eager[name].tolist())


def check_layer(native: Any, layer: Layer, *, kind: str = "packed", **kw: Any) -> None:
    """Both passes against float64; ``kind`` of base product: one of ``PREPARE``, or base."""
    if kind == "base":
        base = torch.nn.functional.linear(layer.x, layer.weight, layer.bias)
        before = base.clone()
        y, q = call_forward(native, layer, None, base, **kw)
        assert torch.equal(base, before), "base was modified"
        grads = call_backward(native, layer, q, None, **kw)
    else:
        prepare = PREPARE[kind]
        y, q = call_forward(native, layer, prepare(layer.weight), **kw)
        grads = call_backward(native, layer, q, prepare(layer.weight.T), **kw)
    assert_accurate(layer, kind, (y, q, *grads))
