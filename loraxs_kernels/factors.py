"""A, R and B from a weight: where Sigma goes, the signs, R's start; merged and exported forms."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraxs_kernels.svd import apply_sign_rule, randomized_svd
from loraxs_kernels.weights import FLOATING, WeightSource, check_matrix, dense_matrix

MAX_RANK = 512

SIGMA_SIDES = ("A", "B", "both", "none")
SIGNS = ("u", "v", None)
R_STARTS = ("normal", "zeros", "identity", "singular")
SUBSPACES = ("top", "middle", "bottom", "random")


class LoRAXSFactors(NamedTuple):
    """``A [r, in]``, ``R [r, r]``, ``B [out, r]`` and the singular values ``S [r]``."""

    A: Tensor
    R: Tensor
    B: Tensor
    S: Tensor


class LoRAFactors(NamedTuple):
    """A two-factor LoRA, ``lora_A [r, in]`` and ``lora_B [out, r]``, with the scaling folded in."""

    lora_A: Tensor
    lora_B: Tensor


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {allowed}")


def check_options(sigma: str, sign: str | None, r_init: str, r_std: float, subspace: str) -> None:
    """Raise ``TypeError`` or ``ValueError`` for what :func:`lora_xs_factors` does not know."""
    _check_choice("sigma", sigma, SIGMA_SIDES)
    _check_choice("sign", sign, SIGNS)
    _check_choice("r_init", r_init, R_STARTS)
    _check_choice("subspace", subspace, SUBSPACES)
    if isinstance(r_std, bool) or not isinstance(r_std, (int, float)):
        raise TypeError(f"r_std: got {type(r_std).__name__}, expected a number")
    if not (r_std >= 0.0 and math.isfinite(r_std)):
        raise ValueError(f"r_std: got {r_std}, expected a standard deviation >= 0")


def check_seed(seed: object) -> None:
    """Raise unless ``seed`` is an int that a generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: got {type(seed).__name__}, expected int")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, expected 0 to 2**63 - 1")


def check_rank(rank: object, shape: Sequence[int]) -> None:
    """Raise unless ``rank`` is an int from 1 to the smaller side of ``shape``, and at most 512."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank: got {type(rank).__name__}, expected int")
    largest = min(*shape, MAX_RANK)
    if not 1 <= rank <= largest:
        raise ValueError(
            f"rank: got {rank}, expected 1 to {largest} for a weight of shape {list(shape)}"
        )


def draws_of(matrix: Tensor, seed: int) -> torch.Generator:
    """The generator of a weight's own draws (R, random bases): another one for every weight.

    With the bare seed all layers of a model would start from the same R, and layers of one shape
    from the same random bases.
    """
    sample = matrix.detach().reshape(-1)[:: max(1, matrix.numel() // 1024)]
    content = zlib.crc32(sample.to("cpu", torch.float32).numpy().tobytes())
    return torch.Generator().manual_seed((seed + content) % 2**63)


def _singular_triplets(
    matrix: Tensor, rank: int, *, subspace: str, sign: str | None, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``U [m, r]``, ``S [r]``, ``Vh [r, n]`` of one part of the spectrum, as compact tensors."""
    if subspace == "top":
        found = randomized_svd(matrix, rank, seed=seed, sign=sign)
        return found.U, found.S, found.Vh
    if subspace == "random":
        generator = draws_of(matrix, seed)
        m, n = matrix.shape
        draw = [
            torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in (m, n)
        ]
        U, V = (torch.linalg.qr(d).Q.to(matrix.device, matrix.dtype) for d in draw)
        S, Vh = torch.ones(rank, dtype=matrix.dtype, device=matrix.device), V.mT
    else:
        # Only the whole spectrum has a middle and a bottom.
        every = randomized_svd(matrix, min(matrix.shape), method="lapack", sign=None)
        first = (len(every.S) - rank) // 2 if subspace == "middle" else len(every.S) - rank
        part = slice(first, first + rank)
        U, S, Vh = every.U[:, part], every.S[part], every.Vh[part]
    u, v = apply_sign_rule(U.mT, Vh, sign)
    return u.mT.contiguous(), S.clone(), v.contiguous()


