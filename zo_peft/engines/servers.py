"""Tasks spread over servers, of which each may be slow, hang or die at any time."""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from zo_peft.errors import UserError

S = TypeVar("S")
T = TypeVar("T")

#: How many of the last tasks tell how long a task takes.
KNOWN = 256

#: Seconds between two looks at what runs, and the longest pause of a server that fails.
LOOK, LONGEST_PAUSE = 0.02, 60.0


class ServerFailure(Exception):
    """A server does not answer, or not as it should; another one may."""


class NoServerLeftError(UserError):
    """All servers have failed for too long."""


@dataclass(eq=False)
class _Server(Generic[S]):
    """A server, and what is known of it."""

    given: S
    busy: int = 0
    failures: int = 0
    failed_at: float = 0.0
    pause: float = 0.0
    reason: str = ""

    def is_free(self, now: float, at_once: int) -> bool:
        """It may get another task; after a failure and a pause, one alone."""
        if self.failures:
            return not self.busy and now - self.failed_at >= self.pause
        return self.busy < at_once


@dataclass(eq=False)
class _Call(Generic[S, T]):
    """What has become of the tasks of one call, by their indices."""

    tasks: Sequence[Callable[[S], T]]
    waiting: deque[int]
    running: dict[int, list["_Attempt"]] = field(default_factory=dict)
    results: dict[int, T] = field(default_factory=dict)


@dataclass(eq=False)
class _Attempt:
    """A task that a server was given, and in the end the result or the error."""

    call: _Call[Any, Any]
    task: int
    server: _Server[Any]
    start: float
    result: Any = None
    error: BaseException | None = None


class Servers(Generic[S]):
    """Servers that share the tasks of a call.

    A free server takes the next task. A server that fails is left out, and tried again with one
    task after a pause that doubles with each failure; its own tasks go to others. When none is
    waiting any more, a task that runs far longer than others is given to another server, too, and
    the first answer counts.

    Args:
        servers: whatever the tasks are called with; `str` gives the name in messages.
        at_once: how many tasks a server has at a time.
        timeout: seconds for which all servers may fail before a call gives up.
        pause: seconds for which a server is left out after its first failure.
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
        call = _Call[S, T](tasks, deque(range(len(tasks))))
        while len(call.results) < len(tasks):
            while (chosen := self._choose(call)) is not None:
                self._start(call, *chosen)
            try:
                attempt = self._ended.get(timeout=LOOK)
            except Empty:
                pass
            else:
                self._note(attempt)
                if attempt.call is call:
                    _settle(attempt)
            self._give_up(call)
        return [call.results[index] for index in range(len(tasks))]

    def _choose(self, call: _Call[S, T]) -> tuple[int, _Server[S]] | None:
        """A task to start now, and the server that gets it."""
        now = time.monotonic()
        free = [server for server in self._servers if server.is_free(now, self._at_once)]
        free.sort(key=lambda server: server.busy)
        if not free:
            return None
        if call.waiting:
            return call.waiting.popleft(), free[0]
        if not self._seconds:
            return None
        longest = self._patience * statistics.median(self._seconds)
        for task, attempts in call.running.items():
            others = [s for s in free if s not in [attempt.server for attempt in attempts]]
            if others and now - attempts[-1].start > longest:
                return task, others[0]
        return None

    def _start(self, call: _Call[S, T], task: int, server: _Server[S]) -> None:
        attempt = _Attempt(call, task, server, time.monotonic())
        call.running.setdefault(task, []).append(attempt)
        server.busy += 1
        # A thread that hangs must not keep the process from ending.
        threading.Thread(target=self._run, args=(attempt,), daemon=True).start()

    def _run(self, attempt: _Attempt) -> None:
        try:
            attempt.result = attempt.call.tasks[attempt.task](attempt.server.given)
        except BaseException as error:
            attempt.error = error
        self._ended.put(attempt)

    def _note(self, attempt: _Attempt) -> None:
        """What the end of an attempt, of this call or an earlier one, tells of its server."""
        server, now = attempt.server, time.monotonic()
        server.busy -= 1
        if attempt.error is None:
            server.failures, self._failing_since = 0, None
            self._seconds.append(now - attempt.start)
        # Of tasks that run at the time of a failure, the first one counts.
        elif isinstance(attempt.error, ServerFailure) and attempt.start >= server.failed_at:
            server.failures += 1
            server.pause = min(self._pause * 2 ** (server.failures - 1), LONGEST_PAUSE)
            server.failed_at, server.reason = now, str(attempt.error)

    def _give_up(self, call: _Call[S, T]) -> None:
        """Raise an error where all servers have failed for too long."""
        if not all(server.failures for server in self._servers):
            return
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        late = not self._seconds or now - self._failing_since > self._timeout
        if late and not call.running:
            reasons = {server.reason: server.given for server in self._servers}
            told = "; ".join(f"{given}: {reason}" for reason, given in [*reasons.items()][:3])
            raise NoServerLeftError(
                f"none of {len(self._servers)} servers answers ({told}); start them again, and "
                "resume the run"
            )


def _settle(attempt: _Attempt) -> None:
    """Take the result of an attempt, or let the task wait again; raise what is no failure."""
    call, task = attempt.call, attempt.task
    if task in call.results:
        return
    call.running[task].remove(attempt)
    if attempt.error is None:
        call.results[task] = attempt.result
    elif not isinstance(attempt.error, ServerFailure):
        raise attempt.error
    elif not call.running[task]:
        call.waiting.appendleft(task)
    if attempt.error is None or not call.running[task]:
        del call.running[task]
