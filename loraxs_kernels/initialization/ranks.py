"""Dividing the work over the ranks of ``torch.distributed``.

Only weights that all ranks hold, bit for bit, are divided: under tensor or pipeline parallelism
the ranks hold different ones, and each computes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist

from loraxs_kernels.factors import LoRAXSFactors


def several_ranks() -> bool:
    """Whether there are other ranks to share with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _agree(failure: Exception | None) -> None:
    """Raise on every rank if one has failed: the others would wait for it for ever."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"rank {rank} could not initialize its layers: {message}")


def shared_by_all(keys: Sequence[tuple[int, str]]) -> dict[str, int]:
    """Which rank computes what: keys that every rank has, dealt out by falling cost.

    Args:
        keys: (cost, key) of each of this rank's layers.
    """
    everyone: list[Sequence[tuple[int, str]]] = [()] * dist.get_world_size()
    dist.all_gather_object(everyone, list(keys))
    common = set.intersection(*(set(theirs) for theirs in everyone))
    ordered = sorted(common, reverse=True)
    return {key: index % len(everyone) for index, (_, key) in enumerate(ordered)}


def compute_and_exchange(
    keys: Sequence[tuple[int, str]], compute: Callable[[list[str]], dict[str, LoRAXSFactors]]
) -> dict[str, LoRAXSFactors]:
    """The factors of all ``keys`` of this rank: some computed here, the rest sent by others.

    A collective call: every rank of the default group must make it.

    Args:
        keys: (cost, key) of each layer.
        compute: the factors, on the CPU, of some of the keys.
    """
    owners = shared_by_all(keys)
    here = dist.get_rank()
    mine = [key for _, key in keys if owners.get(key, here) == here]
    found: dict[str, LoRAXSFactors] = {}
    failure: Exception | None = None
    try:
        found = compute(mine)
    except Exception as error:  # noqa: BLE001 - raised again by _agree, on every rank
        failure = error
    _agree(failure)
    for key, owner in owners.items():
        box: list[LoRAXSFactors | None] = [found.get(key) if owner == here else None]
        dist.broadcast_object_list(box, src=owner)
        received = box[0]
        assert received is not None
        found[key] = received
    return found
