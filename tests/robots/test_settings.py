"""Parameters of a node: what is taken, when, and what is said where it is not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vtp.engines import UsageError
from vtp.serve.robots.settings import PARAMETERS, Phase, Settings, changed

READY = Settings(bundle="bundle", prompt="what ?")


def test_every_setting_has_a_parameter_that_explains_it() -> None:
    assert list(PARAMETERS) == list(vars(READY))
    assert all(parameter.what for parameter in PARAMETERS.values())


def test_defaults_are_allowed() -> None:
    assert changed(Settings(), vars(Settings()), Phase.UNCONFIGURED) == Settings()


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"rate": 5}, 5.0),
        ({"rate": 0}, 0.0),
        ({"rate": 1000.0}, 1000.0),
        ({"keep_tokens": 0}, 0),
        ({"max_tokens": 1}, 1),
        ({"alert_threshold": 1}, 1.0),
        ({"image_transport": "compressed"}, "compressed"),
        ({"stream_reuse": True}, True),
    ],
)
def test_values_are_taken_as_their_own_type(values: dict[str, Any], wanted: Any) -> None:
    ((name, _),) = values.items()
    made = getattr(changed(READY, values, Phase.UNCONFIGURED), name)
    assert made == wanted
    assert type(made) is type(wanted)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"rate": math.nan}, "rate nan is not allowed; give 0 to 1000"),
        ({"rate": math.inf}, "rate inf is not allowed"),
        ({"rate": True}, "rate must be a number, not True"),
        ({"rate": None}, "rate must be a number, not None"),
        ({"max_tokens": 2.0}, "max_tokens must be a whole number, not 2.0"),
        ({"keep_tokens": -1}, "keep_tokens -1 is not allowed; give 0 or more"),
        ({"threads": 5000}, "threads 5000 is not allowed; give 0 to 4096"),
        ({"prompt": 7}, "prompt must be text, not 7"),
        ({"stream_reuse": 1}, "stream_reuse must be true or false, not 1"),
        ({"stream_reuse": "yes"}, "stream_reuse must be true or false, not 'yes'"),
        ({"prompt": "x" * 70000}, "prompt has 70000 characters; give at most 65536"),
        ({"alert_threshold": 0.0}, "alert_threshold 0.0 is not allowed; give above 0 to 1"),
        ({"alert_threshold": 0.1}, "must be below alert_threshold"),
        ({"image_transport": "theora"}, "image_transport 'theora' is not known; choose raw or compressed"),
    ],
)
def test_other_values_are_refused(values: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        changed(READY, values, Phase.UNCONFIGURED)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("phase", Phase)
def test_what_is_in_use_does_not_change(name: str, phase: Phase) -> None:
    old = getattr(READY, name)
    new = "compressed" if name == "image_transport" else old + "x" if isinstance(old, str) else old / 2 or 1
    new = type(old)(new)
    if phase <= PARAMETERS[name].until:
        assert getattr(changed(READY, {name: new}, phase), name) == new
    else:
        with pytest.raises(UsageError, match=f"{name} is in use while the node is {phase.name.lower()}"):
            changed(READY, {name: new}, phase)
    assert changed(READY, {name: old}, phase) == READY  # the same value is no change


def test_changes_are_all_or_none() -> None:
    with pytest.raises(UsageError):
        changed(READY, {"rate": 2.0, "max_tokens": 0}, Phase.ACTIVE)
    assert READY.rate == 30.0


@pytest.mark.parametrize("phase", [Phase.INACTIVE, Phase.ACTIVE])
def test_something_must_be_asked(phase: Phase) -> None:
    with pytest.raises(UsageError, match="there is no question"):
        changed(READY, {"prompt": " "}, phase)
    alone = changed(READY, {"prompt": "", "alert": "is it ?"}, phase)
    with pytest.raises(UsageError, match="there is no question"):
        changed(alone, {"alert": ""}, phase)
    assert changed(READY, {"prompt": ""}, Phase.UNCONFIGURED).prompt == ""
