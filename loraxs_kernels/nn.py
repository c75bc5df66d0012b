"""The LoRA-XS linear layer as a module. Thin: no arithmetic of its own."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraxs_kernels import dispatch, factors, functional, ops
from loraxs_kernels.adapters import AdapterBatch
from loraxs_kernels.factors import LoRAXSFactors
from loraxs_kernels.weights import is_conv1d

#: The layer that was last merged into a weight, by the weight's id: tied layers share it.
_merged_into: weakref.WeakValueDictionary[int, LoRAXSLinear] = weakref.WeakValueDictionary()


def _managed_by_fsdp(module: nn.Module) -> bool:
    """Whether FSDP gathers and frees the parameters of ``module``, so that none may be packed.

    FSDP refills such a parameter without a new version counter. PyTorch has no public question for
    it; where the private one is missing, every module of a distributed run counts as managed.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    if any(hasattr(p, "_fsdp_flattened") for p in module.parameters(recurse=False)):
        return True
    try:
        from torch.distributed._composable_state import _module_state_mapping
    except ImportError:
        return True
    return any(
        parameter._module_info.module is module
        for states in list(_module_state_mapping.values())
        for parameter in _fsdp_parameters(states)
    )


def _fsdp_parameters(states: Any) -> Iterator[Any]:
    """FSDP2's records of the parameters of one module; ``states`` is private to PyTorch."""
    for state in states.values() if isinstance(states, dict) else [states]:
        state = state() if isinstance(state, weakref.ref) else state
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in groups or [getattr(state, "_fsdp_param_group", None)]:
            yield from getattr(group, "fsdp_params", ())


