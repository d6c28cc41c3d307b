"""What the adapters share: a bundle that answers conversations of text and pictures, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtp.engines import AUTO, UsageError
from vtp.engines.errors import quoted
from vtp.runtime import Pipeline
from vtp.runtime.media.pictures import NO_PICTURE
from vtp.runtime.result import Result

NEW_TOKENS = 512


@dataclass(frozen=True)
class Part:
    """A piece of a conversation: kind "text" (the text) or "image" (path, bytes or PIL image)."""

    kind: str
    value: Any
    role: str = "user"


class Answerer:
    """A bundle, opened once, greedy unless told otherwise."""

    def __init__(
        self,
        bundle: str,
        keep_tokens: int | None = None,
        engine: str = AUTO,
        threads: int | None = None,
        system: str = "",
    ) -> None:
        """Open a bundle: a folder, ORG/NAME of the hub, or either with ":K" behind it for a keep-count."""
        folder, keep = split_keep(bundle)
        if keep is not None and keep_tokens not in (None, keep):
            raise UsageError(f"{bundle} says {keep} tokens and keep_tokens {keep_tokens}; give one of them")
        self._keep = keep_tokens if keep is None else keep
        self._system = system
        self.pipe = Pipeline.load(folder, engine, threads)
        counts = self.pipe.keep_counts
        if self._keep is not None and self._keep not in counts:
            self.pipe.close()
            held = ", ".join(map(str, counts))
            raise UsageError(f"{folder} keeps {held} visual tokens, not {self._keep}; choose one of them")

    def answer(self, parts: Iterable[Part], **options: Any) -> Result:
        """Answer a conversation; `options` are those of `Pipeline.generate`.

        Raises UsageError for anything but text and pictures, and as `generate` does.
        """
        found = list(parts)
        images = [part.value for part in found if part.kind == "image"]
        messages = _messages([*self._first(), *found])
        return self.pipe.generate(images or NO_PICTURE, messages=messages, keep_tokens=self._keep, **options)

    def _first(self) -> list[Part]:
        return [Part("text", self._system, "system")] if self._system else []


def split_keep(bundle: str) -> tuple[str, int | None]:
    """BUNDLE and K of "BUNDLE:K"; without K, None."""
    folder, colon, keep = bundle.rpartition(":")
    return (folder, int(keep)) if colon and keep.isascii() and keep.isdecimal() else (bundle, None)


def generation_options(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """A harness' settings, as it names them, as options of `Pipeline.generate`.

    max_new_tokens, temperature, top_p, do_sample, until (strings that end an answer). Beams are refused.
    """
    beams = wanted.get("num_beams") or 1
    if beams != 1:
        raise UsageError(f"num_beams {quoted(beams)}: vtp answers with one beam; leave it out")
    until = wanted.get("until") or []
    stop = [text for text in ([until] if isinstance(until, str) else until) if text]
    options: dict[str, Any] = {"max_new_tokens": int(wanted.get("max_new_tokens") or NEW_TOKENS)}
    if stop:
        options["stop"] = stop
    heat = wanted.get("temperature") or 0
    if heat > 0 and wanted.get("do_sample", True):
        options["temperature"] = float(heat)
        if wanted.get("top_p") is not None:
            options["top_p"] = float(wanted["top_p"])
    return options


def _messages(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Turns of a conversation; parts of one role that follow each other are one turn."""
    turns: list[dict[str, Any]] = []
    for part in parts:
        if part.kind not in ("text", "image"):
            raise UsageError(f"a part of kind {quoted(part.kind)}: a bundle takes text and pictures")
        content = {"type": "image"} if part.kind == "image" else {"type": "text", "text": str(part.value)}
        if turns and turns[-1]["role"] == part.role:
            turns[-1]["content"].append(content)
        else:
            turns.append({"role": part.role, "content": [content]})
    return turns
