"""How good a truncated SVD is: errors against a float64 truth, and that truth, kept on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

#: Below this share of s_1^2 nothing can be resolved in the float32 that all contenders compute in.
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Triplets:
    """A truncated SVD: ``U [m, r]``, ``S [r]`` descending, ``Vh [r, n]``."""

    U: Tensor
    S: Tensor
    Vh: Tensor


@dataclass(frozen=True)
class Truth:
    """The top of a spectrum in float64: all of it, or at least one triplet beyond the rank.

    ``s [k]`` descending, and the vectors of the first ``k``: ``v [n, k]`` and ``u [m, k]``.
    """

    s: Tensor
    v: Tensor
    u: Tensor


@dataclass(frozen=True)
class Accuracy:
    """What :func:`accuracy` measures; 0 is perfect everywhere.

    Attributes:
        pve: max over i of |s_i² − ‖W v_i‖²| / max(s_{r+1}², eps s_1²), or the same with Wᵀ u_i if
            that is worse: Musco & Musco's per-vector error (arXiv 1504.05477), relative, gap-free.
        value_error: worst relative error of a singular value.
        sine: root mean square, over the true top r vectors, of the sine of the angle to the found
            subspace; the worse of the two sides. Large where s_r and s_{r+1} nearly agree, which
            harms nobody.
        orthogonality: largest entry of |VᵀV − I| and |UᵀU − I|.
    """

    pve: float
    value_error: float
    sine: float
    orthogonality: float


# ------------------------------------------------------------------------------------- the truth


def exact(matrix: Tensor, count: int) -> Truth:
    """The first ``count`` singular triplets, from the eigenvectors of the float64 Gram matrix.

    Squaring costs half of the digits of small singular values: relative to s_1² the values are
    right to about 1e-15, which is eight digits more than any contender has.

    Args:
        matrix: ``[m, n]``.
        count: at most min(m, n) are returned.
    """
    w = matrix.double()
    if w.shape[0] < w.shape[1]:
        flipped = exact(w.mT, count)
        return Truth(flipped.s, flipped.u, flipped.v)
    values, vectors = torch.linalg.eigh(w.mT @ w)
    v = vectors.flip(-1)[:, :count].contiguous()
    return _completed(w, values.flip(-1)[:count].clamp_min(0).sqrt(), v)


def _completed(tall: Tensor, s: Tensor, v: Tensor) -> Truth:
    """With the left vectors W v / s; by QR, so that they are orthonormal where s is 0 too."""
    q, upper = torch.linalg.qr(tall @ v)
    signs = torch.copysign(torch.ones_like(s), upper.diagonal())
    return Truth(s, v, q * signs)


def cached_exact(
    matrix: Tensor, count: int, folder: Path, note: Callable[[str], None] = print
) -> Truth:
    """:func:`exact`, kept in ``folder`` under a hash of the matrix.

    A damaged file is reported through ``note`` and made again.
    """
    w = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    path = folder / f"{_digest(w)}.npz"
    kept = _read(path, w, count, note)
    if kept is None:
        truth = exact(w, count)
        _write(path, truth)
    else:
        truth = _completed(w.double(), *kept)
    return truth if w is matrix else Truth(truth.s, truth.u, truth.v)


def _digest(matrix: Tensor) -> str:
    content = matrix.detach().cpu().contiguous().numpy()
    head = f"{tuple(content.shape)} {content.dtype}".encode()
    return hashlib.sha256(head + content.tobytes()).hexdigest()[:32]


def _read(
    path: Path, tall: Tensor, count: int, note: Callable[[str], None]
) -> tuple[Tensor, Tensor] | None:
    """``s`` and ``v`` of the first ``count`` triplets if the file has so many."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            s, v = torch.from_numpy(file["s"]), torch.from_numpy(file["v"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        note(f"{path} is damaged ({error}) and made again")
        return None
    wanted = min(count, tall.shape[1])
    return (s[:wanted], v[:, :wanted].contiguous()) if len(s) >= wanted else None


def _write(path: Path, truth: Truth) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Complete or not there at all, even if the run is interrupted.
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        np.savez(file, s=truth.s.numpy(), v=truth.v.numpy())
    os.replace(file.name, path)


# ------------------------------------------------------------------------------------- the errors


def accuracy(matrix: Tensor, truth: Truth, found: Triplets) -> Accuracy:
    """Judge ``found``, r triplets of ``matrix [m, n]``.

    Args:
        matrix: ``[m, n]``, the matrix that was decomposed.
        truth: its first r + 1 triplets or more (or all).
        found: any floating-point dtype; converted to float64.

    Raises:
        ValueError: the truth has fewer triplets than it takes, or shapes do not fit.
    """
    w = matrix.double()
    u, s, v = found.U.double(), found.S.double(), found.Vh.double().mT
    rank = len(s)
    if u.shape != (w.shape[0], rank) or v.shape != (w.shape[1], rank):
        raise ValueError(
            f"found: got U {tuple(u.shape)} and Vh {tuple(found.Vh.shape)} with {rank} values "
            f"for a matrix {tuple(w.shape)}"
        )
    if len(truth.s) < min(rank + 1, *w.shape):
        raise ValueError(f"truth: got {len(truth.s)} triplets, expected at least {rank + 1}")
    true = truth.s[:rank]
    return Accuracy(
        pve=per_vector_error(w, truth.s, u, v),
        value_error=float(((s - true).abs() / true.clamp_min(EPS * float(truth.s[0]))).max()),
        sine=max(rms_sine(truth.v[:, :rank], v), rms_sine(truth.u[:, :rank], u)),
        orthogonality=max(_loss_of_orthogonality(u), _loss_of_orthogonality(v)),
    )


def per_vector_error(w: Tensor, s: Tensor, u: Tensor, v: Tensor) -> float:
    """The relative per-vector error of right vectors ``v [n, r]`` and left ``u [m, r]``.

    Args:
        w: ``[m, n]`` float64.
        s: the true singular values, descending; r + 1 or all of them.
    """
    rank = v.shape[1]
    squares = s.square()
    following = float(squares[rank]) if rank < len(s) else 0.0
    denominator = max(following, EPS * float(squares[0]), torch.finfo(torch.float64).tiny)
    sides = ((w @ v).square().sum(0), (w.mT @ u).square().sum(0))
    return max(float((squares[:rank] - side).abs().max()) for side in sides) / denominator


def rms_sine(true: Tensor, found: Tensor) -> float:
    """Root mean square of the sines of the angles between the columns of ``true`` and the span of
    ``found``, both ``[n, r]`` float64; ``true`` orthonormal, ``found`` of any basis."""
    basis = torch.linalg.qr(found).Q
    # By what is left over, not by 1 - cos²: that would lose everything below 1e-8.
    outside = true - basis @ (basis.mT @ true)
    return float(outside.square().sum(0).mean().sqrt())


def _loss_of_orthogonality(vectors: Tensor) -> float:
    gram = vectors.mT @ vectors
    return float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max())
