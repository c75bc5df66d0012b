"""Truncated SVD of a weight, fast and certified: see ``randomized_svd``.

``api`` checks, scales and chooses; ``choice`` says which method runs; ``krylov``, ``chebyshev`` and
``exact`` are the methods; ``finish`` turns a subspace into triplets; ``certificate`` bounds the
error; ``passes``, ``orth`` and ``dense`` are the products, the orthonormal rows and the small
factorizations that all of them use.
"""

from .api import randomized_svd
from .result import SVDResult, apply_sign_rule

__all__ = ["SVDResult", "apply_sign_rule", "randomized_svd"]
