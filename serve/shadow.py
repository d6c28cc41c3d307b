"""What pruning costs on a user's own traffic: a share of the requests is answered again by another bundle.

The second answer, usually the unpruned bundle's, is made while nobody waits, and is compared with the first:
whether they agree, at which token they part, and how differently sure the two models were. Disagreements go
into a JSONL file that vtp-calib reads.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from vtp.engines import VtpError
from vtp.engines.disk.whole import whole_file
from vtp.engines.errors import shown
from vtp.runtime.media.images import ImageSource, load_image
from vtp.runtime.media.pictures import NO_PICTURE, Images
from vtp.runtime.result import Result
from vtp.runtime.scheduler import QueueFull, Scheduler, Ticket
from vtp.serve.counts import Histogram, head, line
from vtp.serve.logs import Sparing

log = logging.getLogger("vtp.serve.shadow")
log.addFilter(Sparing())

_WAITING = 16  # exchanges that wait for an idle moment; the oldest goes when another comes
_TRIES = 5  # an answer that requests interrupted so often is given up
_POLL = 0.02  # seconds between two looks at whether the server is idle
_LARGEST_LOG = 64 << 20  # bytes of the file of disagreements
_LARGEST_PICTURES = 4 << 30  # bytes of the folder of their pictures: one of noise is 100 MB as PNG
_ANSWERS = "vtp_shadow_answers_total"
_PARTED = "vtp_shadow_first_difference_tokens"
_DRIFT = "vtp_shadow_logprob_difference"
_OUTCOMES = ("agreed", "differed", "skipped", "failed")
_TOKENS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
_NATS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)


@dataclass(frozen=True)
class Exchange:
    """A request that was answered.

    images    as they went to the model
    messages  the conversation in the runtime's form
    options   keyword arguments of the generation, `logprobs` among them
    result    the answer
    """

    images: Sequence[ImageSource]
    messages: list[dict[str, Any]]
    options: Mapping[str, Any]
    result: Result

    @property
    def prompt(self) -> str:
        """The words of the last user turn."""
        content = next(turn["content"] for turn in reversed(self.messages) if turn["role"] == "user")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return " ".join(part["text"] for part in parts if part["type"] == "text")


@dataclass(frozen=True)
class Files:
    """Where disagreements go.

    log       JSONL, appended to; readable by its owner alone, for it holds what users asked
    pictures  a folder for the pictures, as PNG; None: only their hashes are kept
    """

    log: Path
    pictures: Path | None = None


class Shadow:
    """Answers a share of a model's requests again, in a thread of its own. Safe from any thread.

    idle   whether nobody waits for an answer of the server; looked at again while the second answer is made
    rate   share of the requests, 0 to 1
    """

    def __init__(
        self,
        scheduler: Scheduler,
        idle: Callable[[], bool],
        rate: float,
        files: Files,
        seed: int | None = None,
    ) -> None:
        """Takes over `scheduler`, of the other bundle, until `close`."""
        self._scheduler, self._idle, self._rate, self._files = scheduler, idle, rate, files
        self._random = random.Random(seed)
        self._waiting: deque[Exchange] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._outcomes = dict.fromkeys(_OUTCOMES, 0)
        self._parted, self._drift = Histogram(_TOKENS), Histogram(_NATS)
        self._thread = threading.Thread(target=self._work, name="vtp-shadow", daemon=True)
        self._thread.start()

    def wants(self, options: Mapping[str, Any]) -> bool:
        """Whether a request shall be answered again: chosen by lot, among those that do not sample."""
        return not options.get("temperature") and self._random.random() < self._rate

    def offer(self, exchange: Exchange) -> None:
        """Hand over an exchange; it waits for an idle moment."""
        with self._changed:
            if len(self._waiting) == _WAITING:
                self._waiting.popleft()
                self._outcomes["skipped"] += 1
            self._waiting.append(exchange)
            self._changed.notify()

    def close(self) -> None:
        """End the second answer under way, and close the other bundle."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._scheduler.close(drain=False)

    def lines(self, model: str) -> Iterator[str]:
        """Metrics in Prometheus' text format."""
        labels = (("model", model),)
        with self._changed:
            yield from head(_ANSWERS, "counter", "Requests that were answered again, by what came of it.")
            for outcome, count in self._outcomes.items():
                yield line(_ANSWERS, (*labels, ("outcome", outcome)), count)
            yield from head(_PARTED, "histogram", "Tokens before the first that differs.")
            yield from self._parted.lines(_PARTED, labels)
            yield from head(_DRIFT, "histogram", "Difference of the mean log-probabilities, nats a token.")
            yield from self._drift.lines(_DRIFT, labels)

    # -- the thread ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (exchange := self._next()) is not None:
            try:
                outcome = self._compared(exchange)
            except (
                Exception
            ) as error:  # a full disk, or a prompt beyond the other bundle: no affair of clients'
                outcome = "failed"
                log.warning("a request was not compared: %s", _reason(error))
            with self._changed:
                self._outcomes[outcome] += 1

    def _next(self) -> Exchange | None:
        """The next exchange, in an idle moment; None: closed."""
        with self._changed:
            while not self._closed and not (self._waiting and self._idle()):
                self._changed.wait(_POLL if self._waiting else None)
            return None if self._closed else self._waiting.popleft()

    def _compared(self, exchange: Exchange) -> str:
        again = self._again(exchange)
        if again is None:
            return "skipped"
        parted = first_difference(exchange.result.token_ids, again.token_ids)
        with self._changed:
            self._drift.add(abs(mean_logprob(exchange.result) - mean_logprob(again)))
            if parted is not None:
                self._parted.add(parted)
        if exchange.result.text.strip() == again.text.strip():
            return "agreed"
        self._write(exchange, again, parted)
        return "differed"

    def _again(self, exchange: Exchange) -> Result | None:
        """The other bundle's answer; None where requests came in the way too often, or at the end."""
        options = {
            name: value
            for name, value in exchange.options.items()
            if name not in ("keep_tokens", "budget_ms")
        }
        images: Images = list(exchange.images) or NO_PICTURE
        for _ in range(_TRIES):
            with suppress(QueueFull):  # one that was cancelled has not left its slot yet
                ticket = self._scheduler.submit(images, messages=exchange.messages, **options)
                if self._undisturbed(ticket):
                    return ticket.result()
            time.sleep(_POLL)
            while not (self._closed or self._idle()):
                time.sleep(_POLL)
            if self._closed:
                return None
        return None

    def _undisturbed(self, ticket: Ticket) -> bool:
        """Wait for an answer; cancelled, and False, once somebody else waits for one."""
        while not ticket.done:
            if self._closed or not self._idle():
                ticket.cancel()
                return False
            time.sleep(_POLL)
        return True

    def _write(self, exchange: Exchange, again: Result, parted: int | None) -> None:
        """Append a disagreement; what does not fit any more is only counted."""
        rows = self._files.log
        if rows.exists() and rows.stat().st_size >= _LARGEST_LOG:
            return
        images = [load_image(image) for image in exchange.images]
        hashes = [picture_hash(image) for image in images]
        row = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "image": self._keep(images, hashes),
            "image_sha256": hashes,
            "prompt": exchange.prompt,
            "answer": again.text.strip(),
            "served": exchange.result.text.strip(),
            "first_difference": parted,
            "visual_tokens": exchange.result.visual_tokens._asdict(),
            "logprob": [round(mean_logprob(one), 6) for one in (exchange.result, again)],
        }
        append(rows, json.dumps(row).encode() + b"\n")

    def _keep(self, images: Sequence[Image.Image], hashes: Sequence[str]) -> str | None:
        """Save the pictures if they shall be; the path of a single one, as vtp-calib reads it."""
        folder = self._files.pictures
        if folder is None:
            return None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if sum(file.stat().st_size for file in folder.iterdir()) >= _LARGEST_PICTURES:
            return None
        paths = [folder / f"{name}.png" for name in hashes]
        for image, path in zip(images, paths, strict=True):
            if not path.exists():
                with whole_file(path) as beside:
                    image.save(beside, "png")
        return os.path.relpath(paths[0], self._files.log.parent) if len(paths) == 1 else None


def append(path: Path, data: bytes) -> None:
    """Add a line to a file, readable by its owner alone; wholly, or on a full disk not at all. OSError."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(file).st_size
        if (written := os.write(file, data)) < len(data):
            os.ftruncate(file, size)
            raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes could be written")
    finally:
        os.close(file)


def _reason(error: Exception) -> str:
    """In a few words: of a library's own text nothing but an error of the system."""
    if isinstance(error, OSError):
        return f"a file could not be written: {error.strerror}"
    return shown(error) if isinstance(error, VtpError) else type(error).__name__


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Tokens before the first that differs; None: none does."""
    return next((place for place, (a, b) in enumerate(zip_longest(one, other)) if a != b), None)


def mean_logprob(result: Result) -> float:
    """Mean natural log-probability of an answer's tokens; 0 for an empty answer."""
    known = result.logprobs or []
    return sum(token.logprob for token in known) / len(known) if known else 0.0


def picture_hash(image: Image.Image) -> str:
    """sha256 of size and RGB pixels: the same for a picture in any file format that loses nothing."""
    head = f"{image.width}x{image.height}:".encode()
    return hashlib.sha256(head + image.convert("RGB").tobytes()).hexdigest()
