"""The public functions: argument checks, autocast, and flattening of leading dimensions, once.

Everything below (``autograd.py``, ``ops.py``, the backends) sees checked, two-dimensional operands.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from loraxs_kernels import autograd, dispatch, ops, shortcut
from loraxs_kernels.adapters import ID_DTYPES, AdapterBatch, RowIds
from loraxs_kernels.backends import reference
from loraxs_kernels.backends.packing import PLAIN

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OPTIONAL_TYPES = PLAIN | {type(None)}
_NO_IDS = RowIds(None, None, None)  # type: ignore[arg-type]


def lora_xs_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    adapter_ids: Tensor | AdapterBatch | None = None,
    backend: str | None = None,
) -> Tensor:
    """A frozen linear layer with a LoRA-XS adapter: ``y = x W^T + b + s * ((x A^T) R^T) B^T``.

    Equivalent to::

        F.linear(x, weight, bias) + scaling * (F.dropout(x, dropout_p) @ A.T @ R.T @ B.T)

    LoRA-XS: Balazy et al., arXiv 2405.17604. Gradients flow to ``x``, ``R`` and ``bias``; ``x`` is
    not kept for the backward pass, only ``x A^T`` is.

    Args:
        x: ``[..., in]``, contiguous or not; float32, bfloat16, float16 or float64.
        weight: ``[out, in]``, in ``x``'s dtype (under autocast: any).
        A: ``[r, in]``, likewise.
        R: ``[r, r]`` in ``x``'s dtype or float32; with ``adapter_ids`` ``[n, r, r]``.
        B: ``[out, r]``, likewise in ``x``'s dtype.
        bias: ``[out]`` or ``None``, likewise.
        scaling: s, applied to the adapter's output.
        dropout_p: probability of dropping an element of the adapter's input, in [0, 1). The mask
            comes from torch's default generator and is never stored.
        adapter_ids: one adapter per row: int32/int64 of shape ``x.shape[:-1]``, or ``[x.shape[0]]``
            (one per sequence), or an :class:`AdapterBatch`. -1: base only.
        backend: ``None`` to choose, or one of ``dispatch.NAMES``.

    Returns:
        ``[..., out]`` in ``x``'s dtype (under autocast: the autocast dtype).

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it. Nothing was computed.
        RuntimeError: a backend asked for by name cannot run the call.
    """
    return linear(
        x, weight, None, A, R, B, bias, scaling, dropout_p, adapter_ids, backend, ops.PREPACK_AUTO
    )


def lora_xs_update(
    base_out: Tensor,
    x: Tensor,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    adapter_ids: Tensor | AdapterBatch | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add a LoRA-XS adapter to the output of a base layer computed elsewhere (4-bit, FP8, ...).

    Equivalent to::

        base_out + scaling * (F.dropout(x, dropout_p) @ A.T @ R.T @ B.T)

    Args:
        base_out: ``[..., out]``; never modified, receives the identity gradient.
        x: ``[..., in]``, the base layer's input; the rest as in :func:`lora_xs_linear`.
        A: ``[r, in]``.
        R: ``[r, r]`` or ``[n, r, r]``.
        B: ``[out, r]``.
        scaling: s.
        dropout_p: probability of dropping an element of the adapter's input.
        adapter_ids: one adapter per row or sequence.
        backend: ``None`` to choose, or a backend's name.

    Returns:
        ``[..., out]`` in ``x``'s dtype, a new tensor.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`lora_xs_linear`.
    """
    if not isinstance(base_out, Tensor):
        raise TypeError(f"base_out: got {type(base_out).__name__}, expected a tensor")
    return linear(
        x, None, base_out, A, R, B, None, scaling, dropout_p, adapter_ids, backend, ops.PREPACK_AUTO
    )


def linear(
    x: Tensor,
    weight: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    adapter_ids: Tensor | AdapterBatch | None,
    backend: str | None,
    prepack: int,
    column_block: tuple[int, int] | None = None,
) -> Tensor:
    """Both public functions (``weight`` or ``base`` is given), with the choice of packing.

    ``column_block``: the first column and the width of the matrix of which ``x`` is a block of
    columns; the dropout mask is then that block of the whole matrix's mask.
    """
    plain = adapter_ids is None and base is None and type(scaling) is float and dropout_p == 0.0
    if plain and weight is not None:
        y = shortcut.run(x, weight, A, R, B, bias, scaling, prepack, backend)
        if y is not None:
            return y
    autocast = _autocast_dtype(x)
    _check_once(x, weight, base, A, R, B, bias, autocast is not None)
    if backend is not None:
        dispatch.check_name(backend)
    if not (type(scaling) is float and type(dropout_p) is float and 0.0 <= dropout_p < 1.0):
        scaling, dropout_p = _check_numbers(scaling, dropout_p)
    rows = _NO_IDS
    if adapter_ids is not None or R.dim() == 3:
        rows = _row_ids(adapter_ids, x, R)
    if autocast is None:
        y = _run(
            x, weight, base, A, R, B, bias, scaling, dropout_p, rows, backend, prepack, column_block
        )
        if plain and weight is not None:
            shortcut.remember(x, weight, A, R, B, prepack, backend)
        return y
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(autocast)
        base = None if base is None else base.to(autocast)
        return _run(
            x, weight, base, A, R, B, bias, scaling, dropout_p, rows, backend, prepack, column_block
        )


