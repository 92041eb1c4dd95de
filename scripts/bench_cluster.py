"""How well a cluster of servers is used: the scheduling is real, and servers and clock simulated.

A step asks for the same number of tasks of every server on average, and ends with the last of them.
A task takes a log-normal time. Stragglers are servers whose tasks take ten times as long, and a
request that fails does so somewhere on its way. The efficiency is the time of all tasks on servers
without faults, divided by what was there: the servers times the time of the steps. So where 5% of
the servers are stragglers, 0.955 is the most that can be reached. What the network takes is part of
a task's time. The CPU time of the scheduling itself is measured, and stands beside it.

    python scripts/bench_cluster.py --plot out/cluster.png
    python scripts/bench_cluster.py --servers 64 --tasks 1 2 4 8 16 32
"""

import argparse
import heapq
import itertools
import math
import queue
import random
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import matplotlib.pyplot as plt
from measuring import print_header, print_row

from zo_peft.engines import servers
from zo_peft.engines.servers import ServerFailure

#: Of the logarithm of a task's seconds: 2% of the tasks take twice the median.
SPREAD = 0.33

#: How many times longer the tasks of a straggler take.
SLOW = 10

#: The columns: the shares of the servers that are stragglers, and of the requests that fail.
FAULTS = {
    "no faults": (0.0, 0.0),
    "5% stragglers": (0.05, 0.0),
    "5% stragglers, 1% failures": (0.05, 0.01),
}


class Clock:
    """Stands for the clock, the threads and the queue of the scheduling, where nobody waits.

    A thread runs to its end at once, and what it puts into the queue comes out when it is due.
    """

    def __init__(self) -> None:
        self.now = self.due = 0.0
        self.events: list[tuple[float, int, Any]] = []
        self.numbers = itertools.count()

    def monotonic(self) -> float:
        """Seconds since the start."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let the thread that runs take so long."""
        self.due = self.now + seconds

    def Thread(self, target: Callable[..., None], args: Any, daemon: bool) -> Any:
        """What `start` starts."""
        return SimpleNamespace(start=lambda: target(*args))

    def __getitem__(self, _: Any) -> Callable[[], "Clock"]:
        return lambda: self

    def put(self, value: Any) -> None:
        """Called by the thread at its end."""
        heapq.heappush(self.events, (self.due, next(self.numbers), value))

    def get(self, timeout: float) -> Any:
        """The next value that comes within so many seconds, or `queue.Empty`."""
        if not self.events or self.events[0][0] > self.now + timeout:
            self.now += timeout
            raise queue.Empty
        self.now, _, value = heapq.heappop(self.events)
        return value


class Simulated:
    """A server whose median task takes so many seconds."""

    def __init__(self, number: int, seconds: float, failures: float, clock: Clock) -> None:
        self.number, self.seconds, self.failures, self.clock = number, seconds, failures, clock
        self.random = random.Random(number)

    def __str__(self) -> str:
        return f"server {self.number}"

    def work(self) -> None:
        """Take the time of a task, or fail."""
        seconds = self.seconds * self.random.lognormvariate(0, SPREAD)
        fails = self.random.random() < self.failures
        self.clock.sleep(seconds * self.random.random() if fails else seconds)
        if fails:
            raise ServerFailure("it was told to fail")


def efficiency(count: int, tasks: int, stragglers: float, failures: float, steps: int) -> float:
    """Of so many servers, with so many tasks for each of them in a step."""
    clock, slow = Clock(), round(count * stragglers)
    with patch.multiple(servers, time=clock, threading=clock, SimpleQueue=clock):
        given = [Simulated(n, SLOW if n < slow else 1.0, failures, clock) for n in range(count)]
        shared = servers.Servers(given)
        for _ in range(steps):
            shared.map([Simulated.work] * (count * tasks))
    return steps * tasks * math.exp(SPREAD**2 / 2) / clock.now


def main() -> None:
    """Print the table, and draw the plot where it is wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--servers", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--tasks", type=int, nargs="*", default=[32], help="of a step, per server")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--plot", type=Path, help="where the plot goes")
    given = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in FAULTS}
    rows = [*product(given.servers, given.tasks)]
    print_header("servers", "tasks per server and step", *FAULTS, "ms of scheduling per task")
    for count, tasks in rows:
        start = time.process_time()
        for name, faults in FAULTS.items():
            found[name].append(efficiency(count, tasks, *faults, given.steps))
        spent = (time.process_time() - start) / (len(FAULTS) * count * tasks * given.steps)
        shown = [f"{own[-1]:.2f}" for own in found.values()]
        print_row(str(count), str(tasks), *shown, f"{1000 * spent:.2f}")
    if given.plot:
        axis = 0 if len(given.servers) > 1 else 1
        figure, axes = plt.subplots(figsize=(6, 4))
        for name, own in found.items():
            axes.plot([row[axis] for row in rows], own, "o-", label=name)
        axes.set_xscale("log", base=2)
        values = sorted({row[axis] for row in rows})
        axes.set_xticks(values, map(str, values))
        axes.set(xlabel=("servers", "tasks per server and step")[axis], ylabel="efficiency")
        axes.set(ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        figure.savefig(given.plot, dpi=100)


if __name__ == "__main__":
    main()
