"""randomized_svd: checks, scaling, choice of the method and of the precision, and the result."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .certificate import FAILURE_PROBABILITY, error_denominator, rounding_error
from .chebyshev import chebyshev
from .choice import METHODS, choose_method, krylov_cap
from .exact import Triplets, gram, lapack
from .finish import triplets
from .krylov import Subspace, block_size, krylov, krylov_room
from .passes import GramPasses, Passes, full_precision
from .result import SVDResult, apply_sign_rule

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DEFAULT_TOL = 1e-3
# Entries beyond these (powers of two) are scaled first, so that squares of squares stay finite.
_SCALE_LIMIT = 20


@dataclass(frozen=True)
class _Settings:
    rank: int
    tol: float
    max_iter: int | None
    oversample: int | None
    method: str
    seed: int
    eps: float  # of the result's dtype: below eps · s₁² nothing can be resolved


@dataclass(frozen=True)
class _Found:
    """Triplets of one matrix (or a stack) with m ≥ n, as fp64 rows; and what they are worth."""

    parts: Triplets
    truncation: Tensor  # [...]: what stopping early costs; 0 for the exact methods
    rounding: Tensor  # [...]: what the working dtype costs
    method: str
    dtype: torch.dtype
    iterations: int
    columns: int
    looks: int  # at the random part of the bound; 0 for the exact methods

    def error(self) -> float:
        return float((self.truncation + self.rounding).max())


def randomized_svd(
    matrix: Tensor,
    rank: int,
    *,
    tol: float | None = None,
    max_iter: int | None = None,
    oversample: int | None = None,
    method: str = "auto",
    seed: int = 0,
    sign: str | None = "u",
) -> SVDResult:
    """The top ``rank`` singular triplets of a dense matrix, with a certificate.

    Equivalent to::

        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]          # and a sign rule

    Args:
        matrix: ``[m, n]``, or a stack ``[L, m, n]``; fp64, fp32, bf16 or fp16, any strides, CPU or
            CUDA. Never modified; no gradient flows through.
        rank: 1 … min(m, n).
        tol: what ``error`` may be, at most (default 1e-3). 0 asks for the whole spectrum.
        max_iter: stop after that many blocks ("krylov", "gram-krylov") or rounds ("chebyshev") and
            return what was found, with its (then larger) error. Default: go on until ``tol`` is
            met, and change to "gram" where that would take more than half of the space.
        oversample: vectors beyond the rank: in the subspace of "chebyshev" (default rank // 2), and
            in the basis of "krylov" at its first convergence test (default: 3 · rank or more).
        method: "auto", or one of "krylov" (small-block Krylov), "gram-krylov" (the same on the
            Gram matrix, for tall matrices), "chebyshev" (filtered subspace iteration), "gram"
            (eigenvalues of the Gram matrix) and "lapack" (full SVD in fp64).
        seed: of the random starting block; the global generators are neither read nor advanced.
        sign: which entry of largest magnitude is made positive: ``"u"`` of each left vector (what
            scikit-learn ≥ 1.5 does), ``"v"`` of each right vector (≤ 1.4), ``None`` neither.

    Returns:
        SVDResult(U ``[m, rank]``, S ``[rank]``, Vh ``[rank, n]``, error), a leading ``L`` for a
        stack. fp64 for an fp64 matrix, else fp32. ``error`` bounds the relative per-vector error
        (Musco & Musco 2015, see SVDResult), with the failure probability in the result.

    Raises:
        TypeError: matrix is not a floating-point tensor, or an argument has the wrong type.
        ValueError: matrix is empty, not 2-D or 3-D, or holds NaN or infinity; rank, tol, max_iter,
            oversample, method, seed or sign out of range; a named method that cannot run on it.

    Guarantees: bit for bit the same for the same seed, machine, PyTorch build and thread count;
    U and V orthonormal to the result's precision, also for rank-deficient and zero matrices;
    ``error ≤ tol`` unless max_iter was given or tol lies below the rounding error.

    Cost: for r = 16 about 6r to 10r vectors times W and Wᵀ (4 · m · n FLOPs each), plus 4 K² n for
    K ≤ 12r basis vectors; memory K · (n + K) numbers beside the matrix (and its fp32 copy, for
    16-bit input). "gram": m · n² · 2 + about 9 n³ FLOPs, n² numbers.

    Sources: Halko, Martinsson & Tropp 2011 (arXiv 0909.4061); Musco & Musco 2015 (1504.05477);
    Meyer, Musco & Musco 2023 (2305.02535); Tropp & Webber 2023 (2306.12418); Zhou & Saad 2007 for
    the Chebyshev filter.
    """
    _check_matrix(matrix)
    _check_arguments(matrix, rank, tol, max_iter, oversample, method, seed, sign)
    result_dtype = torch.float64 if matrix.dtype is torch.float64 else torch.float32
    settings = _Settings(
        rank=int(rank),
        tol=_DEFAULT_TOL if tol is None else float(tol),
        max_iter=max_iter,
        oversample=oversample,
        method=method,
        seed=seed,
        eps=torch.finfo(result_dtype).eps,
    )
    with full_precision(matrix.device):
        a, exponent = _scaled(matrix.detach().to(result_dtype))
        if a.dim() == 2:
            pieces = [_decompose(a, settings)]
        elif a.device.type == "cuda":
            pieces = _decompose_stack(a, settings)
        else:
            # One after the other: batched products are slower than single ones on a CPU.
            pieces = [_decompose(one, settings) for one in a]
        return _assemble(pieces, a, exponent, sign)


def _check_matrix(matrix: Tensor) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"matrix: expected a torch.Tensor, got {type(matrix).__name__}")
    if matrix.dtype not in _DTYPES:
        raise TypeError(
            f"matrix: expected float64, float32, bfloat16 or float16, got {matrix.dtype}"
        )
    if matrix.layout is not torch.strided or matrix.device.type == "meta":
        raise TypeError(
            f"matrix: expected a dense tensor with data, got layout {matrix.layout} on "
            f"{matrix.device}"
        )
    if matrix.dim() not in (2, 3):
        raise ValueError(
            f"matrix: expected [m, n] or a stack [L, m, n], got shape {tuple(matrix.shape)}"
        )
    if matrix.numel() == 0:
        raise ValueError(f"matrix: expected at least one entry, got shape {tuple(matrix.shape)}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_arguments(
    matrix: Tensor,
    rank: int,
    tol: float | None,
    max_iter: int | None,
    oversample: int | None,
    method: str,
    seed: int,
    sign: str | None,
) -> None:
    short = min(matrix.shape[-2:])
    if not _is_int(rank):
        raise TypeError(f"rank: expected an int, got {rank!r}")
    if not 1 <= rank <= short:
        raise ValueError(
            f"rank: expected 1 to {short} for a matrix of shape {tuple(matrix.shape)}, got {rank}"
        )
    if tol is not None:
        if isinstance(tol, bool) or not isinstance(tol, (int, float)):
            raise TypeError(f"tol: expected a float or None, got {tol!r}")
        if not (math.isfinite(tol) and tol >= 0):
            raise ValueError(f"tol: expected a finite number ≥ 0, got {tol}")
    for name, value in (("max_iter", max_iter), ("oversample", oversample)):
        if value is not None and not _is_int(value):
            raise TypeError(f"{name}: expected an int or None, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not _is_int(seed):
        raise TypeError(f"seed: expected an int, got {seed!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 to 2**63 - 1, got {seed}")
    if sign not in ("u", "v", None):
        raise ValueError(f"sign: expected 'u', 'v' or None, got {sign!r}")
    if method != "auto" and method not in METHODS:
        raise ValueError(f"method: expected 'auto' or one of {METHODS}, got {method!r}")
    if method in ("krylov", "gram-krylov"):
        block = block_size(rank, max(matrix.shape[-2:]), short, matrix.device)
        if krylov_room(short, block) <= rank:
            raise ValueError(
                f"method: {method!r} needs min(m, n) > rank + {2 * block} or so; "
                f"rank {rank}, shape {tuple(matrix.shape)}"
            )


def _scaled(a: Tensor) -> tuple[Tensor, int]:
    """``a`` times the power of two that brings its largest entry near 1, where it is far from it;
    and the exponent taken out. Refuses what is not finite."""
    # Both ends at once, in the order of memory: several times faster than a maximum norm.
    low, high = torch.aminmax(a if a.is_contiguous() else a.mT)
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        bad = int((~torch.isfinite(a)).sum())
        raise ValueError(f"matrix: expected finite entries, {bad} of {a.numel()} are NaN or Inf")
    if largest == 0.0:
        return a, 0
    exponent = math.frexp(largest)[1]
    if abs(exponent) <= _SCALE_LIMIT:
        return a, 0
    # In two halves: 2^-exponent itself may not be representable.
    half = exponent // 2
    return (a * 2.0**-half) * 2.0 ** (half - exponent), exponent


def _tall(a: Tensor) -> Tensor:
    return a if a.shape[-2] >= a.shape[-1] else a.mT


def _decompose(a: Tensor, settings: _Settings) -> _Found:
    """One matrix: the chosen method, and the next better one as long as the bound is not met."""
    a = _tall(a)
    method, dtype = settings.method, a.dtype
    if settings.tol < 64 * torch.finfo(dtype).eps:
        dtype = torch.float64  # below what fp32 can promise
    if method == "auto":
        m, n = a.shape
        method = choose_method(m, n, settings.rank, a.device, dtype, settings.tol)
    columns = 0
    while True:
        found = _run(a.to(dtype), method, settings)
        columns += found.columns
        following = _next_attempt(found, settings)
        if following is None:
            return replace(found, columns=columns)
        method, dtype = following


def _next_attempt(found: _Found, settings: _Settings) -> tuple[str, torch.dtype] | None:
    """What to try after ``found``; None where it is good enough, or the best there is."""
    tol = settings.tol
    if float(found.rounding.max()) > 0.5 * tol and found.dtype is torch.float32:
        # The spectrum falls so fast that squares lose the small singular values in fp32.
        return found.method, torch.float64
    if settings.method != "auto":
        return None
    iterative = found.method not in ("gram", "lapack")
    if iterative and settings.max_iter is None and float(found.truncation.max()) > tol:
        return "gram", found.dtype
    s = found.parts[1]
    resolved_by_squares = s[..., -1] > 1e-6 * s[..., 0]
    full_double = settings.eps < torch.finfo(torch.float32).eps
    if full_double and found.method != "lapack" and not bool(resolved_by_squares.all()):
        return "lapack", torch.float64
    return None


def _run(a: Tensor, method: str, settings: _Settings) -> _Found:
    """One method on one matrix or a stack, m ≥ n."""
    generator = torch.Generator(device=a.device).manual_seed(settings.seed)
    rank, working_eps = settings.rank, torch.finfo(a.dtype).eps
    if method in ("gram", "lapack"):
        passes = Passes(a)
        parts, theta = gram(passes, rank) if method == "gram" else lapack(a, rank)
        truncation, iterations, looks = torch.zeros_like(theta[..., 0]), 0, 0
        if method == "lapack":
            working_eps = torch.finfo(torch.float64).eps
    else:
        passes = GramPasses(a) if method == "gram-krylov" else Passes(a)
        subspace = _subspace(passes, method, settings, generator)
        parts = triplets(passes, subspace.v)
        theta = subspace.theta
        truncation, iterations, looks = subspace.error, subspace.iterations, subspace.looks
    denominator = error_denominator(theta[..., 0], theta[..., -1], settings.eps)
    rounding = rounding_error(theta, denominator, working_eps, settings.eps)
    columns = passes.columns
    return _Found(parts, truncation, rounding, method, a.dtype, iterations, columns, looks)


def _subspace(
    passes: Passes, method: str, settings: _Settings, generator: torch.Generator
) -> Subspace:
    m, n = passes.shape
    rank, device = settings.rank, passes.a.device
    if method == "chebyshev":
        return chebyshev(
            passes,
            rank,
            tol=settings.tol,
            max_iter=settings.max_iter,
            oversample=settings.oversample,
            eps=settings.eps,
            generator=generator,
        )
    block = block_size(rank, m, n, device)
    cap = krylov_cap(n, rank)
    if settings.method != "auto" or settings.max_iter is not None:
        cap = krylov_room(n, block)  # named, or to be cut short: as far as it can go
    return krylov(
        passes,
        rank,
        tol=settings.tol,
        max_iter=settings.max_iter,
        oversample=settings.oversample,
        cap=cap,
        eps=settings.eps,
        generator=generator,
    )


def _decompose_stack(stack: Tensor, settings: _Settings) -> list[_Found]:
    """All matrices of a stack at once; what did not meet the bound again, one by one."""
    tall = _tall(stack)
    m, n = tall.shape[-2:]
    method = settings.method
    if method == "auto":
        method = choose_method(m, n, settings.rank, stack.device, stack.dtype, settings.tol)
    if method not in ("gram", "krylov", "gram-krylov"):
        return [_decompose(one, settings) for one in stack]
    found = _run(tall, method, settings)
    pieces = []
    for index, one in enumerate(stack):
        parts = (found.parts[0][index], found.parts[1][index], found.parts[2][index])
        piece = replace(
            found,
            parts=parts,
            truncation=found.truncation[index],
            rounding=found.rounding[index],
            columns=found.columns,
        )
        broken = not math.isfinite(piece.error())
        redo = broken or _next_attempt(piece, settings) is not None
        pieces.append(_decompose(one, settings) if redo else piece)
    return pieces


def _assemble(pieces: list[_Found], a: Tensor, exponent: int, sign: str | None) -> SVDResult:
    """The result in the caller's orientation, scale and dtype, in compact tensors."""
    flipped = a.shape[-2] < a.shape[-1]
    finished = []
    for piece in pieces:
        left, s, right = piece.parts
        if flipped:
            left, right = right, left
        left, right = apply_sign_rule(left.to(a.dtype), right.to(a.dtype), sign)
        half = exponent // 2
        s = (s * 2.0**half) * 2.0 ** (exponent - half)
        finished.append((left.mT.contiguous(), s.to(a.dtype), right.contiguous()))
    u, s, vh = (torch.stack(parts) for parts in zip(*finished, strict=True))
    if a.dim() == 2:
        u, s, vh = u[0], s[0], vh[0]
    errors = tuple(piece.error() for piece in pieces)
    worst = max(pieces, key=_Found.error)
    looks = sum(piece.looks for piece in pieces)
    return SVDResult(
        U=u,
        S=s,
        Vh=vh,
        error=max(errors),
        method=worst.method,
        failure_probability=min(1.0, FAILURE_PROBABILITY * looks),
        iterations=worst.iterations,
        passes=worst.columns / s.shape[-1],
        errors=errors,
    )
