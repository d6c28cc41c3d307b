"""What tests of the pipeline share: bundles that are loaded once a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vtp.runtime import Pipeline


@pytest.fixture(scope="module")
def pipe(exported: Callable[[str], Any]) -> Iterator[Pipeline]:
    """Two keep-counts at the vision site, kept tokens renumbered."""
    with Pipeline.load(exported("vispruner").folder, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def split(exported: Callable[[str], Any]) -> Iterator[Pipeline]:
    """Two keep-counts inside the decoder: two caches."""
    with Pipeline.load(exported("adaptprune").folder, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def endless(exported: Callable[[str], Any]) -> Iterator[Pipeline]:
    """No answer ends before its length does."""
    with Pipeline.load(exported("vispruner").folder, threads=1) as pipeline:
        pipeline.manifest.text.__dict__["eos_token_ids"] = ()
        yield pipeline
