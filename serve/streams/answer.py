"""What a watcher says about one frame: the text, how old the frame is, what was dropped, where time went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtp.runtime.result import Result, VisualTokens
from vtp.serve.streams.frames import Frame


@dataclass(frozen=True)
class FrameAnswer:
    """One answer about one frame.

    frame      the frame, with its stamp, number and name
    prompt     what was asked
    result     the pipeline's whole result
    asked_age  seconds from the frame's arrival to the moment at which the model took it
    age        seconds from the frame's arrival to the answer
    dropped    frames that came after the frame of the answer before, and were never asked about
    """

    frame: Frame
    prompt: str
    result: Result
    asked_age: float
    age: float
    dropped: int

    @property
    def text(self) -> str:
        """The answer."""
        return self.result.text

    @property
    def visual_tokens(self) -> VisualTokens:
        """Visual tokens before and after pruning."""
        return self.result.visual_tokens

    @property
    def stages(self) -> dict[str, float]:
        """Milliseconds per stage, then ttft, tpot and total."""
        return self.result.timings.to_dict()

    def to_json(self) -> dict[str, Any]:
        """JSON values; the picture is not among them."""
        return {
            "frame": {
                "number": self.frame.number,
                "stamp_ns": self.frame.stamp_ns,
                "clock": self.frame.clock,
                "name": self.frame.name,
                "asked_age_ms": round(self.asked_age * 1e3, 3),
                "age_ms": round(self.age * 1e3, 3),
            },
            "dropped": self.dropped,
            "prompt": self.prompt,
            "text": self.text,
            "finish_reason": self.result.finish_reason,
            "visual_tokens": self.visual_tokens._asdict(),
            "timings": self.stages,
        }
