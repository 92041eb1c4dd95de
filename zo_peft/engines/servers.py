"""Tasks spread over servers, of which each may be slow, hang or die at any time."""

import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from zo_peft.errors import UserError

S = TypeVar("S")
T = TypeVar("T")

#: How many of the last tasks tell how long a task takes, of all servers and of one.
KNOWN, OWN = 256, 5

#: Seconds between two looks at what runs.
LOOK = 0.02


class ServerFailure(Exception):
    """A server does not answer, or not as it should; another one may."""


class NoServerLeftError(UserError):
    """All servers have failed for too long."""


@dataclass(eq=False)
class _Server:
    """A server as it was given, and what is known of it."""

    given: Any
    busy: int = 0
    failures: int = 0
    failed_at: float = 0.0
    pause: float = 0.0
    reason: str = ""
    used_at: float = 0.0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=OWN))

    def is_free(self, now: float, at_once: int) -> bool:
        """It may get another task; after a failure and a pause, one alone."""
        if self.failures:
            return not self.busy and now - self.failed_at >= self.pause
        return self.busy < at_once

    def ends_within(self, seconds: float, since: float) -> bool:
        """It ends a task in so many seconds, for all that has been seen since then."""
        unknown = not self.seconds or self.used_at < since
        return unknown or statistics.median(self.seconds) <= seconds


@dataclass(eq=False)
class _Attempt:
    """A task of this index that a server was given, and in the end its result or error."""

    index: int
    task: Callable[[Any], Any]
    server: _Server
    start: float
    result: Any = None
    error: BaseException | None = None

    def run(self, ended: SimpleQueue["_Attempt"]) -> None:
        try:
            self.result = self.task(self.server.given)
        except BaseException as error:
            self.error = error
        ended.put(self)


class Servers(Generic[S]):
    """Servers that share the tasks of a call.

    A free server takes the next task, unless it is so slow that the others would end all that wait
    before. A server that fails is left out, and tried again with one task after a pause that
    doubles with each failure; its own tasks go to others. When none is waiting any more, a task
    that runs far longer than others is given to a second server, too, and the first answer counts.

    Args:
        servers: whatever the tasks are called with; `str` gives the name in messages.
        at_once: how many tasks a server has at a time.
        timeout: seconds for which all servers may fail before a call gives up.
        pause: seconds for which a server is left out after its first failure; at most a quarter of
            `timeout` after others.
        patience: how many times the median of the last tasks a task may take before another server
            is given it, too.
    """

    def __init__(
        self,
        servers: Sequence[S],
        at_once: int = 1,
        timeout: float = 120.0,
        pause: float = 1.0,
        patience: float = 3.0,
    ) -> None:
        self._servers = [_Server(server) for server in servers]
        self._at_once, self._timeout = at_once, timeout
        self._pause, self._patience = pause, patience
        self._ended = SimpleQueue[_Attempt]()
        self._seconds = deque[float](maxlen=KNOWN)
        self._failing_since: float | None = None

    def map(self, tasks: Sequence[Callable[[S], T]]) -> list[T]:
        """The results of all tasks, in their order.

        Each is called with a server, in a thread of its own, and maybe more than once. It raises
        `ServerFailure` where another server may answer; any other error is raised here.

        Raises:
            NoServerLeftError: all servers have failed for `timeout` seconds, or from the start.
        """
        waiting, running, results = deque(range(len(tasks))), list[_Attempt](), dict[int, T]()
        while len(results) < len(tasks):
            while (chosen := self._choose(waiting, running)) is not None:
                index, server = chosen
                running.append(attempt := _Attempt(index, tasks[index], server, time.monotonic()))
                server.busy += 1
                # A thread that hangs must not keep the process from ending.
                threading.Thread(target=attempt.run, args=(self._ended,), daemon=True).start()
            for attempt in self._look():
                # Others are late: their tasks are done, or their calls.
                if attempt not in running:
                    continue
                running.remove(attempt)
                others = [other for other in running if other.index == attempt.index]
                if attempt.error is None:
                    results[attempt.index] = attempt.result
                    running = [other for other in running if other not in others]
                elif not isinstance(attempt.error, ServerFailure):
                    raise attempt.error
                elif not others:
                    waiting.appendleft(attempt.index)
            if not running:
                self._check()
        return [results[index] for index in range(len(tasks))]

    def _choose(
        self, waiting: deque[int], running: Sequence[_Attempt]
    ) -> tuple[int, _Server] | None:
        """The index of a task to start now, and the server that gets it."""
        now = time.monotonic()
        free = [server for server in self._servers if server.is_free(now, self._at_once)]
        free.sort(key=lambda server: server.busy)
        usual = statistics.median(self._seconds) if self._seconds else 0.0
        longest = self._patience * usual
        if free and waiting:
            # A slow server would end after all others, if they will soon have nothing to do.
            left = usual * len(waiting) / (self._at_once * len(self._servers))
            within, since = max(longest, left), now - self._timeout / 4
            quick = [server for server in free if server.ends_within(within, since)]
            return (waiting.popleft(), (quick or free)[0]) if quick or not running else None
        if not free or not self._seconds:
            return None
        attempts = Counter(attempt.index for attempt in running)
        for attempt in running:
            others = [server for server in free if server is not attempt.server]
            if attempts[attempt.index] == 1 and others and now - attempt.start > longest:
                return attempt.index, others[0]
        return None

    def _look(self) -> Iterator[_Attempt]:
        """An attempt that has ended, of this call or an earlier one, if there is any soon."""
        try:
            attempt = self._ended.get(timeout=LOOK)
        except Empty:
            return
        server, now = attempt.server, time.monotonic()
        server.busy, server.used_at = server.busy - 1, now
        if attempt.error is None:
            server.failures, self._failing_since = 0, None
            self._seconds.append(now - attempt.start)
            server.seconds.append(now - attempt.start)
        # Of tasks that run at the time of a failure, the first one counts.
        elif isinstance(attempt.error, ServerFailure) and attempt.start >= server.failed_at:
            server.failures += 1
            server.pause = min(self._pause * 2 ** (server.failures - 1), self._timeout / 4)
            server.failed_at, server.reason = now, str(attempt.error)
        yield attempt

    def _check(self) -> None:
        """Raise an error where all servers have failed for too long."""
        if not all(server.failures for server in self._servers):
            return
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        if not self._seconds or now - self._failing_since > self._timeout:
            reasons = [f"{server.given}: {server.reason}" for server in self._servers]
            what = f"none of {len(reasons)} servers answers ({'; '.join(reasons[:3])})"
            raise NoServerLeftError(f"{what}; start them again, and resume the run")
