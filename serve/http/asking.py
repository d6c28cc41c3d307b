"""From a question to its answer: pictures are read, a ticket is taken, the client is watched.

Shared by all endpoints, which differ only in what they read and in how they write the answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.types import Scope

from vtp.engines import UsageError
from vtp.runtime.bundle.manifest import VisualInfo
from vtp.runtime.constrained.errors import FormatError
from vtp.runtime.media.cut_off import cut_off_line
from vtp.runtime.media.pictures import NO_PICTURE, Images
from vtp.runtime.prompt.forms import forms_of, one_video
from vtp.runtime.result import Result, TokenLogprob
from vtp.runtime.scheduler import Ticket
from vtp.serve.http.errors import GONE, ApiError
from vtp.serve.http.models import Model
from vtp.serve.http.pictures.sources import Picture, read_picture
from vtp.serve.http.refusals import told
from vtp.serve.http.service import Service
from vtp.serve.http.waiting import disconnected, in_thread
from vtp.serve.shadow import Exchange
from vtp.serve.slo import Chosen

_LONGEST_TOKEN = 1024  # characters: no tokenizer has tokens of more
_SEARCHED = 1 << 22  # characters of a prompt that are searched in no time, whatever the model
_COUNTED = "vtp.counted"  # in a request's scope
_WHOLE = ("eos", "stop", "length")  # ends of answers that another bundle's can be compared with


@dataclass(frozen=True)
class PictureSource:
    """A picture as a request gives it: a URL, and the field that holds it."""

    url: str
    param: str


@dataclass(frozen=True)
class Question:
    """What is asked, whichever API it came through.

    messages  the conversation in the runtime's form, a part {"type": "image"} for each of `pictures`
    options   keyword arguments of `Pipeline.generate`
    detail    "low", "auto" or "high": the smallest, default or largest keep-count, where `options` has none
    """

    messages: list[dict[str, Any]]
    pictures: tuple[PictureSource, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    detail: str = "auto"

    @property
    def leaves_keep_open(self) -> bool:
        """Whether the server may choose how many visual tokens are kept."""
        named = [self.options.get(name) for name in ("keep_tokens", "budget_ms")]
        return named == [None, None] and self.detail == "auto"

    def options_for(self, model: Model, chosen: Chosen | None = None) -> dict[str, Any]:
        """`options` with what the model decides: a keep-count, and an answer as long as its cache allows."""
        manifest = model.manifest
        options = {"max_new_tokens": manifest.model.max_length, **self.options}
        if chosen is not None:
            options["keep_tokens"] = chosen.keep_tokens
        elif options.get("keep_tokens") is None and options.get("budget_ms") is None:
            options["keep_tokens"] = keep_of(self.detail, manifest.visual)
        return options


def keep_of(detail: str, visual: VisualInfo) -> int:
    """The keep-count of a bundle that OpenAI's `detail` stands for."""
    return {"low": min(visual.keep), "high": max(visual.keep)}.get(detail, visual.default_keep)