class LoRAXSLinear(nn.Module):
    """``y = W x + b + s * B (R (A x))``: a frozen linear layer, frozen bases, a trained r x r core.

    Parameters and buffers: ``weight [out, in]`` and ``bias [out]`` (frozen parameters),
    ``A [r, in]``, ``B [out, r]`` and the singular values ``S [r]`` (buffers), ``R [r, r]``, or
    ``[n, r, r]`` with ``num_adapters`` (the trained parameter, float32 unless ``dtype`` is
    float64).

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's.
        rank: r.
        alpha: ``None`` for scaling 1, otherwise scaling = alpha / rank.
        dropout: probability of dropping an element of the adapter's input while training.
        bias: whether the layer has a bias.
        num_adapters: ``None`` for one shared core, or n cores chosen per row by ``adapter_ids``.
        sigma, sign, r_init, r_std, subspace, seed: as in
            :func:`~loraxs_kernels.factors.lora_xs_factors`.
        backend: ``None`` to choose, or a backend's name.
        prepack: whether the CPU backend may keep packed copies of the frozen matrices.
        device, dtype: of weight, bias, A and B.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    A: Tensor
    B: Tensor
    S: Tensor
    unmerged_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        num_adapters: int | None = None,
        sigma: str = "A",
        sign: str | None = "u",
        r_init: str = "normal",
        r_std: float = 1e-5,
        subspace: str = "top",
        seed: int = 0,
        backend: str | None = None,
        prepack: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._setup(
            nn.Parameter(linear.weight.detach()), linear.bias, rank, alpha, dropout, num_adapters,
            {"sigma": sigma, "sign": sign, "r_init": r_init, "r_std": r_std,
             "subspace": subspace, "seed": seed},
            backend, prepack, None,
        )  # fmt: skip

    def _setup(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        rank: int,
        alpha: float | None,
        dropout: float,
        num_adapters: int | None,
        options: dict[str, Any],
        backend: str | None,
        prepack: bool,
        bases: tuple[Tensor, Tensor, Tensor] | LoRAXSFactors | None,
    ) -> None:
        """Take over ``weight`` and ``bias``; ``bases``: known instead of an SVD."""
        check_settings(alpha, dropout, num_adapters, backend, prepack)
        A, R, B, S = _initial_factors(weight, rank, options, bases)
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.rank, self.alpha, self.dropout = rank, alpha, float(dropout)
        self.scaling = 1.0 if alpha is None else alpha / rank
        self.num_adapters, self.options = num_adapters, dict(options)
        self.backend, self.prepack = backend, prepack
        self.fan_in_fan_out = False
        # What eject_lora_xs has to restore.
        self.trained_before = (weight.requires_grad, bias is not None and bias.requires_grad)
        self.weight = weight.requires_grad_(False)
        self.bias = None if bias is None else bias.requires_grad_(False)
        self.register_buffer("A", A)
        self.register_buffer("B", B)
        self.register_buffer("S", S)
        if num_adapters is not None:
            R = R.expand(num_adapters, rank, rank).clone()
        self.R = nn.Parameter(R)
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.active_ids: Tensor | AdapterBatch | None = None
        # Whether copies of the weight with this id may be kept: FSDP puts others in its place.
        self._may_pack: tuple[int, bool] | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        num_adapters: int | None = None,
        sigma: str = "A",
        sign: str | None = "u",
        r_init: str = "normal",
        r_std: float = 1e-5,
        subspace: str = "top",
        seed: int = 0,
        backend: str | None = None,
        prepack: bool = True,
        bases: tuple[Tensor, Tensor, Tensor] | LoRAXSFactors | None = None,
    ) -> LoRAXSLinear:
        """A LoRA-XS layer around an ``nn.Linear`` or GPT-2's ``Conv1D``, whose parameters it takes
        over.

        Args:
            linear: the layer; its weight and bias are shared, not copied, and become frozen.
            bases: instead of an SVD: known ``(A, B, S)`` (of an embedded checkpoint, say; R is then
                zero), or all the factors.
            rank, alpha, dropout, num_adapters, sigma, sign, r_init, r_std, subspace, seed, backend,
                prepack: as in the class.

        Raises:
            TypeError: ``linear`` is of another kind.
            ValueError: an argument is wrong.
        """
        conv1d = is_conv1d(linear)
        if not conv1d and type(linear) is not nn.Linear:
            raise TypeError(
                f"linear: got {type(linear).__module__}.{type(linear).__name__}, "
                "expected torch.nn.Linear or transformers' Conv1D"
            )
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, nn.Parameter)
        assert bias is None or isinstance(bias, nn.Parameter)
        if conv1d:
            # A transposed view in the layout of nn.Linear; the memory stays the original's.
            weight = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
        layer = cls.__new__(cls)
        layer._setup(
            weight, bias, rank, alpha, dropout, num_adapters,
            {"sigma": sigma, "sign": sign, "r_init": r_init, "r_std": r_std,
             "subspace": subspace, "seed": seed},
            backend, prepack, bases,
        )  # fmt: skip
        layer.fan_in_fan_out = conv1d
        layer.train(linear.training)
        return layer

    def to_linear(self) -> nn.Module:
        """The layer this one was made from, with the same parameters and their former flags."""
        if self.merged:
            self.unmerge()
        weight = self.weight.requires_grad_(self.trained_before[0])
        bias = None if self.bias is None else self.bias.requires_grad_(self.trained_before[1])
        linear: Any
        if self.fan_in_fan_out:
            from transformers.pytorch_utils import Conv1D

            linear = Conv1D(self.out_features, 1)
            linear.weight = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
            linear.nx = self.in_features
        else:
            linear = nn.Linear(
                self.in_features, self.out_features, bias=bias is not None, device="meta"
            )
            linear.weight = weight
        linear.bias = bias
        linear.train(self.training)
        result: nn.Module = linear
        return result

    # ------------------------------------------------------------------ computing

    def forward(self, x: Tensor, adapter_ids: Tensor | AdapterBatch | None = None) -> Tensor:
        """``[..., in] -> [..., out]``; ``adapter_ids`` as in ``lora_xs_linear``.

        A merged layer is its base layer. Without ``adapter_ids`` those of
        :func:`use_adapters` count.
        """
        # Through nn.Module's attributes each of these costs a microsecond, together as much as the
        # product of a small layer. They are missing where a parametrization has taken them over.
        parameters, buffers = self._parameters, self._buffers
        weight: Tensor | None = parameters.get("weight")
        R: Tensor | None = parameters.get("R")
        if weight is None or R is None:
            weight, R = self.weight, self.R
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        if buffers["unmerged_weight"] is not None:
            return F.linear(x, weight, bias)
        A, B = buffers["A"], buffers["B"]
        assert A is not None and B is not None
        if A.dtype != weight.dtype:
            # FSDP's mixed precision casts parameters, but no buffers.
            A, B = A.to(weight.dtype), B.to(weight.dtype)
        return functional.linear(
            x, weight, None, A, R, B, bias,
            self.scaling, self.dropout if self.training else 0.0,
            self.active_ids if adapter_ids is None else adapter_ids,
            self.backend, self._prepack_policy(weight),
        )  # fmt: skip

    def _prepack_policy(self, weight: Tensor) -> int:
        if not self.prepack:
            return ops.PREPACK_NEVER
        known = self._may_pack
        if known is None or known[0] != id(weight):
            known = (id(weight), not _managed_by_fsdp(self))
            if not torch.compiler.is_compiling():  # nothing is written while a graph is traced
                self._may_pack = known
        return ops.PREPACK_NOW if known[1] else ops.PREPACK_NEVER

    @property
    def merged(self) -> bool:
        """Whether the weight currently includes the adapter."""
        return self.unmerged_weight is not None

    def _core(self, adapter: int | None) -> Tensor:
        if self.num_adapters is None:
            if adapter is not None:
                raise ValueError(f"adapter: got {adapter}, expected None: the layer has one core")
            return self.R.detach()
        if isinstance(adapter, bool) or not isinstance(adapter, int):
            raise TypeError(f"adapter: got {type(adapter).__name__}, expected an int")
        if not 0 <= adapter < self.num_adapters:
            raise ValueError(f"adapter: got {adapter}, expected 0 to {self.num_adapters - 1}")
        return self.R.detach()[adapter]

    def delta_weight(self, adapter: int | None = None) -> Tensor:
        """``s * B R A``, ``[out, in]``, in at least float32; ``adapter`` selects one of n cores."""
        return factors.delta_weight(self.A, self._core(adapter), self.B, self.scaling)

    def to_lora(self, adapter: int | None = None) -> factors.LoRAFactors:
        """``(lora_A [r, in], lora_B [out, r])`` with ``lora_B @ lora_A`` the whole update."""
        return factors.fold_to_lora(self.A, self._core(adapter), self.B, self.scaling)

    @torch.no_grad()
    def merge(self, adapter: int | None = None) -> None:
        """Add the update to the weight (in float32) and keep a copy, so that unmerging is bitwise.

        Raises:
            RuntimeError: the layer is merged already, so is another one with the same weight, or
                the result would not be finite.
            TypeError, ValueError: ``adapter`` does not select a core.
        """
        if self.merged:
            raise RuntimeError("merge: the layer is merged already")
        other = _merged_into.get(id(self.weight))
        if other is not None and other.merged and other.weight is self.weight:
            raise RuntimeError("merge: another layer shares the weight and is merged into it")
        delta = self.delta_weight(adapter)
        merged = (self.weight.to(delta.dtype) + delta).to(self.weight.dtype)
        if not torch.isfinite(merged).all():
            raise RuntimeError("merge: the merged weight would contain NaN or infinity")
        self.unmerged_weight = self.weight.detach().clone()
        self.weight.copy_(merged)
        _merged_into[id(self.weight)] = self

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weight bit for bit.

        Raises:
            RuntimeError: the layer is not merged.
        """
        if self.unmerged_weight is None:
            raise RuntimeError("unmerge: the layer is not merged")
        self.weight.copy_(self.unmerged_weight)
        self.unmerged_weight = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A merged layer saves the weight without the adapter, which would count twice on
        loading."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.unmerged_weight is not None:
            destination[prefix + "weight"] = self.unmerged_weight

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: Any, unexpected_keys: Any, error_msgs: list[str],
    ) -> None:  # fmt: skip
        if self.merged:
            error_msgs.append(f"{prefix.rstrip('.')}: the layer is merged; unmerge() it first")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        """What ``repr`` shows in the parentheses."""
        text = (
            f"{self.in_features}, {self.out_features}, rank={self.rank}, scaling={self.scaling:g}"
        )
        if self.num_adapters is not None:
            text += f", num_adapters={self.num_adapters}"
        return text + (", merged" if self.merged else "")


