"""Worker processes that form a process group and run functions of the tests, one by one."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _work(rank: int, world: int, port: int, tasks: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    while (task := tasks.get()) is not None:
        function, args = task
        try:
            function(*args)
            answers.put((rank, None))
        except Exception:  # noqa: BLE001 - raised again by Ranks.run
            answers.put((rank, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """``world`` processes joined by gloo; starting them costs more than most tests."""

    def __init__(self, world: int) -> None:
        self.world = world
        context = mp.get_context("spawn")
        self.tasks = [context.Queue() for _ in range(world)]
        self.answers = context.Queue()
        port = _free_port()
        self.processes = [
            context.Process(
                target=_work, args=(rank, world, port, tasks, self.answers), daemon=True
            )
            for rank, tasks in enumerate(self.tasks)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """Call ``function(*args)``, a function of a module, on every rank; raise what any raised.

        A collective that the others wait for in vain fails after a minute.
        """
        for tasks in self.tasks:
            tasks.put((function, args))
        failures = [self.answers.get(timeout=200) for _ in self.processes]
        messages = [f"rank {rank}:\n{text}" for rank, text in sorted(failures) if text]
        assert not messages, "\n".join(messages)

    def close(self) -> None:
        """End the processes."""
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(timeout=60)
