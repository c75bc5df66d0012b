"""The truncated SVDs that ``bench_svd`` compares, each as its users call it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import svds
from sklearn.decomposition import TruncatedSVD
from sklearn.utils.extmath import randomized_svd as sklearn_svd
from torch import Tensor

from bench.svd_metrics import Triplets
from loraxs_kernels.svd import randomized_svd

#: matrix [m, n] float32, rank, seed
Run = Callable[[Tensor, int, int], Triplets]

LAPACK = "torch.linalg.svd"
LOWRANK_4 = "torch.svd_lowrank(q=r, niter=4)"
LOWRANK_16 = "torch.svd_lowrank(q=r, niter=16)"
LOWRANK_2R = "torch.svd_lowrank(q=2r, niter=16)"
OFFICIAL = "LoRA-XS official (sklearn TruncatedSVD, n_iter=10)"
SKLEARN = "sklearn randomized_svd"
ARPACK = "scipy svds (ARPACK, tol=0)"
DEFAULT = "ours, default"


@dataclass(frozen=True)
class Contender:
    """One way to call one truncated SVD.

    Attributes:
        ours: whether it is this package's.
        seeded: whether another seed gives another result.
        numpy: whether it computes in NumPy, with another BLAS and other threads than PyTorch.
    """

    name: str
    run: Run
    ours: bool = False
    seeded: bool = True
    numpy: bool = False


# --------------------------------------------------------------------------------------- the peers


def _lapack(w: Tensor, rank: int, seed: int) -> Triplets:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return Triplets(u[:, :rank], s[:rank], vh[:rank])


def _lowrank(columns_per_rank: int, niter: int) -> Run:
    def run(w: Tensor, rank: int, seed: int) -> Triplets:
        torch.manual_seed(seed)
        q = min(columns_per_rank * rank, *w.shape)
        u, s, v = torch.svd_lowrank(w, q=q, niter=niter)
        return Triplets(u[:, :rank], s[:rank], v[:, :rank].mT)

    return run


def _official(w: Tensor, rank: int, seed: int) -> Triplets:
    """Their code up to 2024: fit, then transform, on the transposed weight, with random_state=42.

    The product that puts the matrix together again, which it computes besides, is left out.
    """
    wt = w.numpy().T
    svd = TruncatedSVD(n_components=rank, n_iter=10, random_state=42)
    svd.fit(wt)
    reduced = torch.from_numpy(np.asarray(svd.transform(wt)))
    s = torch.linalg.vector_norm(reduced, dim=0)
    left = torch.from_numpy(np.ascontiguousarray(svd.components_.T))
    return Triplets(left, s, (reduced / s.clamp_min(1e-30)).mT)


def _sklearn(w: Tensor, rank: int, seed: int) -> Triplets:
    return _from_numpy(*sklearn_svd(w.numpy(), n_components=rank, random_state=seed))


def _arpack(w: Tensor, rank: int, seed: int) -> Triplets:
    start = np.random.default_rng(seed).standard_normal(min(w.shape)).astype(np.float32)
    u, s, vh = svds(w.numpy(), k=rank, tol=0, solver="arpack", v0=start)
    order = np.argsort(s)[::-1]
    return _from_numpy(u[:, order], s[order], vh[order])


def _from_numpy(u: np.ndarray, s: np.ndarray, vh: np.ndarray) -> Triplets:
    made = (torch.from_numpy(np.ascontiguousarray(x)) for x in (u, s, vh))
    return Triplets(*made)


PEERS = (
    Contender(LAPACK, _lapack, seeded=False),
    Contender(LOWRANK_4, _lowrank(1, 4)),
    Contender(LOWRANK_16, _lowrank(1, 16)),
    Contender(LOWRANK_2R, _lowrank(2, 16)),
    Contender(OFFICIAL, _official, seeded=False, numpy=True),
    Contender(SKLEARN, _sklearn, numpy=True),
    Contender(ARPACK, _arpack, numpy=True),
)


# -------------------------------------------------------------------------------------------- ours


def ours(name: str, **settings: object) -> Contender:
    """``randomized_svd`` with settings of its keyword arguments."""

    def run(w: Tensor, rank: int, seed: int) -> Triplets:
        result = randomized_svd(w, rank, seed=seed, **settings)  # type: ignore[arg-type]
        return Triplets(result.U, result.S, result.Vh)

    return Contender(name, run, ours=True)


#: From exact to loose. tol bounds the error that is proved, so the true one is smaller; with
#: max_iter nothing is demanded, and the run ends after so many blocks (or filter rounds).
OURS = (
    ours("ours, tol=1e-5", tol=1e-5),
    ours("ours, tol=1e-4", tol=1e-4),
    ours(DEFAULT),
    ours("ours, tol=1e-2", tol=1e-2),
    ours("ours, tol=1e-1", tol=1e-1),
    ours("ours, tol=1", tol=1.0),
)


def cut_short(rank: int) -> tuple[Contender, ...]:
    """Ours with ``max_iter``: bases of about 2 to 8 times the rank, in blocks of about 16."""
    blocks = {max(3, math.ceil(share * rank / 16)) for share in (2, 2.5, 3, 3.5, 4, 5, 6, 8)}
    return tuple(ours(f"ours, max_iter={k}", max_iter=k) for k in sorted(blocks))


def contenders(rank: int) -> tuple[Contender, ...]:
    """All of them."""
    return (*PEERS, *OURS, *cut_short(rank))
