"""The generation loop of one answer: image and prompt stages once, then one step for each new token.

`batch.py` holds the loop of several answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vtp.engines import Value
from vtp.runtime.bundle.then_info import KEPT
from vtp.runtime.generation.answer import Answer
from vtp.runtime.generation.stopping import CANCELLED, Interrupted
from vtp.runtime.stages.runner import StageRunner


def write(runner: StageRunner, answer: Answer) -> Iterator[str]:
    """The pieces of an answer, to its end or until its stop signal ends it early."""
    try:
        yield from generate(runner, answer)
    except Interrupted as error:
        answer.interrupt(error.reason)
    if answer.request.stop_signal.cancelled:
        answer.interrupt(CANCELLED)
    elif piece := answer.finish():
        yield piece


def generate(runner: StageRunner, answer: Answer) -> Iterator[str]:
    """The loop itself: every piece but what is held back to the end.

    Raises `Interrupted` before the first stage or token for which there is no time left.
    """
    request = answer.request
    check = request.stop_signal.check
    check()
    logits = prefill(runner, answer)
    while True:
        check()
        if piece := answer.add(logits):
            yield piece
        if not answer.stopped:
            runner.check_open()  # the caller may have closed the pipeline between two pieces
        if answer.ends(runner.room()):
            return
        check()
        logits = runner.step(request.keep, answer.token, answer.position)
        answer.position += 1


def prefill(runner: StageRunner, answer: Answer, encoded: dict[str, Value] | None = None) -> np.ndarray:
    """Run the image and prompt stages; returns the first logits [V].

    encoded  what `StageRunner.encode` gave for the request's pictures; None: that is done here
    """
    request = answer.request
    pixels, check = request.pictures.pixels, request.stop_signal.check
    values = runner.prefill_rows(request.keep, pixels, [request.row], request.timings, check, encoded)
    kept, later = (values[name].numpy() if name in values else None for name in ("keep_indices", KEPT))
    answer.begin(kept, int(values["next_position"].numpy()[0]), later)
    return values["logits"].numpy()[0, 0]
