"""Where answers go: lines for people, lines of JSON."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vtp.engines.errors import shown
from vtp.runtime.commands.console import say, say_json
from vtp.serve.streams.alerts import AlertReading
from vtp.serve.streams.answer import FrameAnswer
from vtp.serve.streams.frames import MEDIA, UNIX, Frame

Sink = Callable[[FrameAnswer], None]


def say_answer(answer: FrameAnswer) -> None:
    """An answer as one line on standard output."""
    before, after = answer.visual_tokens
    figures = [f"{before} → {after} tokens", f"{1e3 * answer.age:.0f} ms old"]
    if (tower := answer.tower) is not None:
        figures.append(f"{tower['rows']} of {tower['of']} rows")
    if answer.dropped:
        figures.append(f"{answer.dropped} dropped")
    if answer.skipped:
        figures.append(f"{answer.skipped} skipped")
    told = [*([" ".join(answer.text.split())] if answer.result else []), *map(_alert, answer.alerts)]
    say(f"{_place_of(answer.frame)}  {' | '.join(told)}  ({', '.join(figures)})")


def _place_of(frame: Frame) -> str:
    """Its time; of a folder's file, whose time is the file's, also its name."""
    named = frame.clock == UNIX and frame.name
    return f"{time_of(frame)}  {shown(frame.name, 40)}" if named else time_of(frame)


def _alert(reading: AlertReading) -> str:
    event = f" {reading.event.upper()}" if reading.event else " (on)" if reading.on else ""
    return f"{shown(reading.question, 40)} {reading.probability:.2f}{event}"


def time_of(frame: Frame) -> str:
    """A frame's stamp: the time of day here, minutes and seconds of a recording, or seconds."""
    if frame.clock == UNIX:
        return (
            f"{time.strftime('%H:%M:%S', time.localtime(frame.stamp))}.{frame.stamp_ns // 10**6 % 1000:03d}"
        )
    if frame.clock == MEDIA:
        return f"{int(frame.stamp) // 60}:{frame.stamp % 60:06.3f}"
    return f"{frame.stamp:.3f}"


def json_lines(source: str, engine: str) -> Sink:
    """A sink that prints an answer as one line of JSON, with the source's name and the engine's."""

    def write(answer: FrameAnswer) -> None:
        say_json({"source": source, "engine": engine, **answer.to_json()}, indent=None)

    return write


def alerted(reading: AlertReading, frame: Frame, source: str) -> dict[str, Any]:
    """What hooks are told about an alert."""
    return {
        "source": source,
        "question": reading.question,
        "answer": reading.answer,
        "event": reading.event,
        "probability": reading.probability,
        "label_mass": reading.label_mass,
        "frame": {
            "number": frame.number,
            "stamp_ns": frame.stamp_ns,
            "clock": frame.clock,
            "name": frame.name,
        },
    }
