"""Who does the work of a calibration: this process, or many, through one interface.

A job is opened once by each worker, then done chunk by chunk. Results come in the order of the chunks,
whichever worker finishes first, so that what is summed from them is the same sum everywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

C = TypeVar("C")
R = TypeVar("R")


class Job(ABC, Generic[C, R]):
    """Work on chunks of C that gives results R. It is pickled to reach other machines: paths are absolute."""

    engine: str

    @abstractmethod
    def files(self) -> Sequence[Path]:
        """What it reads. A worker on another machine has to find the same there, by the same path."""

    @abstractmethod
    def open(self) -> AbstractContextManager[Callable[[C], R]]:
        """What does one chunk, open as long as the context is."""


class Workers(Protocol):
    """Somebody who does jobs.

    group  questions that are worth a chunk
    here   this process, for what has to be timed on this machine
    """

    group: int

    @property
    def here(self) -> Local:
        """This process."""
        ...

    def run(self, job: Job[C, R], chunks: Sequence[C]) -> Iterator[R]:
        """Results in the order of the chunks, as they come."""
        ...

    def release(self) -> None:
        """Close the job that is open, before its files go; the workers stay."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


class Opened:
    """The one job that a process has open."""

    def __init__(self) -> None:
        self._job: Any = None
        self._work: Callable[[Any], Any] | None = None
        self._stack = ExitStack()

    def work(self, job: Job[C, R]) -> Callable[[C], R]:
        """What does the job's chunks; another job that is open is closed first."""
        if self._work is None or self._job != job:
            self.close()
            self._work, self._job = self._stack.enter_context(job.open()), job
        return self._work

    def close(self) -> None:
        """Close the job."""
        self._work = self._job = None
        self._stack.close()


class Local:
    """This process, one chunk after the other."""

    group = 1  # an answer is written down as soon as it is there

    def __init__(self) -> None:
        self._opened = Opened()

    @property
    def here(self) -> Local:
        """Itself."""
        return self

    def run(self, job: Job[C, R], chunks: Sequence[C]) -> Iterator[R]:
        """Do the chunks; the job stays open for the next call."""
        for chunk in chunks:
            yield self._opened.work(job)(chunk)

    def release(self) -> None:
        """Close the job that is open."""
        self._opened.close()

    def close(self) -> None:
        """The same: there is nothing else to let go."""
        self.release()
