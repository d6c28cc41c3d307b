"""Reading a scheduler's answers: threads and event loops, slow readers, readers that go away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image

from vtp.engines import VtpError
from vtp.runtime import Pipeline
from vtp.runtime.scheduler import Scheduler
from vtp.runtime.scheduling.delivery import Delivery
from vtp.runtime.stages.runner import StageRunner

PICTURE = Image.new("RGB", (60, 60), "green")


@pytest.fixture(scope="module")
def pipe(exported: Callable[[str], Any]) -> Iterator[Pipeline]:
    """No answer ends before its length does."""
    with Pipeline.load(exported("vispruner").folder, threads=1) as pipeline:
        pipeline.manifest.text.__dict__["eos_token_ids"] = ()
        yield pipeline


def test_pieces_are_the_text(pipe: Pipeline) -> None:
    """Also for those who come when it is over, and twice."""
    wanted = pipe.generate(PICTURE, "how many ?", max_new_tokens=25)
    with Scheduler(pipe, slots=2) as scheduler:
        ticket = scheduler.submit(PICTURE, "how many ?", max_new_tokens=25)
        pieces = list(ticket)
        assert len(pieces) > 1 and "".join(pieces) == wanted.raw_text
        assert list(ticket) == pieces and ticket.done
        result = ticket.result()
    assert (result.raw_text, result.token_ids) == (wanted.raw_text, wanted.token_ids)
    assert 0 < result.timings.ttft <= result.timings.total


def test_many_threads_submit_and_read(pipe: Pipeline) -> None:
    prompts = [f"how many {'red ' * count}?" for count in range(12)]
    wanted = [pipe.generate(PICTURE, prompt, max_new_tokens=15).raw_text for prompt in prompts]
    found: dict[int, str] = {}
    with Scheduler(pipe, slots=4) as scheduler:

        def client(place: int) -> None:
            found[place] = "".join(scheduler.submit(PICTURE, prompts[place], max_new_tokens=15))

        threads = [threading.Thread(target=client, args=(place,)) for place in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [found[place] for place in range(12)] == wanted


def test_an_event_loop_reads_several(pipe: Pipeline) -> None:
    wanted = [pipe.generate(PICTURE, "how ?", max_new_tokens=count).raw_text for count in (20, 5, 12)]

    async def read(scheduler: Scheduler, count: int) -> str:
        return "".join([piece async for piece in scheduler.submit(PICTURE, "how ?", max_new_tokens=count)])

    async def run() -> list[str]:
        with Scheduler(pipe, slots=2) as scheduler:
            texts = list(await asyncio.gather(*(read(scheduler, count) for count in (20, 5, 12))))
            whole = await scheduler.submit(PICTURE, "how ?", max_new_tokens=20)
            return [*texts, whole.raw_text]

    assert asyncio.run(run()) == [*wanted, wanted[0]]


def test_an_event_loop_gets_errors_and_cancels(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(scheduler: Scheduler) -> str:
        ticket = scheduler.submit(PICTURE, "how ?", max_new_tokens=80)
        async for _ in ticket:
            ticket.cancel()
        with monkeypatch.context() as patch:
            patch.setattr(StageRunner, "prefill_rows", lambda *_: 1 / 0)
            with pytest.raises(VtpError, match="this request failed: ZeroDivisionError"):
                await scheduler.submit(PICTURE, "how ?")
        return (await ticket).finish_reason

    with Scheduler(pipe, slots=2) as scheduler:
        assert asyncio.run(run(scheduler)) == "cancelled"


def test_a_reader_that_goes_away_holds_up_nobody(pipe: Pipeline) -> None:
    """A loop that is closed in the middle, a task that is cancelled, a ticket that is never read."""

    async def leaves(scheduler: Scheduler) -> None:
        ticket = scheduler.submit(PICTURE, "how ?", max_new_tokens=60)
        task = asyncio.ensure_future(anext(aiter(ticket)))
        await asyncio.sleep(0)
        task.cancel()
        left = asyncio.ensure_future(_read(scheduler.submit(PICTURE, "how ?", max_new_tokens=60)))
        await asyncio.sleep(0)
        assert not left.done()

    async def _read(ticket: Any) -> None:
        await ticket

    with Scheduler(pipe, slots=2) as scheduler:
        scheduler.submit(PICTURE, "how ?", max_new_tokens=60)
        asyncio.run(leaves(scheduler))
        assert len(scheduler.submit(PICTURE, "how ?", max_new_tokens=9).result(60).token_ids) == 9


def test_result_in_time_or_not() -> None:
    delivery = Delivery()
    assert not delivery.wait(timeout=0)
    delivery.put("a")
    assert delivery.wait(0) and not delivery.wait(1, timeout=0) and delivery.after(0) == (["a"], False)
    delivery.end(VtpError("one"))
    delivery.end(VtpError("two"))
    assert delivery.wait() and delivery.after(1) == ([], True) and str(delivery.error) == "one"


def test_a_timeout_leaves_the_request_running(pipe: Pipeline) -> None:
    with Scheduler(pipe, slots=1) as scheduler:
        ticket = scheduler.submit(PICTURE, "how ?", max_new_tokens=90)
        with pytest.raises(TimeoutError, match="not over after 0 s"):
            ticket.result(0)
        assert len(ticket.result(60).token_ids) == 90


# -- all that came at once -----------------------------------------------------------------------------------


def test_pieces_that_wait_come_together(pipe: Pipeline) -> None:
    """Everything from a number on, at once; then that it is over, as often as one asks."""
    wanted = pipe.generate(PICTURE, "how many ?", max_new_tokens=25)
    with Scheduler(pipe, slots=2) as scheduler:
        ticket = scheduler.submit(PICTURE, "how many ?", max_new_tokens=25)

        async def read() -> str:
            text, seen, over = "", 0, False
            while not over:
                pieces, over = await ticket.pieces_from(seen)
                assert pieces or over
                text, seen = text + "".join(pieces), seen + len(pieces)
            assert await ticket.pieces_from(seen) == ([], True)
            assert await ticket.pieces_from(seen, timeout=0) == ([], True)
            whole, over = await ticket.pieces_from(0)
            assert over and "".join(whole) == text
            return text

        assert asyncio.run(read()) == wanted.raw_text


def test_a_wait_for_pieces_has_an_end() -> None:
    """Nothing is left behind of it, and a later one gets what came meanwhile."""
    delivery = Delivery()

    async def wait() -> None:
        for timeout in (0, 0.01):
            assert await delivery.changed(0, timeout) is False
        assert delivery._futures == []
        later = asyncio.create_task(delivery.changed(0, 60))
        await asyncio.sleep(0.01)
        delivery.put("a")
        assert await later is True and await delivery.changed(0, 0) is True
        gone = asyncio.create_task(delivery.changed(1, 60))
        await asyncio.sleep(0.01)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert delivery._futures == []

    asyncio.run(wait())


def test_a_scheduler_is_cancelled_without_a_wait(pipe: Pipeline) -> None:
    with Scheduler(pipe, slots=1) as scheduler:
        tickets = [scheduler.submit(PICTURE, "how many ?", max_new_tokens=100) for _ in range(3)]
        scheduler.cancel()
        assert {ticket.result(60).finish_reason for ticket in tickets[1:]} == {"cancelled"}
        assert tickets[0].result(60).finish_reason in ("cancelled", "length")
        with pytest.raises(VtpError, match="this scheduler is closed"):
            scheduler.submit(PICTURE, "how many ?")
