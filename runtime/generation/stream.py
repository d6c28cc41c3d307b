"""An answer as its reader sees it: piece by piece, and then as a whole."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from vtp.engines import VtpError
from vtp.runtime.generation.answer import Answer
from vtp.runtime.result import Result, TokenLogprob


class Stream:
    """The pieces of one answer, as they become certain. Iterate it once, then read `result`.

    Joined, they are the result's `raw_text`: the first may begin with the space that `text` is without.

    `pieces` must not know the stream: without such a cycle, a stream that is abandoned ends the generator,
    and with it frees the pipeline, as soon as its last reference goes.
    """

    def __init__(self, answer: Answer, pieces: Generator[str, None, None]) -> None:
        self._answer = answer
        self._pieces = pieces

    @property
    def result(self) -> Result:
        """The whole answer so far; complete once the iteration ended. VtpError before the first piece."""
        if not self._answer.begun:
            raise VtpError("this stream has not started; iterate it first")
        return self._answer.result

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Those of the text so far, if they were asked for: grows with the pieces, and is the result's."""
        return self._answer.result.logprobs or []

    def cancel(self) -> None:
        """End the answer before the next stage or token; safe from another thread.

        No further piece comes, and `result` holds what there is.
        """
        self._answer.request.stop_signal.cancel()

    def close(self) -> None:
        """Give the pipeline back without finishing."""
        self._pieces.close()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)
