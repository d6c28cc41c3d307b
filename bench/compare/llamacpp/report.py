"""What llama.cpp says of its own times: the answer's `timings`, and the stamps of two lines of its log.

The server's log (`--verbosity 4`) has a stamp in microseconds in front of each line. Of a picture it says
when its encoding starts, and then, once a batch, that its rows go into the decoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_STAMP = r"^(\d+)\.(\d\d)\.(\d{3})\.(\d{3}) "
_BEGINS = re.compile(_STAMP + r".*encoding mtmd batch", re.MULTILINE)
_DECODES = re.compile(_STAMP + r".*decoding image batch 1/", re.MULTILINE)


@dataclass(frozen=True)
class Reported:
    """Milliseconds of one answer by llama.cpp's own clock.

    encoder  the picture's tower and projector; None if the log has no such lines
    prompt   the decoder over all of the prompt's tokens, up to the first new one
    token    each further token; 0 if there is none
    tokens   of the prompt, the picture's included
    made     new tokens
    """

    encoder: float | None
    prompt: float
    token: float
    tokens: int
    made: int


def reported(timings: Mapping[str, Any], log: str) -> Reported:
    """One answer's times, of its `timings` and of what the log gained while it was made."""
    encoder, made = encoding_ms(log), int(timings["predicted_n"])
    return Reported(
        encoder,
        float(timings["prompt_ms"]) - (encoder or 0.0),
        float(timings["predicted_ms"]) / (made - 1) if made > 1 else 0.0,
        int(timings["prompt_n"]),
        made,
    )


def encoding_ms(log: str) -> float | None:
    """From the last "encoding" to the first "decoding" after it; None if there is no such pair."""
    begins = list(_BEGINS.finditer(log))
    after = _DECODES.search(log, begins[-1].end()) if begins else None
    return None if after is None else _ms(after) - _ms(begins[-1])


def instructions(log: str) -> list[str]:
    """The CPU's instructions and the parts that this build uses, as its log names them, such as AVX512."""
    found = re.search(r"system_info: .*?\| CPU : (.*)$", log, re.MULTILINE)
    return re.findall(r"(\w+) = 1", found[1]) if found else []


def _ms(found: re.Match[str]) -> float:
    """A stamp minutes.seconds.milliseconds.microseconds, in milliseconds."""
    minutes, seconds, thousandths, millionths = (int(part) for part in found.groups())
    return 60_000 * minutes + 1_000 * seconds + thousandths + millionths / 1_000
