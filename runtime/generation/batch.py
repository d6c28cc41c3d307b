"""Several prompts at once: rows of unequal length, padded on the right, each with an end of its own.

Knows requests, answers and stages; what a request may be is the pipeline's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import quoted_argument
from vtp.runtime.bundle.then_info import KEPT
from vtp.runtime.generation.answer import Answer
from vtp.runtime.generation.request import Request
from vtp.runtime.generation.stopping import Interrupted
from vtp.runtime.result import Timings
from vtp.runtime.stages.runner import StageRunner


def batches(requests: Sequence[Request], together: int) -> Iterator[list[int]]:
    """Which requests run together, by their places: equal numbers of pictures, at most `together` pictures
    at a time (but at least one request)."""
    groups: dict[int, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(len(request.pictures), []).append(place)
    for pictures, places in groups.items():
        size = max(1, together // max(1, pictures))
        yield from (places[first : first + size] for first in range(0, len(places), size))


def write_in_batches(runner: StageRunner, keep: int, answers: Sequence[Answer], together: int) -> None:
    """Write all answers, at most `together` pictures at a time, which are decoded when their turn comes."""
    requests = [answer.request for answer in answers]
    for places in batches(requests, together):
        for place in places:
            with about(place, len(requests)):
                requests[place].load()
        write_together(runner, keep, [answers[place] for place in places])
        for place in places:
            requests[place].pictures.release()


def write_together(runner: StageRunner, keep: int, answers: Sequence[Answer]) -> None:
    """Write the answers of one batch to their ends, which their stop signal, one for all, may bring early.

    A row that is over stays where it is, and its steps go to waste, until the last one is over too. Every
    row's timings get those of the stages, which are the whole batch's.
    """
    going = np.ones(len(answers), bool)
    try:
        _write(runner, keep, answers, going)
    except Interrupted as error:
        for row in np.flatnonzero(going).tolist():
            answers[row].interrupt(error.reason)
            answers[row].finish()


def _write(runner: StageRunner, keep: int, answers: Sequence[Answer], going: np.ndarray) -> None:
    """The same; `going` bool [B] says at any time which rows are not over."""
    check = answers[0].request.stop_signal.check
    check()
    logits = _begin(runner, keep, answers)
    while True:
        check()
        rooms = runner.rooms()
        for row in np.flatnonzero(going).tolist():
            going[row] = not answers[row].take(logits[row], int(rooms[row]))[1]
        if not going.any():
            return
        check()
        tokens = [answer.token for answer in answers]
        logits = runner.step_rows(keep, tokens, [answer.position for answer in answers], going)
        for row in np.flatnonzero(going).tolist():
            answers[row].position += 1


def _begin(runner: StageRunner, keep: int, answers: Sequence[Answer]) -> np.ndarray:
    """Run the image and prompt stages; returns the first logits [B,V]."""
    requests, timings = [answer.request for answer in answers], Timings()
    pictures = [picture for request in requests for picture in request.pictures.pixels]
    values = runner.prefill_rows(
        keep,
        pictures,
        [request.row for request in requests],
        timings,
        requests[0].stop_signal.check,
    )
    positions = values["next_position"].numpy()
    kept, later = (values[name].numpy() if name in values else None for name in ("keep_indices", KEPT))
    each = len(requests[0].pictures)
    for row, answer in enumerate(answers):
        answer.result.timings.stages.update(timings.stages)
        answer.result.timings.reused_stages = list(timings.reused_stages)
        answer.result.timings.reused_tokens = timings.reused_tokens
        own, left = (None if one is None else one[row * each : (row + 1) * each] for one in (kept, later))
        answer.begin(own, int(positions[row]), left)
    return values["logits"].numpy()[:, 0]


@contextmanager
def about(place: int, count: int) -> Iterator[None]:
    """Have errors say which prompt they are about."""
    try:
        yield
    except (UsageError, VtpError) as error:
        raise type(error)(f"prompt {place + 1} of {count}: {error}") from error


def each_prompt(count: int, make: Callable[[int], Request]) -> list[Request]:
    """Make every prompt's request; an error says which prompt it is about."""
    requests = []
    for place in range(count):
        with about(place, count):
            requests.append(make(place))
    return requests


def check_lists(images: object, prompts: object, messages: object) -> int:
    """How many prompts a batch has; UsageError unless there is one entry of `images` for each of them."""
    if (prompts is None) == (messages is None):
        raise UsageError("give either prompts or messages, exactly one of the two")
    name, asked = ("prompts", prompts) if messages is None else ("messages", messages)
    for what, given in (("images", images), (name, asked)):
        if not isinstance(given, list | tuple):
            raise UsageError(
                f"{what} must be a list with an entry for each prompt, not {quoted_argument(given)}"
            )
    assert isinstance(images, list | tuple) and isinstance(asked, list | tuple)  # by the check above
    if len(images) != len(asked):
        raise UsageError(
            f"{len(images)} images are given for {len(asked)} {name}; give one entry of images for each (a "
            "list of pictures where a prompt has several)"
        )
    return len(asked)
