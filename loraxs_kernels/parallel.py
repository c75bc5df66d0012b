"""Tensor parallelism: a LoRA-XS layer whose W is cut into columns or rows over the ranks of a mesh.

For ``torch.distributed.tensor.parallel.parallelize_module``, beside PyTorch's own styles. All that
a rank needs for its share is on that rank, because the layer is linear in each of its operands:

                 W           A           B           R
    columnwise   Shard(0)    Replicate   Shard(0)    Replicate
    rowwise      Shard(1)    Shard(1)    Replicate   Replicate

A rank runs the ordinary fused operator on its shards. Rowwise, its result is a term of the sum that
is Y, adapter included; columnwise, its dX is a term of the sum that is dX. Both sums are made by
the all-reduce (or reduce-scatter) that the base layer needs anyway. The only communication that the
adapter adds is the sum of dR: r * r numbers per layer and backward pass.

Dropout draws, for the columns of a rowwise rank, the bits that one process would draw for the whole
input, provided that the ranks of the mesh have the same default generator, as PyTorch demands of
tensor parallelism for dropout in general: call ``torch.manual_seed`` with one seed on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from loraxs_kernels import functional
from loraxs_kernels.adapters import AdapterBatch
from loraxs_kernels.nn import LoRAXSLinear


@dataclass(frozen=True)
class Layout:
    """How a layer is cut: the mesh, the dimension of W that is cut, and what goes in and out."""

    mesh: DeviceMesh
    rowwise: bool
    given_input: Placement
    wanted_output: Placement
    use_local_output: bool

    @property
    def input(self) -> Placement:
        """How the layer's own computation needs x."""
        return Shard(-1) if self.rowwise else Replicate()

    @property
    def output(self) -> Placement:
        """How the layer's own computation leaves y."""
        return Partial() if self.rowwise else Shard(-1)

    def placements(self) -> dict[str, Placement]:
        """How each parameter and buffer is laid out."""
        if self.rowwise:
            return {"weight": Shard(1), "bias": Replicate(), "A": Shard(1), "B": Replicate(),
                    "R": Replicate()}  # fmt: skip
        return {"weight": Shard(0), "bias": Shard(0), "A": Replicate(), "B": Shard(0),
                "R": Replicate()}  # fmt: skip


class ShardedLoRAXSLinear(LoRAXSLinear):
    """A :class:`LoRAXSLinear` of which every rank of a mesh holds a part.

    Made by :class:`ColwiseParallelLoRAXS` and :class:`RowwiseParallelLoRAXS`. Its parameters and
    bases are DTensors; ``in_features`` and ``out_features`` are those of the whole layer.
    """

    layout: Layout

    def forward(self, x: Tensor, adapter_ids: Tensor | AdapterBatch | None = None) -> Tensor:
        """``[..., in] -> [..., out]``, laid out as the style says."""
        layout = self.layout
        mesh = layout.mesh
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [layout.given_input], run_check=False)
        x = x.redistribute(placements=[layout.input])
        # What reaches a replicated x from the columns of one rank is a term of its gradient.
        rows = x.to_local(grad_placements=None if layout.rowwise else [Partial()])
        local = DTensor.from_local(
            self._local_forward(rows, adapter_ids), mesh, [layout.output], run_check=False
        )
        y = local.redistribute(placements=[layout.wanted_output])
        return y.to_local() if layout.use_local_output else y

    def _local_forward(self, x: Tensor, adapter_ids: Tensor | AdapterBatch | None) -> Tensor:
        """This rank's share: its columns of y, or its term of the sum."""
        weight, bias = _local(self.weight), self._local_bias()
        if self.merged:
            return F.linear(x, weight, bias)
        block = None
        if self.layout.rowwise:
            first = self.layout.mesh.get_local_rank() * weight.shape[1]
            block = (first, self.in_features)
        return functional.linear(
            x, weight, None, _local(self.A), _local(self.R), _local(self.B), bias,
            self.scaling, self.dropout if self.training else 0.0,
            self.active_ids if adapter_ids is None else adapter_ids,
            self.backend, self._prepack_policy(weight), block,
        )  # fmt: skip

    def _local_bias(self) -> Tensor | None:
        """The bias of this rank's share; the terms of a sum may contain it only once."""
        if self.bias is None:
            return None
        if not self.layout.rowwise:
            return _local(self.bias)
        first = self.layout.mesh.get_local_rank() == 0
        if self.bias.requires_grad:
            # All ranks take part in the sum of its gradient.
            return _local(self.bias) * float(first)
        return _local(self.bias) if first else None

    def to_linear(self) -> nn.Module:
        """Raises ``RuntimeError``: a plain linear layer would not know how it is laid out."""
        raise RuntimeError("model: its LoRA-XS layers are sharded; eject before parallelizing")

    def extra_repr(self) -> str:
        """What ``repr`` shows in the parentheses."""
        style = "rowwise" if self.layout.rowwise else "columnwise"
        return f"{super().extra_repr()}, {style} over {self.layout.mesh.size()} ranks"