def start_of_core(r_init: str, S: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """R's start (one of :data:`R_STARTS`), in the dtype and on the device of ``S``."""
    rank = len(S)
    if r_init == "normal":
        R = torch.randn(rank, rank, generator=generator, dtype=torch.float32)
        return R.mul_(std).to(S.device, S.dtype)
    if r_init == "identity":
        return torch.eye(rank, device=S.device, dtype=S.dtype)
    if r_init == "singular":
        return torch.diag(S)
    return torch.zeros(rank, rank, device=S.device, dtype=S.dtype)


@torch.no_grad()
def lora_xs_factors(
    weight: WeightSource,
    rank: int,
    *,
    sigma: str = "A",
    sign: str | None = "u",
    r_init: str = "normal",
    r_std: float = 1e-5,
    subspace: str = "top",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> LoRAXSFactors:
    """The bases and the start of a LoRA-XS adapter, from the SVD ``W = U S V^T`` of a weight.

    The defaults are those of the official implementation of LoRA-XS (arXiv 2405.17604, section 3);
    docs/svd.md lists which arguments give the convention of which other implementation.

    Args:
        weight: ``[out, in]``, any floating-point dtype and strides; or what stands for it: a linear
            layer, transformers' Conv1D, a module whose weight has ``dequantize()``, or a function
            that returns the matrix (see :func:`~loraxs_kernels.weights.dense_matrix`). Any matrix
            will do: for LoRA-SB the estimate of a gradient. The SVD runs in float32 (float64 for
            float64).
        rank: r, 1 to min(out, in, 512).
        sigma: where the singular values go: ``"A"`` (A = S V^T, B = U), ``"B"`` (A = V^T,
            B = U S), ``"both"`` (a square root each) or ``"none"``.
        sign: sign rule of :func:`~loraxs_kernels.randomized_svd`.
        r_init: ``"normal"`` (std ``r_std``), ``"zeros"``, ``"identity"`` or ``"singular"``
            (diag(S)).
        r_std: standard deviation of ``"normal"``.
        subspace: ``"top"`` (:func:`~loraxs_kernels.randomized_svd`), ``"middle"`` or ``"bottom"``
            singular vectors (a full SVD: slow), or ``"random"`` orthonormal bases (with unit
            singular values).
        seed: of the private generators of the SVD, of R and of random bases (the draws of two
            different weights differ under one seed).
        dtype: dtype of A and B; ``None`` for the weight's.

    Returns:
        ``A [r, in]``, ``R [r, r]`` (float32; float64 for a float64 weight), ``B [out, r]``, ``S
        [r]`` (as R), all compact tensors that share no memory with anything.

    Raises:
        TypeError, ValueError: an argument is wrong, or the weight has NaN or infinite entries.
    """
    check_options(sigma, sign, r_init, r_std, subspace)
    check_seed(seed)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {type(dtype).__name__}, expected a torch.dtype or None")
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"dtype: got {dtype}, expected a floating-point dtype or None")
    matrix = dense_matrix(weight).detach()
    check_rank(rank, matrix.shape)
    wide = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    U, S, Vh = _singular_triplets(matrix.to(wide), rank, subspace=subspace, sign=sign, seed=seed)
    A, B = _bases(U, S, Vh, sigma, matrix.dtype if dtype is None else dtype)
    return LoRAXSFactors(A, start_of_core(r_init, S, r_std, draws_of(matrix, seed)), B, S)


def _bases(
    U: Tensor, S: Tensor, Vh: Tensor, sigma: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A and B with the singular values where ``sigma`` puts them."""
    in_a, in_b = {"A": (1.0, 0.0), "B": (0.0, 1.0), "both": (0.5, 0.5), "none": (0.0, 0.0)}[sigma]
    return (S.pow(in_a).unsqueeze(1) * Vh).to(dtype), (U * S.pow(in_b)).to(dtype)


@torch.no_grad()
def stacked_factors(
    weights: Sequence[Tensor],
    rank: int,
    *,
    names: Sequence[str],
    sigma: str = "A",
    sign: str | None = "u",
    r_init: str = "normal",
    r_std: float = 1e-5,
    subspace: str = "top",
    seed: int = 0,
) -> list[LoRAXSFactors]:
    """:func:`lora_xs_factors` of matrices of one shape, dtype and device in one go: on a GPU
    their thin products fill it, one alone does not.

    Args:
        weights: matrices ``[out, in]``; only their top subspace can be had this way.
        names: of the matrices, for the message of an error.
        others: as :func:`lora_xs_factors`.

    Raises:
        TypeError, ValueError: as :func:`lora_xs_factors`.
    """
    check_options(sigma, sign, r_init, r_std, subspace)
    _check_choice("subspace", subspace, ("top",))
    check_seed(seed)
    for name, weight in zip(names, weights, strict=True):
        check_matrix(weight, f"{name}: weight")
        check_rank(rank, weight.shape)
    dtype = weights[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    stack = torch.stack([weight.detach().to(wide) for weight in weights])
    found = randomized_svd(stack, rank, seed=seed, sign=sign)
    return [
        LoRAXSFactors(A, start_of_core(r_init, S, r_std, draws_of(weight, seed)), B, S.clone())
        for weight, S, (A, B) in (
            (weight, S, _bases(U, S, Vh, sigma, dtype))
            for weight, U, S, Vh in zip(weights, found.U, found.S, found.Vh, strict=True)
        )
    ]


def delta_weight(A: Tensor, R: Tensor, B: Tensor, scaling: float) -> Tensor:
    """``s * B R A``, ``[out, in]``, in at least float32."""
    wide = torch.promote_types(R.dtype, torch.float32)
    return scaling * (B.to(wide) @ R.to(wide) @ A.to(wide))


def fold_to_lora(A: Tensor, R: Tensor, B: Tensor, scaling: float) -> LoRAFactors:
    """``(A, s * B R)``: the same update for engines that know nothing of R; folded in float32."""
    wide = torch.promote_types(R.dtype, torch.float32)
    folded = scaling * (B.to(wide) @ R.to(wide))
    return LoRAFactors(A.detach().clone(), folded.detach().to(B.dtype))
