"""What a watcher says about one frame: the text, how old the frame is, what was dropped, where time went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vtp.runtime.decisions.decision import Decision
from vtp.runtime.result import Result, VisualTokens
from vtp.serve.streams.alerts import AlertReading
from vtp.serve.streams.frames import Frame


@dataclass(frozen=True)
class FrameAnswer:
    """One answer about one frame.

    frame      the frame, with its stamp, number and name
    prompt     what was asked; None: the alerts only
    result     the pipeline's whole result; None without a prompt
    alerts     a reading of each alert
    asked_age  seconds from the frame's arrival to the moment at which the model took it
    age        seconds from the frame's arrival to the answer
    dropped    frames that came after the frame of the answer before and were not looked at, for newer ones
               had taken their place, or could not be decoded
    skipped    frames after it that were looked at, and that the gate held back
    change     how much the gate found changed, from 0 to 1; None without a gate
    seen       gives the picture that was asked about, while the watcher holds it; else None
    """

    frame: Frame
    prompt: str | None
    result: Result | None
    asked_age: float
    age: float
    dropped: int
    alerts: tuple[AlertReading, ...] = ()
    skipped: int = 0
    change: float | None = None
    seen: Callable[[], Image.Image | None] = field(default=lambda: None, repr=False, compare=False)

    def picture(self) -> Image.Image:
        """The picture that was asked about, upright, RGB; not to be changed.

        A watcher holds that of its latest answer. One of an answer before is loaded again: a file may have
        changed since, and VtpError is raised for one that has gone.
        """
        return self.seen() or self.frame.load()

    @property
    def text(self) -> str:
        """The answer; "" without a prompt."""
        return "" if self.result is None else self.result.text

    @property
    def visual_tokens(self) -> VisualTokens:
        """Visual tokens before and after pruning."""
        return self._ran.visual_tokens

    @property
    def stages(self) -> dict[str, float]:
        """Milliseconds per stage, then ttft, tpot and total: of the answer, or else of the first alert."""
        return self._ran.timings.to_dict()

    @property
    def kept(self) -> list[int]:
        """Indices of the kept visual tokens."""
        return self._ran.kept

    @property
    def tower(self) -> dict[str, float] | None:
        """What the tower did for the frame, of a pipeline with `stream_reuse`: rows recomputed, of how many,
        and their cosine to the reference's unless it was computed whole; else None."""
        return self._ran.timings.tower

    @property
    def tower_idle(self) -> bool:
        """Whether the picture was that of the frame before, of which the tower computed nothing again."""
        first = self.alerts[0].decision if self.alerts else self.result
        return first is not None and bool(first.timings.reused_stages)

    @property
    def _ran(self) -> Result | Decision:
        return self.alerts[0].decision if self.result is None else self.result

    def to_json(self) -> dict[str, Any]:
        """JSON values; the picture is not among them."""
        gate = {} if self.change is None else {"gate": {"change": self.change, "skipped": self.skipped}}
        tower = {} if self.tower is None else {"tower": self.tower}
        return {
            "frame": self._frame(),
            "dropped": self.dropped,
            **gate,
            **self._asked(),
            "alerts": [reading.to_json() for reading in self.alerts],
            "visual_tokens": self.visual_tokens._asdict(),
            **tower,
            "timings": self.stages,
        }

    def _frame(self) -> dict[str, Any]:
        frame = self.frame
        return {
            "number": frame.number,
            "stamp_ns": frame.stamp_ns,
            "clock": frame.clock,
            "name": frame.name,
            "asked_age_ms": round(self.asked_age * 1e3, 3),
            "age_ms": round(self.age * 1e3, 3),
        }

    def _asked(self) -> dict[str, Any]:
        if self.result is None:
            return {}
        return {"prompt": self.prompt, "text": self.text, "finish_reason": self.result.finish_reason}
