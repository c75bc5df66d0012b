"""The side cache of packed copies of frozen matrices.

oneDNN multiplies by a matrix fastest when it has been reordered once. Those copies live only here:
oneDNN's opaque tensors cannot be pickled, deep-copied, shared or moved, so no module ever holds one
(an autograd graph may, until its backward). An entry belongs to a dense tensor *object*; it dies
with it, and is rebuilt when the object's storage, version counter, shape, strides or dtype have
changed. What this cannot see are writes that bypass the version counter (through ``.data`` or a
NumPy view): call :func:`invalidate_packed` after such a write.

Never packed: a tensor that requires grad (it changes every step), one made under inference mode (it
has no version counter), a subclass such as DTensor, and parameters that FSDP gathers and frees
again.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraxs_kernels import _native

#: Tensors that are no subclass with a behaviour of its own.
PLAIN = frozenset((Tensor, nn.Parameter, nn.Buffer))

_Key = tuple[str, torch.dtype]
_Stamp = tuple[int, int, torch.dtype, torch.Size, tuple[int, ...]]


def enabled() -> bool:
    """Whether ``LORAXS_PREPACK`` allows packed copies (default: yes; ``0`` switches them off)."""
    return os.environ.get("LORAXS_PREPACK", "1") != "0"


def _stamp(t: Tensor) -> _Stamp:
    return (t.data_ptr(), t._version, t.dtype, t.shape, t.stride())


class _Bundle(NamedTuple):
    """What :func:`bundle` remembers, and the state of the tensors it was made from."""

    generation: int
    sources: tuple[tuple[weakref.ref[Tensor], _Stamp], ...]
    value: Any


class _Entry:
    """The packed copies of one dense tensor, with the state of the tensor they were made from."""

    __slots__ = ("bundles", "copies", "ref", "stamp")

    def __init__(self, tensor: Tensor, forget: Callable[[weakref.ref[Tensor]], None]) -> None:
        self.ref = weakref.ref(tensor, forget)
        self.stamp = _stamp(tensor)
        self.copies: dict[_Key, Tensor] = {}
        self.bundles: dict[tuple[Any, ...], _Bundle] = {}


_entries: dict[int, _Entry] = {}
_lock = threading.RLock()
#: Grows when copies are dropped on request, so that no bundle outlives them.
_generation = 0


def _entry(tensor: Tensor) -> _Entry | None:
    """The valid entry of ``tensor``; a stale one is dropped."""
    key = id(tensor)
    entry = _entries.get(key)
    if entry is None:
        return None
    if entry.ref() is tensor and entry.stamp == _stamp(tensor):
        return entry
    with _lock:
        _entries.pop(key, None)
    return None


def _new_entry(tensor: Tensor) -> _Entry:
    key = id(tensor)
    # Bound here: when the interpreter shuts down, globals go before the last tensors do.
    entries, lock = _entries, _lock

    def forget(ref: weakref.ref[Tensor]) -> None:
        with lock:
            entry = entries.get(key)
            if entry is not None and entry.ref is ref:
                del entries[key]

    entry = _Entry(tensor, forget)
    with _lock:
        _entries[key] = entry
    return entry


def packable(tensor: Tensor) -> bool:
    """Whether ``tensor`` may have packed copies at all (see the module's docstring)."""
    return (
        type(tensor) in PLAIN
        and not tensor.requires_grad
        and not tensor.is_inference()
        and tensor.layout == torch.strided
        and tensor.numel() > 0
        and tensor.untyped_storage().nbytes() > 0
    )


def lookup(tensor: Tensor, kind: str, dtype: torch.dtype, prepack: int) -> Tensor | None:
    """The copy of ``tensor`` of one kind, made if the policy allows it.

    Args:
        tensor: a frozen dense matrix ``[rows, columns]``.
        kind: one of :data:`MAKERS`.
        dtype: dtype of the copy.
        prepack: ``ops.PREPACK_NEVER``, ``_NOW``, or ``_AUTO``: a parameter is packed at once, any
            other tensor when it is met a second time, so that a temporary is never packed.

    Returns:
        the copy, or ``None`` when there shall be none.
    """
    entry = _entry(tensor)
    if entry is not None:
        copy = entry.copies.get((kind, dtype))
        if copy is not None:
            return copy
    if prepack == 0 or not enabled() or not packable(tensor):
        return None
    if entry is None:
        entry = _new_entry(tensor)
        if prepack == 1 and not isinstance(tensor, nn.Parameter):
            return None
    generation = _generation
    with _lock, torch.no_grad():
        copy = MAKERS[kind](tensor.detach(), dtype)
        # Another thread may have changed the tensor meanwhile: then the copy is for this call only.
        if entry.stamp == _stamp(tensor) and generation == _generation:
            entry.copies[kind, dtype] = copy
    return copy


def bundle(key: tuple[Any, ...], sources: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
    """What ``make()`` says about frozen tensors, remembered while none of them changes.

    One look-up instead of one for each copy: a call with few rows spends more time on look-ups than
    on arithmetic. A bundle lives with the first tensor.

    Args:
        key: what the value depends on besides the tensors. Each key of a first tensor has room for
            one bundle.
        sources: the tensors; the first must be packable for anything to be remembered.
        make: makes ``(value, complete)``; an incomplete value is not remembered. The value must not
            hold one of the tensors, or a view of one: it would never die.
    """
    value = recall(key, sources)
    if value is not None:
        return value
    if not all(packable(tensor) for tensor in sources):
        return make()[0]
    # Taken before: what another thread changes meanwhile must not pass for what was seen.
    generation, states = _generation, tuple([(weakref.ref(t), _stamp(t)) for t in sources])
    value, complete = make()
    if complete and enabled():
        entry = _entry(sources[0]) or _new_entry(sources[0])
        if entry.stamp == states[0][1]:
            entry.bundles[key] = _Bundle(generation, states, value)
    return value


def recall(key: tuple[Any, ...], sources: tuple[Tensor, ...]) -> Any | None:
    """What :func:`bundle` remembers under ``key``, or ``None`` if one of ``sources`` changed."""
    entry = _entries.get(id(sources[0]))
    found = None if entry is None else entry.bundles.get(key)
    if found is None or found.generation != _generation:
        return None
    for tensor, (ref, stamp) in zip(sources, found.sources, strict=True):
        if ref() is not tensor or stamp != _stamp(tensor):
            return None
    return found.value


def has(tensor: Tensor, kind: str, dtype: torch.dtype) -> bool:
    """Whether a valid copy of that kind is held."""
    entry = _entry(tensor)
    return entry is not None and (kind, dtype) in entry.copies


def _packed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.to(dtype).contiguous(), None)
    return packed


def _panels(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """``[rows, k]`` as ``[ceil(rows / c), k, c]``: panels of c rows, transposed, padded by zeros.

    ``csrc/cpu/product_impl.h`` reads them; c is a matter of its registers.
    """
    rows, k = matrix.shape
    native = _native.operators()
    assert native is not None, "only the compiled operators read panels"
    columns: int = native.panel_columns()
    panels = matrix.new_zeros(-(-rows // columns), k, columns, dtype=dtype)
    whole = rows // columns
    panels[:whole] = matrix[: whole * columns].view(whole, columns, k).transpose(1, 2)
    if whole < panels.shape[0]:
        panels[whole, :, : rows - whole * columns] = matrix[whole * columns :].t()
    return panels


#: How each kind of copy is made. "packed" and "panels" multiply as a linear weight: ``x -> x M^T``,
#: by oneDNN and by the compiled operators.
MAKERS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "panels": _panels,
    "panels_t": lambda matrix, dtype: _panels(matrix.t(), dtype),
    "packed": _packed,
    "packed_t": lambda matrix, dtype: _packed(matrix.t(), dtype),
    "dense": lambda matrix, dtype: matrix.to(dtype).contiguous(),
    "dense_t": lambda matrix, dtype: matrix.t().to(dtype).contiguous(),
}


def dense(tensor: Tensor, kind: str, dtype: torch.dtype, prepack: int) -> Tensor:
    """A contiguous copy (``"dense"`` or ``"dense_t"``) of ``tensor``, remembered if allowed."""
    if kind == "dense" and tensor.dtype == dtype and tensor.is_contiguous():
        return tensor.detach() if tensor.requires_grad else tensor
    copy = lookup(tensor, kind, dtype, prepack)
    return MAKERS[kind](tensor.detach(), dtype) if copy is None else copy


def _nbytes(copy: Tensor) -> int:
    return int(torch.ops.mkldnn._nbytes(copy)) if copy.is_mkldnn else copy.nbytes


def packed_bytes() -> tuple[int, int]:
    """How many tensors have packed copies, and how many bytes these hold."""
    with _lock:
        copies = [list(entry.copies.values()) for entry in _entries.values() if entry.copies]
    return len(copies), sum(_nbytes(c) for group in copies for c in group)


def invalidate_packed(module: nn.Module | None = None) -> None:
    """Drop packed copies, of all tensors or of one module's parameters and buffers.

    Needed only after writes that PyTorch's version counter does not see: through ``.data``, a NumPy
    view, or a raw pointer. The copies are made again when they are next used.

    Raises:
        TypeError: ``module`` is neither ``None`` nor an ``nn.Module``.
    """
    global _generation
    if module is not None and not isinstance(module, nn.Module):
        raise TypeError(f"module: got {type(module).__name__}, expected an nn.Module or None")
    with _lock:
        _generation += 1
        if module is None:
            _entries.clear()
            return
    for tensor in [*module.parameters(), *module.buffers()]:
        with _lock:
            _entries.pop(id(tensor), None)
