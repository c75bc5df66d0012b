"""Several layers at once on the CPU, each with few threads.

A decomposition is a chain of thin products and small factorizations, which a second thread hardly
speeds up; another layer beside it does. How many threads a layer gets follows from its shape and
from ``torch.get_num_threads()`` alone, never from what else is to be done, so that a result does
not depend on how many layers there are or on what a cache already holds.

``torch.set_num_threads`` acts on the calling thread (OpenMP keeps the number per thread), and sets
the number that threads started later begin with. So every worker sets its own, and the caller's
number, which is untouched all along, is set again at the end for threads yet to come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

# Numbers in a weight: beyond, reading it from memory is what takes the time, and so do its copies.
_LARGE = 2048 * 2048
_THREADS_LARGE = 8


def threads_per_layer(size: int, total: int) -> int:
    """Threads for a weight of ``size`` numbers where ``total`` are to be had."""
    return min(total, _THREADS_LARGE) if size > _LARGE else 1


def run_at_once(
    work: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int]
) -> Iterator[tuple[Item, Result]]:
    """``(item, work(item))`` for every item, in the order in which they are done.

    Args:
        work: is called in several threads.
        items: what to work on; the large ones first, the rest beside each other.
        sizes: numbers in the weight of each item.

    Raises:
        Exception: the first one that ``work`` raises; items not begun are then left alone.
    """
    total = torch.get_num_threads()
    groups: dict[int, list[int]] = {}
    for index in sorted(range(len(items)), key=lambda i: -sizes[i]):
        groups.setdefault(threads_per_layer(sizes[index], total), []).append(index)
    if total == 1:
        for index in groups.get(1, []):
            yield items[index], work(items[index])
        return
    try:
        for threads, indices in groups.items():
            with ThreadPoolExecutor(
                total // threads, initializer=torch.set_num_threads, initargs=(threads,)
            ) as pool:
                waiting = {pool.submit(work, items[i]): i for i in indices}
                try:
                    for done in as_completed(waiting):
                        yield items[waiting[done]], done.result()
                finally:
                    pool.shutdown(cancel_futures=True)
    finally:
        torch.set_num_threads(total)
