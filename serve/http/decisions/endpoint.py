"""The endpoint: its questions go to the model a few at a time, and the client is watched meanwhile."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vtp.runtime.decisions.decision import Decision
from vtp.runtime.media.pictures import NO_PICTURE, Images
from vtp.runtime.scheduler import DecisionTicket
from vtp.serve.http.asking import Tally, check_characters, keep_of, notes_about, read_pictures
from vtp.serve.http.decisions.request import Asking, DecisionsRequest, read_decisions
from vtp.serve.http.errors import GONE, ApiError
from vtp.serve.http.fields import read_fields
from vtp.serve.http.models import Model
from vtp.serve.http.pictures.sources import Picture
from vtp.serve.http.refusals import told
from vtp.serve.http.responses import JsonResponse
from vtp.serve.http.service import Service
from vtp.serve.http.waiting import disconnected, in_thread


async def decisions(request: Request) -> Response:
    """POST /v1/decisions. Raises ApiError."""
    service = Service.of(request)
    service.models.check_ready()
    asked = read_decisions(await read_fields(request))
    model = service.models.lookup(asked.model)
    service.note_unread(asked.unread)
    async with _counted(request, model) as tally:
        pictures = await read_pictures(asked.pictures, service)
        made = await _while_listening(request, _decide_all(model, asked, pictures, tally))
        for decision in made:
            service.metrics.decided(model.name, decision)
    return JsonResponse(_body(model, asked.questions, made, notes_about(model, pictures)))


@asynccontextmanager
async def _counted(request: Request, model: Model) -> AsyncIterator[Tally]:
    """Tell the metrics of the request's end, whatever it is."""
    tally, status = Tally(request, model.name), 500
    try:
        yield tally
        status = 200
    except ApiError as error:
        status = error.status
        raise
    except asyncio.CancelledError:
        status = GONE
        raise
    finally:
        tally.end(status)


async def _while_listening(request: Request, work: Any) -> list[Decision]:
    """What `work` gives; it is cancelled when the client goes away, and then this is an ApiError 499."""
    task, watcher = asyncio.ensure_future(work), asyncio.create_task(disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError("the client went away", GONE)
        made: list[Decision] = task.result()
        return made
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _decide_all(
    model: Model, asked: DecisionsRequest, pictures: Sequence[Picture], tally: Tally
) -> list[Decision]:
    """Every question's decision: as many at a time as the model has slots, so that others get theirs too."""
    made: list[Decision] = []
    for first in range(0, len(asked.questions), model.scheduler.slots):
        some = asked.questions[first : first + model.scheduler.slots]
        tickets: list[tuple[Asking, DecisionTicket]] = []
        try:
            for question in some:
                tickets.append((question, await _submit(model, asked, question, pictures)))
            for question, ticket in tickets:
                made.append(await _decided(question, ticket))
                if len(made) == 1:
                    tally.note_piece()
        finally:
            for _, ticket in tickets:
                ticket.cancel()
    return made


async def _submit(
    model: Model, asked: DecisionsRequest, question: Asking, pictures: Sequence[Picture]
) -> DecisionTicket:
    """Queue a question, in a thread: tokenizing takes a while. If the request ends meanwhile, so does it."""

    def submit() -> DecisionTicket:
        characters = len(asked.before) + len(question.arguments["question"])
        check_characters(characters, model.manifest.model.max_length)
        images: Images = [picture.image for picture in pictures] or NO_PICTURE
        return model.scheduler.decide(images, **asked.arguments_of(question), **_options(model, asked))

    try:
        return await in_thread(submit, DecisionTicket.cancel)
    except Exception as error:
        raise _about(question, told(error)) from error


async def _decided(question: Asking, ticket: DecisionTicket) -> Decision:
    try:
        return await ticket
    except Exception as error:
        raise _about(question, told(error, running=True)) from error


def _about(question: Asking, error: ApiError) -> ApiError:
    """The error of one question, whose field is that question where it is the conversation."""
    param = question.at if error.param == "messages" else error.param
    return ApiError(error.message, error.status, param=param, code=error.code, headers=error.headers)


def _options(model: Model, asked: DecisionsRequest) -> dict[str, Any]:
    chosen = dict(asked.options)
    if "keep_tokens" not in chosen and "budget_ms" not in chosen:
        chosen["keep_tokens"] = keep_of(asked.detail, model.manifest.visual)
    return chosen


# -- the answer ----------------------------------------------------------------------------------------------


def _body(
    model: Model, questions: Sequence[Asking], made: Sequence[Decision], notes: list[str]
) -> dict[str, Any]:
    prompt = sum(one.prompt_tokens + one.visual_tokens.after for one in made)
    cached = sum(one.timings.reused_tokens for one in made)
    before, after = made[0].visual_tokens
    return {
        "id": f"decision-{uuid.uuid4().hex}",
        "object": "decisions",
        "created": int(time.time()),
        "model": model.name,
        "answers": {asked.name: _answer(one) for asked, one in zip(questions, made, strict=True)},
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": 0,
            "total_tokens": prompt,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
        "vtp": {
            "visual_tokens": {"before": before, "after": after},
            "method": model.manifest.method.name,
            "tower": made[0].tower,
            "notes": notes,
        },
    }


def _answer(decision: Decision) -> dict[str, Any]:
    """SGLang's fields, and this project's: the most likely answer, and where the time went."""
    own: dict[str, Any] = {"choice": decision.answer} if decision.kind == "choice" else {}
    if decision.score is not None:
        own = {"score": decision.score}
    return {
        "type": decision.kind,
        "probabilities": decision.probabilities,
        "label_mass": decision.label_mass,
        **own,
        "answer": decision.answer,
        "timings": decision.timings.to_dict(),
        "reused_stages": decision.timings.reused_stages,
    }