def check_settings(
    alpha: float | None,
    dropout: float,
    num_adapters: int | None,
    backend: str | None,
    prepack: bool,
) -> None:
    """Raise ``TypeError`` or ``ValueError``, naming it, for a setting that no layer can have."""
    for name, value in (("alpha", alpha), ("dropout", dropout)):
        if name == "alpha" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"alpha: got {alpha}, expected a finite number or None")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: got {dropout}, expected 0 <= dropout < 1")
    if num_adapters is not None:
        if isinstance(num_adapters, bool) or not isinstance(num_adapters, int):
            raise TypeError(f"num_adapters: got {type(num_adapters).__name__}, expected an int")
        if num_adapters < 1:
            raise ValueError(f"num_adapters: got {num_adapters}, expected at least 1")
    if not isinstance(prepack, bool):
        raise TypeError(f"prepack: got {type(prepack).__name__}, expected a bool")
    dispatch.check_name(backend)


_CHECKED_OPTIONS = ("sigma", "sign", "r_init", "r_std", "subspace")


def _check_bases(bases: Any, rank: int, weight: Tensor) -> None:
    shapes = {"A": (rank, weight.shape[1]), "B": (weight.shape[0], rank), "S": (rank,)}
    if not isinstance(bases, tuple) or len(bases) != 3:
        raise TypeError(f"bases: got {type(bases).__name__}, expected a tuple (A, B, S)")
    for (name, shape), basis in zip(shapes.items(), bases, strict=True):
        if not isinstance(basis, Tensor) or not basis.is_floating_point():
            kind = basis.dtype if isinstance(basis, Tensor) else type(basis).__name__
            raise TypeError(f"bases: got {kind} for {name}, expected a floating-point tensor")
        if basis.shape != shape:
            raise ValueError(
                f"bases: got shape {list(basis.shape)} for {name}, expected {list(shape)}"
            )


