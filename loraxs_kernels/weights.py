"""What a weight can be given as, and its identity: one matrix ``[out, in]`` from many carriers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WeightSource = Tensor | nn.Module | Callable[[], Tensor]

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_conv1d(module: object) -> bool:
    """Whether ``module`` is GPT-2's Conv1D, a linear layer that stores ``[in, out]``."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")


def dense_matrix(source: WeightSource, name: str = "weight") -> Tensor:
    """The matrix ``[out, in]`` that ``source`` stands for; a view where no copy is needed.

    Args:
        source: a matrix; a module whose ``weight`` is a matrix, or something with a
            ``dequantize()`` method that returns one (``nn.Linear``, quantized linear layers);
            transformers' Conv1D, whose ``[in, out]`` is transposed; or a function without arguments
            that returns the matrix.
        name: of the argument, for the message of an error.

    Raises:
        TypeError: it is none of these, or what comes out is no floating-point tensor.
        ValueError: what comes out is not a non-empty matrix with finite entries in memory.
    """
    matrix: Any = source
    if isinstance(source, nn.Module):
        matrix = getattr(source, "weight", None)
        if matrix is None:
            raise TypeError(f"{name}: got a {type(source).__name__} without an attribute 'weight'")
    if callable(matrix) and not isinstance(matrix, Tensor):
        matrix = matrix()
    matrix = _dequantized(matrix)
    check_matrix(matrix, name)
    return matrix.t() if is_conv1d(source) else matrix


def _dequantized(weight: Any) -> Any:
    """``weight.dequantize()`` where that is more than the method that every plain tensor has."""
    method = getattr(type(weight), "dequantize", None)
    plain = isinstance(weight, Tensor) and method is Tensor.dequantize and not weight.is_quantized
    return weight if plain or method is None else weight.dequantize()


def check_matrix(matrix: Any, name: str) -> None:
    """Raise unless ``matrix`` is a dense, finite, floating-point matrix with at least one entry."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name}: got {type(matrix).__name__}, expected a tensor")
    if matrix.dtype not in FLOATING:
        raise TypeError(
            f"{name}: got dtype {matrix.dtype}, expected a floating-point dtype: "
            "float64, float32, bfloat16 or float16"
        )
    if matrix.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {matrix.layout}, expected a dense tensor")
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(f"{name}: got shape {list(matrix.shape)}, expected a non-empty matrix")
    if matrix.is_meta:
        raise ValueError(f"{name}: is on the meta device, expected a tensor with data")
    # One pass and no mask: infinity and NaN survive the extremes.
    low, high = torch.aminmax(matrix.detach())
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError(f"{name}: contains NaN or infinity, expected finite numbers")


def weight_hash(weight: Tensor) -> str:
    """SHA-256 of a weight's dtype, shape and bytes."""
    data = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {list(data.shape)}".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
