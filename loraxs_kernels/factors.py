"""A, R and B from a weight: where Sigma goes, the signs, R's start; merged and exported forms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
    """Raise ``ValueError`` for an option that :func:`lora_xs_factors` does not know."""
    _check_choice("sigma", sigma, SIGMA_SIDES)
    _check_choice("sign", sign, SIGNS)
    _check_choice("r_init", r_init, R_STARTS)
    _check_choice("subspace", subspace, SUBSPACES)
    if not r_std >= 0.0:
        raise ValueError(f"r_std: got {r_std}, expected a standard deviation >= 0")


def fix_signs(U: Tensor, Vh: Tensor, sign: str | None) -> tuple[Tensor, Tensor]:
    """Make the largest-magnitude entry of each left (``"u"``) or right (``"v"``) vector positive.

    Args:
        U: ``[m, r]``.
        Vh: ``[r, n]``.
        sign: ``"u"`` (what sklearn >= 1.5 gives the official code), ``"v"`` (sklearn <= 1.4), or
            ``None`` to leave the signs.
    """
    if sign is None:
        return U, Vh
    vectors = U if sign == "u" else Vh.mT
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]
    flip = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return U * flip, Vh * flip.unsqueeze(1)


def singular_triplets(
    matrix: Tensor, rank: int, *, subspace: str, sign: str | None, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``U [m, r]``, ``S [r]``, ``Vh [r, n]`` of one part of the spectrum, as compact tensors."""
    if subspace == "random":
        generator = torch.Generator().manual_seed(seed)
        m, n = matrix.shape
        draw = [
            torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in (m, n)
        ]
        U, V = (torch.linalg.qr(d).Q.to(matrix.device, matrix.dtype) for d in draw)
        S, Vh = torch.ones(rank, dtype=matrix.dtype, device=matrix.device), V.mT
    else:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        first = {"top": 0, "middle": (len(S) - rank) // 2, "bottom": len(S) - rank}[subspace]
        part = slice(first, first + rank)
        U, S, Vh = U[:, part], S[part], Vh[part]
    U, Vh = fix_signs(U, Vh, sign)
    return U.contiguous(), S.clone(), Vh.contiguous()


def _start(r_init: str, S: Tensor, std: float, seed: int) -> Tensor:
    rank = len(S)
    if r_init == "normal":
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rank, rank, generator=generator).mul_(std).to(S.device)
    if r_init == "identity":
        return torch.eye(rank, device=S.device)
    if r_init == "singular":
        return torch.diag(S.float())
    return torch.zeros(rank, rank, device=S.device)


def check_matrix(name: str, matrix: Tensor, rank: int) -> None:
    """Raise unless ``matrix`` is a finite floating-point matrix of at least that rank's size."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name}: got {type(matrix).__name__}, expected a tensor")
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(f"{name}: got shape {list(matrix.shape)}, expected a non-empty matrix")
    if not matrix.is_floating_point():
        raise TypeError(f"{name}: got dtype {matrix.dtype}, expected a floating-point dtype")
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank: got {type(rank).__name__}, expected int")
    if not 1 <= rank <= min(*matrix.shape, 512):
        raise ValueError(
            f"rank: got {rank}, expected 1 to {min(*matrix.shape, 512)} "
            f"for a {name} of shape {list(matrix.shape)}"
        )
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{name}: contains NaN or infinity, expected finite numbers")


@torch.no_grad()
def lora_xs_factors(
    weight: Tensor,
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

    The defaults are those of the official implementation of LoRA-XS (arXiv 2405.17604, section 3).

    Args:
        weight: ``[out, in]``, any floating-point dtype; the SVD runs in float32 (float64 for
        float64).
        rank: r, 1 to min(out, in, 512).
        sigma: where the singular values go: ``"A"`` (A = S V^T, B = U), ``"B"``, ``"both"`` (a
        square
            root each) or ``"none"``.
        sign: sign rule, see :func:`fix_signs`.
        r_init: ``"normal"`` (std ``r_std``), ``"zeros"``, ``"identity"`` or ``"singular"``
        (diag(S)).
        r_std: standard deviation of ``"normal"``.
        subspace: ``"top"``, ``"middle"`` or ``"bottom"`` singular vectors, or ``"random"``
            orthonormal bases (with unit singular values).
        seed: seed of a private generator for R (and random bases).
        dtype: dtype of A and B; ``None`` for the weight's.

    Returns:
        ``A [r, in]``, ``R [r, r]`` (float32; float64 for a float64 weight), ``B [out, r]``, ``S
        [r]``, all compact tensors that share no memory with anything.

    Raises:
        TypeError, ValueError: an argument is wrong, or the weight has NaN or infinite entries.
    """
    check_matrix("weight", weight, rank)
    check_options(sigma, sign, r_init, r_std, subspace)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    U, S, Vh = singular_triplets(
        weight.detach().to(wide), rank, subspace=subspace, sign=sign, seed=seed
    )
    in_a, in_b = {"A": (1.0, 0.0), "B": (0.0, 1.0), "both": (0.5, 0.5), "none": (0.0, 0.0)}[sigma]
    dtype = weight.dtype if dtype is None else dtype
    A = (S.pow(in_a).unsqueeze(1) * Vh).to(dtype)
    B = (U * S.pow(in_b)).to(dtype)
    return LoRAXSFactors(A, _start(r_init, S, r_std, seed).to(wide), B, S)


def delta_weight(A: Tensor, R: Tensor, B: Tensor, scaling: float) -> Tensor:
    """``s * B R A``, ``[out, in]``, in at least float32."""
    wide = torch.promote_types(R.dtype, torch.float32)
    return scaling * (B.to(wide) @ R.to(wide) @ A.to(wide))


def fold_to_lora(A: Tensor, R: Tensor, B: Tensor, scaling: float) -> LoRAFactors:
    """``(A, s * B R)``: the same update for engines that know nothing of R; folded in float32."""
    wide = torch.promote_types(R.dtype, torch.float32)
    folded = scaling * (B.to(wide) @ R.to(wide))
    return LoRAFactors(A.detach().clone(), folded.detach().to(B.dtype))
