"""Changes that a running vtp-ros2 refuses. Skipped where ROS 2 is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .processes import QUESTION, Peer, camera, node, parameters, peer, ros_python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ros_python() is None, reason="ROS 2 is not installed; run: make test-ros"),
]


@pytest.fixture(scope="module")
def running(bundle: Path, pictures: Path) -> Iterator[Peer]:
    """A node that answers, for tests that leave it as it is."""
    with peer() as talk, node(*parameters(bundle)), camera(pictures):
        talk.more("json")
        yield talk


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"bundle": "/elsewhere"}, "bundle is in use while the node is active; deactivate and clean up"),
        ({"engine": "openvino-cpu"}, "engine is in use while the node is active"),
        (
            {"image_transport": "compressed"},
            "image_transport is in use while the node is active; deactivate the",
        ),
        ({"keep_tokens": 17}, "keep_tokens 17 is not in this bundle, which holds 16, 57"),
        ({"max_tokens": 0}, "max_tokens 0 is not allowed; give 1 to 1048576"),
        ({"rate": -0.5}, "rate -0.5 is not allowed"),
        ({"rate": "fast"}, "rate must be a number, not 'fast'"),
        ({"prompt": ""}, "there is no question"),
        ({"prompt": "<image> what ?"}, "<image>"),
        ({"prompt": "what color is the circle ?", "keep_tokens": 1}, "keep_tokens 1 is not in this bundle"),
        ({"stale_after": 0.0}, "stale_after 0.0 is not allowed; give above 0 to 86400"),
        ({"alert_hysteresis": 0.5}, "alert_hysteresis 0.5 must be below alert_threshold 0.5"),
    ],
)
def test_changes_that_cannot_be_are_refused_with_why(running: Peer, values: dict[str, Any], why: str) -> None:
    before = {name: running.get(name=name) for name in values}
    successful, reason = running.set(**values)
    assert not successful
    assert why in reason
    assert {name: running.get(name=name) for name in values} == before
    assert running.more("json")[0]["prompt"] == QUESTION  # and it goes on


def test_a_prompt_that_is_refused_changes_nothing(running: Peer) -> None:
    running.prompt(text="")
    running.prompt(text="<image>")
    assert {said["prompt"] for said in running.more("json", 3)} == {QUESTION}
