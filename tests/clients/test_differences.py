"""The comparison of `make test-clients` sees what is wrong. (The clients themselves need a network.)"""

from __future__ import annotations

from typing import Any

import pytest

from .__main__ import differences
from .environments import SCRIPTS, clients
from .expected import facts_of

ANSWER = {
    "text": "blue",
    "text first": " red",
    "token_ids": [1, 2],
    "prompt_tokens": 13,
    "visual_tokens": {"before": 576, "after": 64},
    "finish_reason": "eos",
    "context": 2048,
    "object": {"color": "red", "sure": True},
    "least kept": 64,
}
ANSWERS = {"m": ANSWER}
RIGHT: dict[str, Any] = {
    "answers": {"m": {"whole": "blue", "text first: x": " red", "stripped: y": "red"}},
    "facts": {"m": {"usage": [77, 2], "finish": "stop", "pieces": 2}},
    "models": ["m"],
    "errors": {"unknown model": ["NotFoundError", 404, "model"]},
    "objects": {"m": {"whole": {"color": "red", "sure": True}}},
}


def test_what_is_right_passes() -> None:
    assert list(differences(RIGHT, ANSWERS, ["m"])) == []
    assert list(differences({"answers": RIGHT["answers"]}, ANSWERS, ["m"])) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"answers": {}},
        {"answers": {"m": {}}},
        {"answers": {"m": {"whole": "red"}}},
        {"answers": {"m": {"text first: x": "blue"}}},
        {"answers": {"m": {"stripped: x": " red"}}},
        {"facts": {"m": {"usage": [589, 2]}}},
        {"facts": {"m": {"finish": "length"}}},
        {"facts": {"m": {"pieces": 0}}},
        {"models": []},
        {"models": ["m", "n"]},
        {"errors": {"unknown model": ["nothing"]}},
        {"errors": {"unknown model": ["BadRequestError", 400, "model"]}},
        {"objects": {"m": {"whole": {"color": "pink", "sure": True}}}},
        {"objects": {"m": {"whole": {"color": "red", "sure": False}}}},
        {"objects": {"m": {"whole": {"color": "red"}}}},
        {"objects": {"m": {"whole": None}}},
    ],
)
def test_what_is_wrong_is_told(wrong: dict[str, Any]) -> None:
    assert len(list(differences({**RIGHT, **wrong}, ANSWERS, ["m"]))) == 1


def test_visual_tokens_count_as_kept() -> None:
    assert facts_of(ANSWER)["usage"] == [13 + 64, 2] and facts_of(ANSWER)["visual"] == [576, 64]


def test_every_client_has_a_script_and_pinned_packages() -> None:
    for client in clients():
        assert (SCRIPTS / client.script).is_file() and bool(client.pip) != bool(client.npm)
        assert all("==" in one for one in client.pip) and all("@" in one[1:] for one in client.npm)
    used = {client.script for client in clients()}
    assert used == {path.name for path in SCRIPTS.iterdir() if path.is_file()}
