"""Many requests at once: continuous batching over the slots of one cache, for threads and for asyncio."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vtp.engines import AUTO
from vtp.runtime.decisions.question import Question
from vtp.runtime.generation.answer import Answer
from vtp.runtime.generation.arguments import whole
from vtp.runtime.generation.options import GenerateOptions, OptionKeywords, takes_options
from vtp.runtime.media.pictures import Images
from vtp.runtime.pipeline import Pipeline
from vtp.runtime.prompt.messages import Messages
from vtp.runtime.scheduling.decision_ticket import DecisionTicket
from vtp.runtime.scheduling.job import Job
from vtp.runtime.scheduling.loader import Loader
from vtp.runtime.scheduling.queue import Closed, Queue, QueueFull
from vtp.runtime.scheduling.rows import Rows
from vtp.runtime.scheduling.sharing import slot_count, why_in_turn
from vtp.runtime.scheduling.stats import SchedulerStats
from vtp.runtime.scheduling.ticket import Ticket
from vtp.runtime.scheduling.worker import Worker
from vtp.runtime.stages.slots import Slots

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's own from Python 3.11 on

__all__ = ["Closed", "DecisionTicket", "QueueFull", "Scheduler", "SchedulerStats", "Ticket"]

# The largest bound of `slots` where requests are answered in turn, and it stands for nothing.
_ANY = 2**16


class Scheduler:
    """Answers the requests of many callers from one pipeline, several at a time.

    A request's pictures and prompt are read by themselves, between the steps of the others; then one step
    gives every request in a slot its next token. Requests join and leave between steps, first come first
    served. Greedy answers, and those of a seed, are `Pipeline.generate`'s of the same request alone.

    All methods are safe from any thread. A context manager: leaving it answers what was submitted, or
    cancels it if an exception passes.
    """

    def __init__(self, pipeline: Pipeline, slots: int = 4, queue: int = 64) -> None:
        """Take over a pipeline until `close`; its caches (vision features, prefixes) serve all requests.

        slots  requests that decode together: each takes a cache of the full length (`cache_bytes`). At most
               what the bundle's graphs take together (8). Where requests are answered in turn (see
               `in_turn`), one
        queue  requests that may wait beyond those

        Raises UsageError for numbers out of range, VtpError for a pipeline that is busy or closed.
        """
        self._owned: Pipeline | None = None
        self._pipeline = pipeline
        capacity = whole("queue", queue, least=0)
        with ExitStack() as stack:
            runner = stack.enter_context(pipeline.claimed())
            self._in_turn = why_in_turn(pipeline.manifest, pipeline.engine, runner)
            count = slot_count(slots, _ANY if self._in_turn else runner.rows_together)
            self._slots = Slots(runner, 1 if self._in_turn else count)
            stack.callback(self._slots.close)
            loader = Loader()
            stack.callback(loader.close)
            self._queue = Queue(self._slots.count, capacity, loader)
            keep = None if self._in_turn else pipeline.manifest.visual.default_keep
            rows = Rows(self._slots, self._queue, keep)
            self._worker = Worker(self._queue, rows, stack.pop_all())
        self._making = threading.Lock()
        # At the interpreter's end, too: a thread inside the engine must not outlive it.
        weakref.finalize(self, _end, self._queue, self._worker)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        engine: str = AUTO,
        threads: int | None = None,
        slots: int = 4,
        queue: int = 64,
        **options: Any,
    ) -> Scheduler:
        """Open a bundle folder for many requests; `options` are further ones of `Pipeline.load`."""
        pipeline = Pipeline.load(bundle, engine, threads, **options)
        with ExitStack() as stack:
            stack.callback(pipeline.close)
            scheduler = cls(pipeline, slots, queue)
            scheduler._owned = pipeline
            stack.pop_all()
        return scheduler

    @takes_options
    def submit(
        self,
        image: Images,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[OptionKeywords],
    ) -> Ticket:
        """Queue a request, with the arguments of `Pipeline.generate`; returns at once.

        The picture is decoded when its turn comes: leave files and arrays as they are until then.
        `timeout_ms` counts from this call on, and the result's timings have the wait as stage "queue".

        Raises UsageError and VtpError as `generate` does, `QueueFull` (with `retry_after` in seconds) where
        no place is left, `Closed` after `close`.
        """
        self._queue.check_open()
        how = GenerateOptions(**options)
        self._pipeline.prepare_format(how)  # nobody else waits for a schema that takes long to compile
        with self._making:  # tokenizer and template serve one thread at a time
            answer = self._pipeline.prepare(image, prompt, messages, how)
        return self._add(answer)

    def decide(
        self,
        image: Images,
        question: str,
        options: Sequence[str] | Mapping[str, str] | None = None,
        *,
        kind: str | None = None,
        labels: str = "letters",
        temperature: float = 1.0,
        keep_tokens: int | None = None,
        budget_ms: float | None = None,
        allow_special_tokens: bool = False,
        timeout_ms: float | None = None,
        color: str = "rgb",
    ) -> DecisionTicket:
        """Queue a question, with the arguments of `Pipeline.decide`; returns at once, and raises as `submit`.

        It takes no step: its slot is free again as soon as its prompt was read. Several questions about the
        same pictures share the encoder's work if the pipeline has a vision feature cache.
        """
        self._queue.check_open()
        asked = Question.of(question, options, kind, labels)
        how = GenerateOptions(
            max_new_tokens=1,
            keep_tokens=keep_tokens,
            budget_ms=budget_ms,
            allow_special_tokens=allow_special_tokens,
            timeout_ms=timeout_ms,
            color=color,
        )
        with self._making:
            answer = self._pipeline.prepare_decision(image, asked, how, temperature)
        return DecisionTicket(self._add(answer), answer)

    def _add(self, answer: Answer) -> Ticket:
        job = Job(answer)
        self._queue.add(job)
        return Ticket(job, self._withdraw)

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline that answers; it is busy until `close`."""
        return self._pipeline

    @property
    def in_turn(self) -> str | None:
        """Why requests of this bundle are answered one after the other; None: they share steps."""
        return self._in_turn

    @property
    def slots(self) -> int:
        """Requests that decode together: 1 where they are answered in turn."""
        return self._slots.count

    @property
    def cache_bytes(self) -> int:
        """Memory of all slots, allocated when the scheduler was made."""
        return self._slots.bytes

    def stats(self) -> SchedulerStats:
        """What there is now, and was so far."""
        return self._queue.stats(self._slots.copies, self._slots.copied_bytes)

    def expected_wait(self) -> float:
        """Seconds that a request submitted now would wait for a slot; 0 while one is free.

        An estimate: the requests before it, at the mean time of those that are over (0 before the first).
        """
        return self._queue.expected_wait()

    def close(self, drain: bool = True) -> None:
        """Take no more requests, wait for those that there are, and give the pipeline back.

        drain  False: cancel them instead, waiting or running; also while another thread drains

        A pipeline that `load` opened is closed as well.
        """
        self._queue.close(drain)
        self._worker.join()
        if self._owned is not None:
            self._owned.close()

    def cancel(self) -> None:
        """Take no more requests and cancel those that there are, without waiting for their end; `close` then
        does."""
        self._queue.close(drain=False)

    def _withdraw(self, job: Job) -> None:
        """For tickets, which keep the scheduler alive by it."""
        self._queue.withdraw(job)

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)


def _end(queue: Queue, worker: Worker) -> None:
    """End the worker, which gives the pipeline back."""
    queue.close(drain=False)
    worker.join()
