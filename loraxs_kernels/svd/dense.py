"""Small dense factorizations that always answer.

LAPACK's divide and conquer gives up on a few finite matrices in a million. A caller with a valid
weight must not see that, so the failure is caught where it happens and worked around.
"""

from __future__ import annotations

import torch
from torch import Tensor


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and vectors (columns) of symmetric finite ``[..., k, k]``, of which
    the lower triangle is read."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        # In fp64, with the diagonal moved by less than fp32's resolution: another path through
        # the same algorithm, and for an fp32 matrix an answer as good as the one that failed.
        wide = matrix.double().tril()
        k = wide.shape[-1]
        size = torch.linalg.matrix_norm(wide, keepdim=True) + torch.finfo(torch.float64).tiny
        steps = torch.arange(k, dtype=wide.dtype, device=wide.device) / k
        shift = 4 * torch.finfo(torch.float64).eps * size * torch.diag(steps)
        values, vectors = torch.linalg.eigh(wide + shift)
        values, vectors = values.to(matrix.dtype), vectors.to(matrix.dtype)
    return values, vectors


def eigvalsh(matrix: Tensor) -> Tensor:
    """Eigenvalues (ascending) of symmetric finite ``[..., k, k]``."""
    try:
        return torch.linalg.eigvalsh(matrix)
    except torch.linalg.LinAlgError:
        return eigh(matrix)[0]


def small_svd(square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Full SVD of finite square fp64 ``[..., k, k]``: u, s (descending), vh."""
    try:
        u, s, vh = torch.linalg.svd(square, full_matrices=False)
    except torch.linalg.LinAlgError:
        # A rotation by the eigenvectors of the Gram matrix leaves nearly orthogonal columns, from
        # where the iteration converges; if not, their QR is the answer to sqrt(eps).
        rotation = eigh(square.mT @ square)[1].flip(-1)
        rotated = square @ rotation
        try:
            u, s, vh = torch.linalg.svd(rotated, full_matrices=False)
        except torch.linalg.LinAlgError:
            u, upper = torch.linalg.qr(rotated)
            diagonal = upper.diagonal(dim1=-2, dim2=-1)
            u = u * torch.copysign(torch.ones_like(diagonal), diagonal)[..., None, :]
            order = diagonal.abs().argsort(dim=-1, descending=True)
            s = diagonal.abs().gather(-1, order)
            u = u.gather(-1, order[..., None, :].expand_as(u))
            vh = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)[order]
        vh = vh @ rotation.mT
    return u, s, vh
