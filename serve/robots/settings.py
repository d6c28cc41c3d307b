"""What a node is told by parameters: their names, when each may change, and what is refused with why.

Knows no ROS and opens no bundle: `model.py` checks what only a bundle can say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any

from vtp.engines import AUTO, UsageError
from vtp.engines.errors import quoted_argument

__all__ = ["PARAMETERS", "Parameter", "Phase", "Settings", "changed"]

RAW, COMPRESSED = "raw", "compressed"
_TRANSPORTS = (RAW, COMPRESSED)
_LONGEST_PROMPT = 2**16  # characters; what the bundle takes is checked with it
_FASTEST = 1000.0  # answers per second
_LONGEST = 86400.0  # seconds


class Phase(IntEnum):
    """How far a lifecycle node is: what is in use grows with it."""

    UNCONFIGURED = 0
    INACTIVE = 1
    ACTIVE = 2


@dataclass(frozen=True)
class Settings:
    """The parameters' values; `PARAMETERS` says what they mean."""

    bundle: str = ""
    engine: str = AUTO
    threads: int = 0
    prompt: str = ""
    rate: float = 30.0
    keep_tokens: int = 0
    max_tokens: int = 64
    alert: str = ""
    alert_threshold: float = 0.5
    alert_hysteresis: float = 0.1
    image_transport: str = RAW
    stale_after: float = 1.0
    stream_reuse: bool = False


@dataclass(frozen=True)
class Parameter:
    """One parameter: what it means, the last phase in which it may change, and its bounds if it is a number.

    A bound of 0 that is not allowed itself is given as the smallest positive float.
    """

    what: str
    until: Phase = Phase.ACTIVE
    least: float = -math.inf
    most: float = math.inf


_TINY = math.ulp(0.0)

#: By name, in the order of `Settings`.
PARAMETERS = {
    "bundle": Parameter("folder of the bundle that vtp-export made", Phase.UNCONFIGURED),
    "engine": Parameter("engine that runs it, as vtp-run's --engine", Phase.UNCONFIGURED),
    "threads": Parameter("CPU threads; 0: all cores", Phase.UNCONFIGURED, 0, 4096),
    "prompt": Parameter("the standing question; ~/prompt changes it as well"),
    "rate": Parameter("answers per second at most; 0: only when ~/ask is called", least=0, most=_FASTEST),
    "keep_tokens": Parameter("visual tokens kept, one of the bundle's counts; 0: its default", least=0),
    "max_tokens": Parameter("tokens of an answer at most", least=1, most=2**20),
    "alert": Parameter("a yes/no question, decided for every frame that is asked about; empty: none"),
    "alert_threshold": Parameter("probability of yes at which the alert is raised", least=_TINY, most=1),
    "alert_hysteresis": Parameter("how far below that it must fall to end", least=0, most=1),
    "image_transport": Parameter("raw: sensor_msgs/Image; compressed: CompressedImage", Phase.INACTIVE),
    "stale_after": Parameter(
        "seconds after which /diagnostics calls the newest frame stale", least=_TINY, most=_LONGEST
    ),
    "stream_reuse": Parameter(
        "make use of the frames before: of a bundle made with --tower stc or --method change",
        Phase.UNCONFIGURED,
    ),
}

_TYPES = {field.name: type(field.default) for field in fields(Settings)}
_SAID = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def changed(settings: Settings, values: Mapping[str, Any], phase: Phase) -> Settings:
    """The settings with some parameters changed, in a node that is in `phase`.

    Raises UsageError for a value that is not allowed, and for a parameter that is in use.
    """
    new = replace(settings, **{name: _value(name, value) for name, value in values.items()})
    for name in values:
        _check_phase(name, getattr(settings, name) != getattr(new, name), phase)
    if new.alert_hysteresis >= new.alert_threshold:
        raise UsageError(
            f"alert_hysteresis {new.alert_hysteresis:g} must be below alert_threshold "
            f"{new.alert_threshold:g}, or an alert could never end"
        )
    if phase > Phase.UNCONFIGURED:
        check_asks(new)
    return new


def check_asks(settings: Settings) -> None:
    """UsageError where nothing would ever be asked."""
    if not settings.prompt.strip() and not settings.alert.strip():
        raise UsageError("there is no question: set prompt, alert, or both")


def _check_phase(name: str, differs: bool, phase: Phase) -> None:
    until = PARAMETERS[name].until
    if differs and phase > until:
        how = "deactivate" if until is Phase.INACTIVE else "deactivate and clean up"
        raise UsageError(f"{name} is in use while the node is {phase.name.lower()}; {how} the node first")


def _value(name: str, value: Any) -> Any:
    """A parameter's value as its own type; a whole number may be given for a fractional one."""
    kind, given = _TYPES[name], type(value)
    if given is not kind and not (kind is float and given is int):
        raise UsageError(f"{name} must be {_SAID[kind]}, not {quoted_argument(value)}")
    if kind is str:
        return _text(name, value)
    parameter = PARAMETERS[name]
    if not parameter.least <= value <= parameter.most:  # NaN is within no bounds
        least = "above 0" if parameter.least == _TINY else f"{parameter.least:.12g}"
        most = f" to {parameter.most:.12g}" if math.isfinite(parameter.most) else " or more"
        raise UsageError(f"{name} {value} is not allowed; give {least}{most}")
    return kind(value)


def _text(name: str, value: str) -> str:
    if name == "image_transport" and value not in _TRANSPORTS:
        raise UsageError(
            f"image_transport {quoted_argument(value)} is not known; choose {' or '.join(_TRANSPORTS)}"
        )
    if len(value) > _LONGEST_PROMPT:
        raise UsageError(f"{name} has {len(value)} characters; give at most {_LONGEST_PROMPT}")
    return value
