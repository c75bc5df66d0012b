"""The factors of a list of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from loraxs_kernels.factors import LoRAXSFactors, check_rank, lora_xs_factors, stacked_factors

from .cache import FactorCache, cache_key
from .pool import run_at_once
from .ranks import compute_and_exchange, several_ranks

#: Matrices of one shape go to a GPU in stacks of at most this many numbers (4 GiB in float32).
_STACK = 1 << 30


@dataclass(frozen=True)
class Job:
    """One layer: its name, its weight ``[out, in]`` and the rank it gets."""

    name: str
    weight: Tensor
    rank: int

    def error(self, error: Exception) -> Exception:
        """The same error with the layer's name in front."""
        return type(error)(f"{self.name}: {error}")


def initial_factors(
    jobs: Sequence[Job],
    options: Mapping[str, Any],
    *,
    progress: bool = False,
    cache: FactorCache | None = None,
    share: bool = False,
) -> dict[str, LoRAXSFactors]:
    """The factors of every layer, by name, on the device of its weight.

    On the CPU as many layers at once as there are threads (see ``pool``); on a GPU layers of one
    shape as one stack. In memory at a time, beside the weights and the results: a float32 copy and
    the basis of each layer being worked on. Every layer that is done goes to the cache at once, so
    that a run that was cut short goes on where it was.

    Args:
        jobs: the layers; names are unique.
        options: of :func:`~loraxs_kernels.lora_xs_factors`, without the rank.
        progress: whether to show a progress bar.
        cache: where to look first, and to keep what was computed.
        share: whether the ranks of ``torch.distributed`` divide the layers; all of them must call.

    Raises:
        TypeError, ValueError: as ``lora_xs_factors``, with the layer's name; nothing was computed
            if a rank is wrong.
        RuntimeError: another rank has failed.
    """
    for job in jobs:
        try:
            check_rank(job.rank, job.weight.shape)
        except (TypeError, ValueError) as error:
            raise job.error(error) from error
    share = share and several_ranks()
    with tqdm(total=len(jobs), desc="LoRA-XS init", disable=not progress) as bar:
        if not share and cache is None:
            computed = {}
            for job, factors in _compute(jobs, options):
                computed[job.name] = factors
                bar.update()
            return computed
        keys = {
            job.name: key
            for job, key in run_at_once(
                lambda job: cache_key(job.weight, job.rank, options),
                jobs,
                [0] * len(jobs),
            )
        }
        by_key = {keys[job.name]: job for job in jobs}

        def compute(wanted: list[str]) -> dict[str, LoRAXSFactors]:
            return _through_cache({key: by_key[key] for key in wanted}, options, cache, bar)

        if share:
            costs = [(job.weight.numel() * job.rank, key) for key, job in by_key.items()]
            found = compute_and_exchange(costs, compute)
        else:
            found = compute(list(by_key))
        bar.update(bar.total - bar.n)
    return {job.name: _moved(found[keys[job.name]], job.weight) for job in jobs}


def _through_cache(
    jobs: Mapping[str, Job], options: Mapping[str, Any], cache: FactorCache | None, bar: Any
) -> dict[str, LoRAXSFactors]:
    """Factors on the CPU by key: from the cache where it has them, else computed and kept."""
    found: dict[str, LoRAXSFactors] = {}
    missing: dict[str, str] = {}
    for key, job in jobs.items():
        kept = None if cache is None else cache.load(key)
        if kept is None:
            missing[job.name] = key
        else:
            found[key] = kept
            bar.update()
    for job, factors in _compute([jobs[key] for key in missing.values()], options):
        key = missing[job.name]
        found[key] = LoRAXSFactors(*(t.cpu() for t in factors))
        if cache is not None:
            cache.store(key, found[key])
        bar.update()
    return found


def _moved(factors: LoRAXSFactors, weight: Tensor) -> LoRAXSFactors:
    # Equal weights have one key and one result, but layers must not share memory.
    return LoRAXSFactors(*(t.to(weight.device, copy=True) for t in factors))


def _compute(
    jobs: Sequence[Job], options: Mapping[str, Any]
) -> Iterator[tuple[Job, LoRAXSFactors]]:
    def one(job: Job) -> LoRAXSFactors:
        try:
            return lora_xs_factors(job.weight, job.rank, **options)
        except (TypeError, ValueError) as error:
            raise job.error(error) from error

    on_cpu = [job for job in jobs if job.weight.device.type == "cpu"]
    yield from run_at_once(one, on_cpu, [job.weight.numel() for job in on_cpu])
    elsewhere = [job for job in jobs if job.weight.device.type != "cpu"]
    for stack in stacks(elsewhere):
        if len(stack) == 1 or options.get("subspace", "top") != "top":
            yield from ((job, one(job)) for job in stack)
        else:
            names = [job.name for job in stack]
            weights = [job.weight for job in stack]
            yield from zip(
                stack, stacked_factors(weights, stack[0].rank, names=names, **options), strict=True
            )


def stacks(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs of equal device, shape, dtype and rank together, up to the size of a stack."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        w = job.weight
        groups.setdefault((str(w.device), w.shape, w.dtype, job.rank), []).append(job)
    cut: list[list[Job]] = []
    for group in groups.values():
        length = max(1, _STACK // group[0].weight.numel())
        cut += [group[i : i + length] for i in range(0, len(group), length)]
    return cut