class Asked:
    """A question that a model has taken. Read `whole` or `pieces`, once: after that `result` is there.

    notes  what was done to the question, in words, such as "transparency flattened on white"
    sizes  (width, height) of its pictures
    chosen  the keep-count that the server chose to be in time, if it did
    """

    def __init__(
        self,
        request: Request,
        model: Model,
        ticket: Ticket,
        notes: list[str],
        sizes: list[tuple[int, int]],
        chosen: Chosen | None,
        tally: Tally,
        again: Callable[[Result], None] | None,
    ) -> None:
        """Made by `ask`."""
        self.model = model
        self.notes = notes
        self.sizes = sizes
        self.chosen = chosen
        self.result: Result | None = None
        self._request, self._ticket, self._tally, self._again = request, ticket, tally, again
        self._ping = Service.of(request).settings.ping_seconds
        self._gone = False
        self._logprobs = 0  # told so far

    async def whole(self) -> Result:
        """The whole answer. Raises ApiError; of status 499 if the client went away."""
        async for _ in self.pieces():
            pass
        assert self.result is not None  # or an error
        return self.result

    async def pieces(self) -> AsyncIterator[str | None]:
        """The answer's text as it is written; None where nothing came for `ping_seconds`. Raises ApiError."""
        seen, over = 0, False
        async with self._watched():
            while not over:
                some, over = await self._ticket.pieces_from(seen, self._ping)
                seen += len(some)
                if some:
                    self._tally.note_piece()
                    yield "".join(some)
                elif not over:
                    yield None
            self._end()

    def new_logprobs(self) -> Sequence[TokenLogprob]:
        """Those of the tokens since the last call, if the question asked for them."""
        seen, known = self._logprobs, self._ticket.logprobs
        self._logprobs = len(known)
        return known[seen : self._logprobs]

    def _end(self) -> None:
        """Take the result of a ticket that is over, or raise why there is none."""
        if self._gone:
            raise ApiError("the client went away", GONE)
        try:
            result = self._ticket.result(0)
        except Exception as error:
            raise told(error, running=True) from error
        if result.finish_reason == "cancelled":
            raise ApiError("the server is stopping, and ended this request; try again later", 503)
        self.result = result
        if self._again is not None and result.finish_reason in _WHOLE:
            self._again(result)

    @asynccontextmanager
    async def _watched(self) -> AsyncIterator[None]:
        """Within it, the request ends with its client, waiting or running; at the end it is counted."""
        watcher = asyncio.create_task(self._watch())
        status = GONE
        try:
            yield
            status = 200
        except ApiError as error:
            status = error.status
            raise
        finally:
            watcher.cancel()
            self._ticket.cancel()
            self._tally.end(status, self.result)
            if self.result is None:
                self._tally.count_left(self._ticket)
            Service.of(self._request).trimmer.note(sum(width * height for width, height in self.sizes))

    async def _watch(self) -> None:
        await disconnected(self._request)
        self._gone = True
        self._ticket.cancel()


class Tally:
    """Tells the metrics of one request: its beginning, each piece, and once its end."""

    def __init__(self, request: Request, model: str) -> None:
        self._metrics, self._model = Service.of(request).metrics, model
        request.scope[_COUNTED] = True
        self._started = self._last = time.perf_counter()
        self._pieces = 0
        self._metrics.request_started(model)

    def note_piece(self) -> None:
        """Text was sent."""
        now = time.perf_counter()
        tell = self._metrics.between_tokens if self._pieces else self._metrics.first_token
        tell(self._model, now - self._last)
        self._last = now
        self._pieces += 1

    def end(self, status: int, result: Result | None = None) -> None:
        """It is over."""
        self._metrics.finished(self._model, result, time.perf_counter() - self._started, status)

    def count_left(self, ticket: Ticket) -> None:
        """Count the tokens of a ticket that was cancelled, once its last step is over."""
        task = asyncio.create_task(self._count(ticket))
        _LEFT.add(task)
        task.add_done_callback(_LEFT.discard)

    async def _count(self, ticket: Ticket) -> None:
        with suppress(Exception):  # it failed, and was told so
            self._metrics.generated(self._model, await ticket)


def is_counted(scope: Scope) -> bool:
    """Whether a `Tally` counts a request."""
    return _COUNTED in scope


_LEFT: set[asyncio.Task[None]] = set()  # so that they are not collected before their end


async def ask(request: Request, model: Model, question: Question) -> Asked:
    """Hand a question to a model. Raises ApiError for what cannot be asked, and where no place is left."""
    service = Service.of(request)
    tally = Tally(request, model.name)
    try:
        pictures = await read_pictures(question.pictures, service)
        chosen = _choose(model, question)
        if chosen is not None:
            service.metrics.aimed(model.name, chosen.met)
        taken = await _submit(model, question, pictures, chosen)
    except ApiError as error:
        tally.end(error.status)
        raise
    except BaseException:
        tally.end(500)
        raise
    sizes = [picture.size for picture in pictures]
    told_of = [*notes_about(model, pictures), *taken.notes]
    return Asked(request, model, taken.ticket, told_of, sizes, chosen, tally, taken.again)


