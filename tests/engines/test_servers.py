"""Tasks over servers that are slow, hang, die and come back."""

import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from zo_peft.engines.servers import NoServerLeftError, ServerFailure, Servers


class Simulated:
    """A server that notes what it was asked, and behaves as it is told."""

    def __init__(self, name: str, behaviour: Callable[[int], None] = lambda _: None) -> None:
        self.name, self.behaviour = name, behaviour
        self.asked: list[int] = []

    def __str__(self) -> str:
        return self.name

    def square(self, number: int) -> int:
        self.asked.append(number)
        self.behaviour(number)
        return number * number


def ask(numbers: range) -> list[Callable[[Simulated], int]]:
    return [lambda server, number=number: server.square(number) for number in numbers]


def fails(_: int) -> None:
    raise ServerFailure("the line is dead")


def test_results_come_in_order_and_the_tasks_are_shared() -> None:
    given = [Simulated(name, lambda n: time.sleep(0.002 * (n % 3))) for name in "abc"]
    servers = Servers(given, at_once=2, patience=100)
    assert servers.map(ask(range(30))) == [n * n for n in range(30)]
    assert Counter(n for server in given for n in server.asked) == Counter(range(30))
    assert all(server.asked for server in given)


def test_a_server_has_no_more_tasks_at_once_than_it_may() -> None:
    lock, counts = threading.Lock(), [0, 0]

    def counted(_: int) -> None:
        with lock:
            counts[0] += 1
            counts[1] = max(counts)
        time.sleep(0.005)
        with lock:
            counts[0] -= 1

    Servers([Simulated("a", counted)], at_once=3).map(ask(range(12)))
    assert counts == [0, 3]


def test_what_a_dead_server_was_asked_goes_to_others_and_it_is_left_out() -> None:
    dead, alive = Simulated("dead", fails), Simulated("alive")
    servers = Servers([dead, alive], at_once=4, pause=60)
    for _ in range(3):
        assert servers.map(ask(range(20))) == [n * n for n in range(20)]
    assert len(dead.asked) <= 4
    assert set(dead.asked) <= set(alive.asked)


def test_a_server_that_comes_back_is_used_again() -> None:
    first, second = Simulated("first", fails), Simulated("second", lambda _: time.sleep(0.01))
    servers = Servers([first, second], pause=0.02)
    servers.map(ask(range(4)))
    first.behaviour = lambda _: None
    first.asked.clear()
    assert servers.map(ask(range(30))) == [n * n for n in range(30)]
    assert len(first.asked) > 2


def test_a_straggler_is_overtaken_and_its_late_answer_is_dropped() -> None:
    hold = threading.Event()
    slow = Simulated("slow", lambda n: hold.wait() and None if n == 0 else None)
    quick = Simulated("quick")
    servers = Servers([slow, quick])
    assert servers.map(ask(range(8))) == [n * n for n in range(8)]
    assert 0 in slow.asked
    assert 0 in quick.asked
    # It still holds its task, so it gets no other one.
    asked = [*slow.asked]
    assert servers.map(ask(range(10, 13))) == [100, 121, 144]
    assert slow.asked == asked
    hold.set()
    assert servers.map(ask(range(20, 30))) == [n * n for n in range(20, 30)]


def test_a_slow_server_gets_no_task_that_others_would_end_before() -> None:
    slow = Simulated("slow", lambda _: time.sleep(0.4))
    servers = Servers([slow, Simulated("quick", lambda _: time.sleep(0.002))])
    servers.map(ask(range(4)))
    time.sleep(0.5)  # until it has answered, too late
    asked = [*slow.asked]
    assert servers.map(ask(range(10))) == [n * n for n in range(10)]
    assert slow.asked == asked
    # So many tasks keep the other busy for longer.
    servers.map(ask(range(800)))
    assert len(slow.asked) > len(asked)


def test_servers_that_never_worked_end_the_call_at_once() -> None:
    servers = Servers([Simulated("one", fails), Simulated("two", fails)])
    with pytest.raises(NoServerLeftError, match=r"none of 2 servers answers .*the line is dead"):
        servers.map(ask(range(5)))


def test_when_all_have_gone_they_are_waited_for() -> None:
    server = Simulated("only")
    servers = Servers([server], timeout=0.3, pause=0.02)
    servers.map(ask(range(2)))
    returns = time.monotonic() + 0.1

    def down(number: int) -> None:
        if time.monotonic() < returns:
            fails(number)

    server.behaviour = down
    assert servers.map(ask(range(4))) == [0, 1, 4, 9]
    server.behaviour = fails
    with pytest.raises(NoServerLeftError, match="only: the line is dead"):
        servers.map(ask(range(4)))


def test_an_error_that_no_other_server_mends_is_raised() -> None:
    def wrong(_: int) -> None:
        raise ZeroDivisionError

    given = [Simulated("a", wrong), Simulated("b", wrong)]
    servers = Servers(given)
    with pytest.raises(ZeroDivisionError):
        servers.map(ask(range(4)))
    # Attempts of that call end later, and belong to no other call.
    for server in given:
        server.behaviour = lambda _: None
    assert servers.map(ask(range(4))) == [0, 1, 4, 9]