def _run(
    x: Tensor,
    weight: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    rows: RowIds,
    backend: str | None,
    prepack: int,
    column_block: tuple[int, int] | None,
) -> Tensor:
    shape = x.shape[:-1]
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if base is not None and base.dim() != 2:
        base = base.reshape(-1, base.shape[-1])
    seed = None
    if dropout_p > 0.0:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
        if column_block is not None:
            seed = reference.column_block_seed(seed, *column_block)
    if _trains_base(weight, A, B):
        _check_trains_base(weight, A, B, backend)
        y, _ = reference.forward(
            flat, weight, base, A, R, B, bias, seed, *rows, scaling, dropout_p, prepack
        )
    else:
        y, _ = autograd.apply(
            flat, weight, base, A, R, B, bias, seed, *rows, scaling, dropout_p, prepack,
            backend or "",
        )  # fmt: skip
    return y if len(shape) == 1 else y.view(*shape, y.shape[-1])


# ---------------------------------------------------------------------------------- checks


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast asks for, or ``None``; float64 is left alone, as autocast itself does."""
    if not isinstance(x, Tensor) or x.dtype == torch.float64 or x.is_meta:
        return None
    if not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


#: What has passed the checks: they cost more than the product of a small layer.
_checked: set[tuple[object, ...]] = set()
_MANY_CHECKED = 4096


def _check_once(
    x: Tensor,
    weight: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    bias: Tensor | None,
    autocast: bool,
) -> None:
    """:func:`_check_tensors`, unless operands of these dtypes, devices and shapes passed it."""
    known = PLAIN.issuperset(map(type, (x, A, R, B)))
    known = known and _OPTIONAL_TYPES.issuperset(map(type, (weight, base, bias)))
    if torch.compiler.is_compiling() or not known:
        return _check_tensors(x, weight, base, A, R, B, bias, autocast)
    # The number of rows is free, but base must have x's.
    key: tuple[object, ...] = (
        x.dim() and x.shape[-1], x.dtype, x.device, A.shape, A.dtype, A.device,
        R.shape, R.dtype, R.device, B.shape, B.dtype, B.device, autocast,
        weight is not None and (weight.shape, weight.dtype, weight.device),
        bias is not None and (bias.shape, bias.dtype, bias.device),
        base is not None and (base.shape, base.dtype, base.device, x.shape),
    )  # fmt: skip
    if key not in _checked:
        _check_tensors(x, weight, base, A, R, B, bias, autocast)
        if len(_checked) >= _MANY_CHECKED:
            _checked.clear()
        _checked.add(key)


def _check_tensors(
    x: Tensor,
    weight: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    bias: Tensor | None,
    autocast: bool,
) -> None:
    required = {"x": x, "A": A, "R": R, "B": B}
    if base is None:
        required["weight"] = weight  # type: ignore[assignment]
    else:
        required["base_out"] = base
    if bias is not None:
        required["bias"] = bias
    for name, tensor in required.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected one of {_DTYPES}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected {x.device} as x has")
        if tensor.dtype != x.dtype and not autocast:
            if name != "R":
                raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {x.dtype} as x has")
            if tensor.dtype != torch.float32:
                raise TypeError(f"R: got dtype {R.dtype}, expected {x.dtype} or torch.float32")
    _check_shapes(x, weight, base, A, R, B, bias)


def _expect(name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(e, str) or s == e for s, e in zip(shape, expected, strict=True)
    )
    if not fits:
        want = ", ".join(str(e) for e in expected)
        raise ValueError(f"{name}: got shape {list(shape)}, expected [{want}]")


def _check_shapes(
    x: Tensor,
    weight: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    bias: Tensor | None,
) -> None:
    if x.dim() == 0:
        raise ValueError("x: got a scalar, expected shape [..., in]")
    _expect("A", A, ("r", "in"))
    rank, in_features = A.shape
    if x.shape[-1] != in_features:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [..., {in_features}] as A has")
    if not 1 <= rank <= 512:
        raise ValueError(f"A: got shape {list(A.shape)}, expected a rank from 1 to 512")
    _expect("B", B, ("out", rank))
    out_features = B.shape[0]
    for name, size in (("A", in_features), ("B", out_features)):
        if size == 0:
            shape = list((A if name == "A" else B).shape)
            raise ValueError(f"{name}: got shape {shape}, expected at least one feature")
    if weight is not None:
        _expect("weight", weight, (out_features, in_features))
    if base is not None and base.shape != (*x.shape[:-1], out_features):
        expected = [*x.shape[:-1], out_features]
        raise ValueError(f"base_out: got shape {list(base.shape)}, expected {expected}")
    if bias is not None:
        _expect("bias", bias, (out_features,))
    if R.dim() == 3:
        _expect("R", R, ("n", rank, rank))
    else:
        _expect("R", R, (rank, rank))


def _check_numbers(scaling: float, dropout_p: float) -> tuple[float, float]:
    for name, value in (("scaling", scaling), ("dropout_p", dropout_p)):
        if isinstance(value, bool) or not isinstance(value, (float, int)):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a float")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, expected 0 <= dropout_p < 1")
    return float(scaling), float(dropout_p)


def _row_ids(adapter_ids: Tensor | AdapterBatch | None, x: Tensor, R: Tensor) -> RowIds:
    if adapter_ids is None:
        raise ValueError(
            f"adapter_ids: got None, expected one id per row, because R has shape {list(R.shape)}"
        )
    if R.dim() != 3:
        raise ValueError(
            f"adapter_ids: given, but R has shape {list(R.shape)}, expected [n, r, r] with it"
        )
    leading = x.shape[:-1]
    batch = adapter_ids if isinstance(adapter_ids, AdapterBatch) else None
    ids = adapter_ids if batch is None else batch.ids
    if not isinstance(ids, Tensor):
        raise TypeError(f"adapter_ids: got {type(ids).__name__}, expected a tensor or AdapterBatch")
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"adapter_ids: got dtype {ids.dtype}, expected torch.int32 or torch.int64")
    if ids.device != x.device:
        raise ValueError(f"adapter_ids: got device {ids.device}, expected {x.device} as x has")
    if batch is not None and batch.num_adapters != R.shape[0]:
        raise ValueError(
            f"adapter_ids: got an AdapterBatch for {batch.num_adapters} adapters, "
            f"expected {R.shape[0]} as R of shape {list(R.shape)} has"
        )
    repeats = 1
    if ids.shape != leading:
        if x.dim() < 2 or ids.shape != x.shape[:1]:
            raise ValueError(
                f"adapter_ids: got shape {list(ids.shape)}, expected {list(leading)} (one per row)"
                f" or {list(x.shape[:1])} (one per sequence)"
            )
        repeats = leading[1:].numel()
    if batch is not None:
        return batch.rows(repeats)
    rows = ids.reshape(-1).to(torch.int64)
    return RowIds(rows if repeats == 1 else rows.repeat_interleave(repeats), None, None)


def _trains_base(weight: Tensor | None, A: Tensor, B: Tensor) -> bool:
    """Whether a derivative with respect to W, A or B may be asked for."""
    if A.requires_grad or B.requires_grad or (weight is not None and weight.requires_grad):
        return torch.is_grad_enabled()
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if not transformed or torch.compiler.is_compiling():
        return False  # a transform that is compiled uses the definition anyway, see autograd.apply
    # An outer level of torch.func does not show in requires_grad, nor does a tangent.
    frozen = (A, B) if weight is None else (weight, A, B)
    return any(
        torch._C._functorch.is_functorch_wrapped_tensor(t)
        or forward_ad.unpack_dual(t).tangent is not None
        for t in frozen
    )


def _check_trains_base(weight: Tensor | None, A: Tensor, B: Tensor, backend: str | None) -> None:
    name = backend or dispatch.default_name()
    if name in (None, "reference"):
        return
    named = (("weight", weight), ("A", A), ("B", B))
    training = [n for n, t in named if t is not None and t.requires_grad]
    raise RuntimeError(
        f"backend: {name!r} treats {', '.join(training) or 'weight, A and B'} as frozen, but a "
        "derivative with respect to it is asked for; use backend=None or 'reference'"
    )


__all__ = ["AdapterBatch", "lora_xs_linear", "lora_xs_update"]
