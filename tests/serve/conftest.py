"""What tests of the server share: a server with one tiny bundle, and the same bundle asked without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vtp.runtime import Pipeline
from vtp.runtime.scheduler import Scheduler

from .client import Site, serving


@pytest.fixture(scope="package")
def alone(exported: Callable[[str], Any]) -> Iterator[Pipeline]:
    """The bundle that `site` serves, for right answers."""
    with Pipeline.load(exported("vispruner").folder, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="package")
def site(exported: Callable[[str], Any]) -> Iterator[Site]:
    """A server of one bundle, "tiny", with keep-counts 3 and 6 of 16 visual tokens."""
    with (
        Scheduler.load(exported("vispruner").folder, threads=1, slots=2, queue=4) as scheduler,
        serving({"tiny": scheduler}) as running,
    ):
        yield running
