"""Decodes the pictures of requests that wait, in a thread of its own, while others take their steps."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from vtp.runtime.scheduling.job import Job


class Loader:
    """Pictures are decoded one request after the other; errors are kept for when the request's turn comes."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "vtp-pictures")

    def begin(self, jobs: Iterable[Job]) -> None:
        """Have the pictures of requests decoded, as far as nobody has asked for it yet."""
        for job in jobs:
            if job.loading is None:
                try:
                    job.loading = self._pool.submit(job.answer.request.load)
                except RuntimeError:  # the interpreter ends: who needs the pictures decodes them
                    return

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)
