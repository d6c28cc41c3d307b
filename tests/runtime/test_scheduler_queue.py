"""A scheduler's queue and its end: who waits, who is refused, who is cancelled, what closing does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.runtime import Pipeline
from vtp.runtime.scheduler import Closed, QueueFull, Scheduler
from vtp.runtime.scheduling.job import Job

from ..stand_ins.prompt_gate import Gate

PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    for seed in range(2)
]


# -- the queue -----------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_back(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Scheduler(pipe, slots=1, queue=2) as scheduler:
        tickets = [scheduler.submit(PICTURES[0], "how ?", max_new_tokens=3)]
        assert gate.entered.acquire(timeout=60)
        tickets += [scheduler.submit(PICTURES[0], "how ?", max_new_tokens=3) for _ in range(2)]
        with pytest.raises(QueueFull, match=r"1 requests run and 2 wait .* try again in about") as caught:
            scheduler.submit(PICTURES[0], "how ?", max_new_tokens=3)
        assert caught.value.retry_after > 0 and isinstance(caught.value, VtpError)
        assert (scheduler.stats().running, scheduler.stats().waiting) == (1, 2)
        tickets[1].cancel()  # its place is free at once
        assert tickets[1].done and tickets[1].result(0).finish_reason == "cancelled"
        tickets.append(scheduler.submit(PICTURES[0], "how ?", max_new_tokens=3))
        gate.open()
        assert [len(tickets[place].result(60).token_ids) > 0 for place in (0, 2, 3)] == [True] * 3
        assert tickets[1].result(0).token_ids == [] and "queue" in tickets[1].result(0).timings.stages


def test_cancelled_while_it_is_read(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends before its next stage, and the slot serves the next."""
    gate = Gate(monkeypatch)
    with Scheduler(pipe, slots=1) as scheduler:
        first = scheduler.submit(PICTURES[0], "how ?", max_new_tokens=30)
        assert gate.entered.acquire(timeout=60)
        second = scheduler.submit(PICTURES[0], "how ?", max_new_tokens=3)
        first.cancel()
        gate.open()
        assert (first.result(60).finish_reason, first.result(60).token_ids) == ("cancelled", [])
        assert second.result(60).token_ids
        assert "vision_encoder" not in first.result(60).timings.stages
        first.cancel()  # nothing happens any more
        assert scheduler.stats().cancelled == 1


def test_time_counts_from_submit(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Scheduler(pipe, slots=1) as scheduler:
        first = scheduler.submit(PICTURES[0], "how ?", max_new_tokens=3)
        assert gate.entered.acquire(timeout=60)
        late = scheduler.submit(PICTURES[0], "how ?", timeout_ms=1)
        while late._job.stop_reason is None:
            threading.Event().wait(0.001)
        gate.open()
        assert first.result(60).token_ids
        result = late.result(60)
        assert (result.finish_reason, result.token_ids) == ("timeout", [])
        assert result.timings.stages["queue"] >= 1 and scheduler.stats().timed_out == 1


def test_first_come_first_served(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Job] = []
    start = Job.start
    monkeypatch.setattr(Job, "start", lambda job: (started.append(job), start(job)))
    with Scheduler(pipe, slots=1) as scheduler:
        tickets = [scheduler.submit(PICTURES[0], "how ?", max_new_tokens=2) for _ in range(6)]
        assert all(ticket.result(60).timings.stages["queue"] >= 0 for ticket in tickets)
    assert started == [ticket._job for ticket in tickets]


# -- closing -------------------------------------------------------------------------------------------------


def test_close_drains(pipe: Pipeline) -> None:
    scheduler = Scheduler(pipe, slots=2)
    tickets = [scheduler.submit(PICTURES[0], "how ?", max_new_tokens=8) for _ in range(5)]
    with pytest.raises(VtpError, match="this pipeline is busy"):
        pipe.generate(PICTURES[0], "how ?")
    scheduler.close()
    assert all(ticket.done and ticket.result(0).finish_reason != "cancelled" for ticket in tickets)
    with pytest.raises(Closed, match="this scheduler is closed"):
        scheduler.submit(PICTURES[0], "how ?")
    scheduler.close()
    assert pipe.generate(PICTURES[0], "how ?", max_new_tokens=1).token_ids


def test_close_cancels(endless: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    scheduler = Scheduler(endless, slots=1)
    tickets = [scheduler.submit(PICTURES[0], "how ?", max_new_tokens=80) for _ in range(4)]
    assert gate.entered.acquire(timeout=60)
    closing = threading.Thread(target=scheduler.close, args=(False,))
    closing.start()
    while not tickets[0]._job.answer.request.stop_signal.cancelled:
        threading.Event().wait(0.001)
    gate.open()
    closing.join(60)
    assert not closing.is_alive()
    assert [ticket.result(0).finish_reason for ticket in tickets] == ["cancelled"] * 4


def test_a_forgotten_scheduler_gives_the_pipeline_back(endless: Pipeline) -> None:
    """A ticket keeps it; when the last is gone, so is the worker."""
    ticket = Scheduler(endless, slots=2).submit(PICTURES[0], "how ?", max_new_tokens=40)
    assert len(ticket.result(60).token_ids) == 40
    worker = next(thread for thread in threading.enumerate() if thread.name == "vtp-scheduler")
    del ticket
    worker.join(60)
    assert endless.generate(PICTURES[0], "how ?", max_new_tokens=1).token_ids


def test_load_owns_its_pipeline(exported: Callable[[str], Any]) -> None:
    folder = exported("vispruner").folder
    with Scheduler.load(folder, engine="ort-cpu", threads=1, slots=2, queue=3) as scheduler:
        assert scheduler.submit(image=PICTURES[0], prompt="how ?", max_new_tokens=2).result(60).token_ids
        assert (scheduler.stats().slots, scheduler.stats().queue) == (2, 3)
    with pytest.raises(VtpError, match="closed"):
        scheduler.pipeline.generate(PICTURES[0], "how ?")
    with pytest.raises(UsageError, match="slots 0"):
        Scheduler.load(folder, slots=0)
