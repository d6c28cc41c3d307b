"""What a caller holds of a request: its pieces, its result, a way to cancel it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from typing import Any

from vtp.runtime.result import Result, TokenLogprob
from vtp.runtime.scheduling.job import Job


class Ticket:
    """One request of a scheduler.

    Iterate it for the answer's pieces, in a thread (`for`) or in an event loop (`async for`): each iteration
    begins with the first piece and ends with the answer, or raises the request's error. `result()`, or
    `await ticket`, waits for the whole answer. A ticket that nobody reads holds up nothing.
    """

    def __init__(self, job: Job, withdraw: Callable[[Job], None]) -> None:
        """Made by `Scheduler.submit`."""
        self._job = job
        self._withdraw = withdraw

    @property
    def done(self) -> bool:
        """Whether the answer is over, or failed."""
        return self._job.delivery.over

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Those of the text so far, if they were asked for: the result's list while it grows.

        With each piece, those of its tokens are in it; it may be ahead of a reader by pieces not yet read.
        """
        return self._job.answer.result.logprobs or []

    def cancel(self) -> None:
        """End the request: one that waits never starts, one that runs frees its slot before the next step.

        Its result then has what there is, with finish_reason "cancelled". Nothing happens to one that is
        over. Safe from any thread.
        """
        self._job.answer.request.stop_signal.cancel()
        self._withdraw(self._job)

    def result(self, timeout: float | None = None) -> Result:
        """The whole answer, once it is over.

        timeout  seconds; TimeoutError when they have passed (the request goes on). VtpError if it failed.
        """
        if not self._job.delivery.wait(timeout=timeout):
            raise TimeoutError(f"the answer is not over after {timeout:g} s; wait longer, or cancel it")
        return self._whole()

    async def pieces_from(self, seen: int, timeout: float | None = None) -> tuple[Sequence[str], bool]:
        """All pieces from number `seen` on, as soon as there is one, and whether they are the last.

        timeout  seconds; then ([], False)

        For those who send them on: what came while they were busy comes at once. Errors are `result`'s.
        """
        await self._job.delivery.changed(seen, timeout)
        return self._job.delivery.after(seen)

    def __iter__(self) -> Iterator[str]:
        seen, delivery, over = 0, self._job.delivery, False
        while not over:
            delivery.wait(seen)
            pieces, over = delivery.after(seen)
            yield from pieces
            seen += len(pieces)
        self._whole()

    async def __aiter__(self) -> AsyncIterator[str]:
        seen, delivery, over = 0, self._job.delivery, False
        while not over:
            await delivery.changed(seen)
            pieces, over = delivery.after(seen)
            for piece in pieces:
                yield piece
            seen += len(pieces)
        self._whole()

    def __await__(self) -> Generator[Any, None, Result]:
        yield from self._job.delivery.changed().__await__()
        return self._whole()

    def _whole(self) -> Result:
        if self._job.delivery.error is not None:
            raise self._job.delivery.error
        return self._job.answer.result