def notes_about(model: Model, pictures: Sequence[Picture]) -> list[str]:
    """What was done to the pictures, and how much of their sides the model does not see: each line once."""
    done = [text for picture in pictures for text in picture.notes]
    cut = [cut_off_line(model.manifest.image, *picture.size) for picture in pictures]
    return list(dict.fromkeys([*done, *(line for line in cut if line)]))


async def read_pictures(pictures: Sequence[PictureSource], service: Service) -> list[Picture]:
    """The pictures of a request. Raises ApiError for what is not one, and for too many."""
    settings = service.settings
    given, most = len(pictures), settings.media.pictures
    if given > most:
        raise ApiError(
            f"the request holds {given} pictures; at most {most} are taken", param=pictures[most].param
        )
    return [
        await read_picture(
            source.url, limits=settings.media, allowed_domains=settings.media_domains, param=source.param
        )
        for source in pictures
    ]


def _choose(model: Model, question: Question) -> Chosen | None:
    """The keep-count that is in time, where there is an aim and the request leaves the choice."""
    if model.slo is None or not question.leaves_keep_open:
        return None
    return model.slo.choose(model.scheduler.expected_wait())


async def _submit(model: Model, question: Question, pictures: list[Picture], chosen: Chosen | None) -> Taken:
    """Take a ticket, in a thread: tokenizing takes a while. Should the request end meanwhile, so does it."""
    take = partial(submit, model, question, pictures, chosen)
    return await in_thread(take, lambda taken: taken.ticket.cancel())


class Taken(NamedTuple):
    """A ticket, what was done to the turns of its question, and whom to tell of the answer."""

    ticket: Ticket
    notes: list[str]
    again: Callable[[Result], None] | None


def _again(
    model: Model, images: Any, turns: list[dict[str, Any]], options: dict[str, Any]
) -> Callable[[Result], None]:
    """Hands an answer to the model's shadow."""

    def offer(result: Result) -> None:
        assert model.shadow is not None
        model.shadow.offer(Exchange(images or [], turns, options, result))

    return offer


def _check_length(question: Question, tokens: int) -> None:
    """Refuse text that no tokens could hold, before it is searched: that would hold up all other requests."""
    contents = [turn["content"] for turn in question.messages]
    parts = [part for one in contents for part in ([{"text": one}] if isinstance(one, str) else one)]
    check_characters(sum(len(part.get("text", "")) for part in parts), tokens)


def check_characters(characters: int, tokens: int) -> None:
    """Refuse as many characters for as many tokens if those could never hold them. Raises ApiError."""
    most = max(_SEARCHED, tokens * _LONGEST_TOKEN)
    if characters > most:
        raise ApiError(
            f"the prompt has {characters} characters, more than the {most} that {tokens} tokens can hold; "
            "shorten it",
            param="messages",
            code="context_length_exceeded",
        )


def submit(model: Model, question: Question, pictures: list[Picture], chosen: Chosen | None = None) -> Taken:
    """A ticket for a question, and what had to be done to its turns so that the model's template takes them.

    Templates differ in what they take: the turns are tried as they are, then in plainer forms.
    """
    _check_length(question, model.manifest.model.max_length)
    messages, images = question.messages, [picture.image for picture in pictures]
    given: Images = images or NO_PICTURE
    if images and model.manifest.text.media == "video":
        messages = one_video(messages)
    options = question.options_for(model, chosen)
    if shadowed := model.shadow is not None and model.shadow.wants(options):
        options.setdefault("logprobs", 0)
    take = partial(model.scheduler.submit, given, **options)
    refused: UsageError | None = None
    for turns, notes in forms_of(messages):
        try:
            ticket = take(messages=turns)
            return Taken(ticket, notes, _again(model, images, turns, options) if shadowed else None)
        except FormatError as error:  # no matter which turns
            raise told(error) from error
        except UsageError as error:
            refused = refused or error
        except Exception as error:
            raise told(error) from error
    assert refused is not None  # there is at least one form
    raise told(refused) from refused
