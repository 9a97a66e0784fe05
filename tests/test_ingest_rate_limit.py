"""Laws of the limits per host: not too many at once, not too fast, and no host blocks another."""

import math
import random
import threading

import pytest

from ingest.fetching.rate_limit import HostLimits, RowQueue


class Clock:
    """A clock that moves on demand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_connections_are_limited_and_given_back():
    limits = HostLimits(2, 0)
    assert [limits.try_acquire("a") for _ in range(3)] == [0, 0, math.inf]
    assert limits.try_acquire("b") == 0
    limits.release("a")
    assert limits.try_acquire("a") == 0


@pytest.mark.parametrize("rate", [0.5, 3.0, 20.0])
def test_no_window_sees_more_requests_than_the_rate_and_one_burst(rate: float):
    clock, sent = Clock(), []
    limits = HostLimits(10_000, rate, clock=clock)
    draw = random.Random(0)
    for _ in range(3000):
        clock.now += draw.expovariate(10 * rate)
        if limits.try_acquire("a") == 0:
            sent.append(clock.now)
    burst = max(1.0, rate)
    for i, start in enumerate(sent):
        for count, end in enumerate(sent[i : i + 50], start=1):
            assert count <= burst + rate * (end - start) + 1e-6
    assert len(sent) > 0.9 * rate * (sent[-1] - sent[0]), "and it is used up"


def test_the_wait_that_is_returned_is_enough():
    clock = Clock()
    limits = HostLimits(10, 2.0, clock=clock)
    assert [limits.try_acquire("a") for _ in range(2)] == [0, 0]
    clock.now += limits.try_acquire("a")
    assert limits.try_acquire("a") == 0


def test_changed_limits_hold_from_then_on_and_nothing_is_forgotten():
    clock = Clock()
    limits = HostLimits(3, 8.0, clock=clock)
    assert [limits.try_acquire("a") for _ in range(3)] == [0, 0, 0]
    limits.pause("b", 30)
    limits.change(1, 1.0)
    for _ in range(2):
        limits.release("a")
        assert limits.try_acquire("a") == math.inf, "what was open counts on"
    limits.release("a")
    assert limits.try_acquire("a") == 0 and limits.try_acquire("b") == 30
    limits.release("a")
    assert limits.try_acquire("a") == 1, "the five of the larger bucket are no burst of this one"


def test_a_paused_host_is_left_alone():
    clock = Clock()
    limits = HostLimits(10, 0, clock=clock)
    limits.pause("a", 30)
    assert limits.try_acquire("a") == 30 and limits.try_acquire("b") == 0
    clock.now += 30
    assert limits.try_acquire("a") == 0


def test_a_busy_host_does_not_hold_up_another():
    queue = RowQueue([(0, "slow"), (1, "slow"), (2, "slow"), (3, "fast")], HostLimits(1, 0))
    first, second = queue.take(), queue.take()
    assert first is not None and second is not None
    assert (first.host, second.host) == ("slow", "fast")


def test_hosts_take_turns():
    rows = [(i, host) for i, host in enumerate("aaaabbbbcccc")]
    queue, seen = RowQueue(rows, HostLimits(10, 0)), []
    while (item := queue.take()) is not None:
        seen.append(item.host)
        queue.done(item)
    assert "".join(seen) == "abcabcabcabc"


def test_every_row_is_dealt_once_and_again_when_asked_for():
    """Twelve threads; each row needs one to four tries."""
    wanted = {row: 1 + row % 4 for row in range(400)}
    limits = HostLimits(3, 0)
    queue = RowQueue(((row, f"host{row % 5}") for row in wanted), limits)
    tries, open_now, most, lock = dict.fromkeys(wanted, 0), {}, 0, threading.Lock()

    def work() -> None:
        nonlocal most
        while (item := queue.take()) is not None:
            with lock:
                assert item.number == tries[item.row]
                tries[item.row] += 1
                open_now[item.host] = open_now.get(item.host, 0) + 1
                most = max(most, *open_now.values())
                again = tries[item.row] < wanted[item.row]
            with lock:
                open_now[item.host] -= 1
            queue.done(item, again_after=0.001 if again else None)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert tries == wanted and most <= 3


def test_a_drained_queue_lets_its_threads_go():
    queue = RowQueue(((row, "a") for row in range(10)), HostLimits(1, 0))
    held, ended = queue.take(), threading.Event()
    waiting = threading.Thread(target=lambda: (queue.take(), ended.set()))
    waiting.start()
    assert held is not None and not ended.is_set()
    queue.drain()
    queue.done(held, again_after=0.0)
    assert ended.wait(10) and queue.take() is None
    waiting.join()


def test_an_empty_queue_ends():
    assert RowQueue([], HostLimits(1, 1)).take() is None
