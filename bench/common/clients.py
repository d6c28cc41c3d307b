"""The same requests in both ways: one after the other, and from several clients at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

#: Asks request `number` of a client, and waits for its answer.
Ask = Callable[[int, int], None]


def in_turn(ask: Ask, clients: int, requests: int) -> float:
    """Ask all requests of all clients one after the other; the seconds that it took."""
    started = time.perf_counter()
    for number in range(requests):
        for client in range(clients):
            ask(client, number)
    return time.perf_counter() - started


def at_once(ask: Ask, clients: int, requests: int) -> float:
    """Every client is a thread that asks again when it has its answer; the seconds until all have theirs."""

    def client(place: int) -> None:
        for number in range(requests):
            ask(place, number)

    threads = [threading.Thread(target=client, args=(place,)) for place in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def gaps_ms(times: Sequence[float]) -> list[float]:
    """Milliseconds between moments in seconds."""
    return [(later - one) * 1e3 for one, later in pairwise(times)]