def _initial_factors(
    weight: Tensor,
    rank: int,
    options: dict[str, Any],
    bases: tuple[Tensor, Tensor, Tensor] | LoRAXSFactors | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, R, B and S from the weight, from ``bases``, or without numbers on the meta device."""
    factors.check_options(**{name: options[name] for name in _CHECKED_OPTIONS})
    factors.check_seed(options["seed"])
    factors.check_rank(rank, weight.shape)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if isinstance(bases, LoRAXSFactors):
        A, R, B, S = (b.to(weight.device) for b in bases)
        return A.to(weight.dtype), R, B.to(weight.dtype), S
    if bases is not None:
        _check_bases(bases, rank, weight)
        A, B, S = (b.to(weight.device) for b in bases)
        R = torch.zeros(rank, rank, dtype=wide, device=weight.device)
        return A.to(weight.dtype), R, B.to(weight.dtype), S
    if weight.is_meta:
        out_features, in_features = weight.shape
        empty = [(rank, in_features), (rank, rank), (out_features, rank), (rank,)]
        dtypes = (weight.dtype, wide, weight.dtype, wide)
        A, R, B, S = (
            torch.empty(s, dtype=d, device="meta") for s, d in zip(empty, dtypes, strict=True)
        )
        return A, R, B, S
    A, R, B, S = factors.lora_xs_factors(weight, rank, **options)
    return A, R, B, S


@contextlib.contextmanager
def use_adapters(
    model: nn.Module, ids: Tensor | list[int] | AdapterBatch
) -> Iterator[AdapterBatch]:
    """Inside the block every :class:`LoRAXSLinear` of ``model`` uses these adapter ids.

    The ids are a state of the layers, like ``train()``: one block at a time. With activation
    checkpointing the backward pass runs the layers again, so it belongs inside the block too.

    Args:
        model: a model with layers of ``num_adapters`` cores each.
        ids: ids per row or per sequence (see ``lora_xs_linear``), validated and sorted once here.

    Yields:
        the :class:`AdapterBatch`.

    Raises:
        TypeError: ``model`` is no module, or ``ids`` are no ints.
        ValueError: no such layer, layers of different ``num_adapters``, an id out of range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.Module")
    layers = [m for m in model.modules() if isinstance(m, LoRAXSLinear)]
    counts = {layer.num_adapters for layer in layers}
    if len(counts) != 1 or None in counts:
        raise ValueError(
            f"model: got LoRA-XS layers with num_adapters {sorted(counts, key=str)}, "
            "expected one common number"
        )
    (count,) = counts
    assert count is not None
    batch = ids if isinstance(ids, AdapterBatch) else AdapterBatch(ids, count)
    if batch.num_adapters != count:
        raise ValueError(
            f"ids: got an AdapterBatch for {batch.num_adapters} adapters, the model has {count}"
        )
    before = [layer.active_ids for layer in layers]
    for layer in layers:
        layer.active_ids = batch
    try:
        yield batch
    finally:
        for layer, ids_before in zip(layers, before, strict=True):
            layer.active_ids = ids_before
