"""What a caller holds of a decision that a scheduler makes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from vtp.runtime.decisions.answer import DecisionAnswer
from vtp.runtime.decisions.decision import Decision
from vtp.runtime.scheduling.ticket import Ticket


class DecisionTicket:
    """One question of a scheduler: `result()`, or `await ticket`, waits for the decision."""

    def __init__(self, ticket: Ticket, answer: DecisionAnswer) -> None:
        """Made by `Scheduler.decide`."""
        self._ticket, self._answer = ticket, answer

    @property
    def done(self) -> bool:
        """Whether it is decided, or failed."""
        return self._ticket.done

    def cancel(self) -> None:
        """Leave it undecided, if it is not over; `result` then raises VtpError. Safe from any thread."""
        self._ticket.cancel()

    def result(self, timeout: float | None = None) -> Decision:
        """The decision. VtpError if it failed, or was cancelled or out of time before it was made.

        timeout  seconds; TimeoutError when they have passed (the request goes on)
        """
        self._ticket.result(timeout)
        return self._answer.decision

    def __await__(self) -> Generator[Any, None, Decision]:
        yield from self._ticket.__await__()
        return self._answer.decision