def _local(t: Tensor) -> Tensor:
    """This rank's part of a parameter or buffer.

    A frozen one gives the same tensor every time, so that its packed copies are found again. The
    gradient of a replicated one is a sum over the ranks: the all-reduce of dR happens here.
    """
    assert isinstance(t, DTensor)
    if not t.requires_grad:
        with torch.no_grad():
            return t.to_local()
    if t.placements == (Replicate(),):
        return t.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return t.to_local()


class _ParallelLoRAXS(ParallelStyle):
    rowwise: bool

    def __init__(self, given_input: Placement, wanted_output: Placement, use_local_output: bool):
        super().__init__()
        self.given_input, self.wanted_output = given_input, wanted_output
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layout = Layout(
            device_mesh, self.rowwise, self.given_input, self.wanted_output, self.use_local_output
        )
        _check(module, layout)
        assert isinstance(module, LoRAXSLinear)
        for name, placement in layout.placements().items():
            whole = getattr(module, name)
            if whole is None:
                continue
            part: Tensor = distribute_tensor(
                whole.detach(), device_mesh, [placement], src_data_rank=self.src_data_rank
            )
            if isinstance(whole, nn.Parameter):
                part = nn.Parameter(part, requires_grad=whole.requires_grad)
            setattr(module, name, part)
        module.__class__ = ShardedLoRAXSLinear
        module.__dict__["layout"] = layout
        return module

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.given_input}, "
            f"output_layouts={self.wanted_output}, use_local_output={self.use_local_output})"
        )


def _check(module: nn.Module, layout: Layout) -> None:
    if type(module) is not LoRAXSLinear:
        raise TypeError(f"module: got {type(module).__name__}, expected a LoRAXSLinear")
    if layout.mesh.ndim != 1:
        raise ValueError(
            f"device_mesh: got {layout.mesh.ndim} dimensions, expected one; pass mesh['tp']"
        )
    if module.merged:
        raise ValueError("module: is merged; unmerge() before parallelizing")
    size = module.in_features if layout.rowwise else module.out_features
    if size % layout.mesh.size():
        name = "in_features" if layout.rowwise else "out_features"
        raise ValueError(f"{name}: got {size}, expected a multiple of {layout.mesh.size()} ranks")


class ColwiseParallelLoRAXS(_ParallelLoRAXS):
    """Cut a LoRA-XS layer into columns of y, as ``ColwiseParallel`` does a linear layer.

    Args:
        input_layouts: how x comes in; default: the same on all ranks.
        output_layouts: how y is wanted; default: each rank has its columns.
        use_local_output: whether y is a plain tensor, or a DTensor.

    Raises:
        TypeError, ValueError: when applied: the module is no LoRA-XS layer, is merged, or its
            ``out_features`` are not a multiple of the mesh's size.
    """

    rowwise = False

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(
            input_layouts or Replicate(), output_layouts or Shard(-1), use_local_output
        )


class RowwiseParallelLoRAXS(_ParallelLoRAXS):
    """Cut a LoRA-XS layer into columns of x, as ``RowwiseParallel`` does a linear layer.

    Args:
        input_layouts: how x comes in; default: each rank has its columns.
        output_layouts: how y is wanted; default: the same on all ranks (an all-reduce).
        use_local_output: whether y is a plain tensor, or a DTensor.

    Raises:
        TypeError, ValueError: when applied: the module is no LoRA-XS layer, is merged, or its
            ``in_features`` are not a multiple of the mesh's size.
    """

    rowwise = True

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(
            input_layouts or Shard(-1), output_layouts or Replicate(), use_local_output
        )


__all__ = ["ColwiseParallelLoRAXS", "RowwiseParallelLoRAXS"]
