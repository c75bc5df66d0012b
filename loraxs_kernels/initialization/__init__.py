"""The factors of all layers of a model: in parallel, from a disk cache, shared over ranks.

``layers`` puts the three together, ``pool`` runs layers at once, ``cache`` keeps files, ``ranks``
talks to the other processes of ``torch.distributed``.
"""

from .cache import FactorCache
from .layers import Job, initial_factors

__all__ = ["FactorCache", "Job", "initial_factors"]
