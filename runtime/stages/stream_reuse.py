"""Image stages of a camera: of a picture the tower recomputes only what changed since a reference picture.

Off unless asked for: an answer then depends on the pictures before its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vtp.engines import UsageError, Value
from vtp.runtime.bundle.manifest import Manifest, StreamInfo
from vtp.runtime.bundle.stream_info import COSINE, STREAM, state_of, uses_earlier
from vtp.runtime.opening import Opening
from vtp.runtime.result import Timings
from vtp.runtime.stages.image_stages import PlainImages
from vtp.runtime.stages.opened import OpenedStages
from vtp.runtime.stages.pieces import Pace, Pieces
from vtp.runtime.stages.stage import Check, Stage, run_stages
from vtp.runtime.stages.vision_feature_cache import VisionFeatureCache, digest


def check_stream_reuse(manifest: Manifest, opening: Opening, cache: VisionFeatureCache | None) -> None:
    """Raise UsageError where `stream_reuse` is asked for and cannot be served."""
    if not opening.stream_reuse:
        return
    if not uses_earlier(manifest):
        raise UsageError(
            "this bundle makes no use of earlier pictures; leave out stream_reuse, or export it with --tower "
            "stc or --method change"
        )
    if cache is not None or opening.image is not None:
        kept = "a vision feature cache" if cache is not None else "image stages that something else runs"
        raise UsageError(f"stream_reuse does not go together with {kept}; choose one of them")


class StreamedImages(PlainImages):
    """Image stages that take every picture for the next one of a camera.

    The first picture is computed whole; it is the reference of those that follow, until one differs too much
    or their number is reached (`StreamInfo`). A picture that is asked about again is not computed again.
    Several pictures of one run are computed whole, and nothing is kept of them.
    """

    def __init__(self, opened: OpenedStages, info: StreamInfo) -> None:
        super().__init__(opened)
        self._info = info
        self._state: dict[str, Value] = {}  # of the reference picture; empty without one
        self._pictures = 0  # that it has served, its own among them
        self._last: tuple[bytes, dict[str, Value], dict[str, float]] | None = None

    def pieces(
        self, keep: int, pictures: Sequence[np.ndarray], prompts: int, pace: Pace
    ) -> Pieces[dict[str, Value]]:
        """See `PlainImages.pieces`; `timings.tower` says what the tower did."""
        if len(pictures) != 1:
            return (yield from super().pieces(keep, pictures, prompts, pace))
        timings, check = pace.timings, pace.check
        stages = self._opened.stages("image", keep)
        encoder = next(place for place, stage in enumerate(stages) if stage.info.role == "encoder")
        pixels = self._stacked(pictures)
        values, timings.tower = self._encoded(stages[encoder], pixels, timings, check)
        pace.worked = True
        run_stages(stages[encoder + 1 :], values, timings, check=check)
        return values

    def forget(self) -> None:
        """Compute the next picture whole."""
        super().forget()
        self._renew()

    def close(self) -> None:
        """Let go of the reference picture's state."""
        self.forget()

    def _renew(self) -> None:
        self._state, self._pictures, self._last = {}, 0, None

    def _encoded(
        self, encoder: Stage, pixels: np.ndarray, timings: Timings, check: Check
    ) -> tuple[dict[str, Value], dict[str, float]]:
        """What the encoder gives of one picture, beside its pixels, and what the tower did for it."""
        name = digest(pixels)
        if self._last is not None and self._last[0] == name:
            timings.reused_stages.append(encoder.info.name)
            return dict(self._last[1]), self._last[2]
        values = self._given(pixels)
        done = self._reused(values, timings, check) or self._whole(encoder, values, timings, check)
        self._last = name, dict(values), done
        return values, done

    def _reused(self, values: dict[str, Value], timings: Timings, check: Check) -> dict[str, float] | None:
        """Recompute what changed; None without a reference, or if the picture is to be the next one."""
        if not self._state or self._pictures >= self._info.pictures:
            return None
        given = {**values, **self._state}
        run_stages(self._opened.stages(STREAM, 0), given, timings, check=check)
        cosine = float(given[COSINE].numpy().min())
        if not cosine >= self._info.least_cosine:
            return None
        self._pictures += 1
        values.update((to, value) for to, value in given.items() if to not in self._state)
        return {"rows": self._info.rows, "of": self._info.of, "cosine": round(cosine, 6)}

    def _whole(
        self, encoder: Stage, values: dict[str, Value], timings: Timings, check: Check
    ) -> dict[str, float]:
        """Compute the picture whole, and keep it for the next ones' reference."""
        self._renew()
        run_stages([encoder], values, timings, check=check)
        later = self._opened.stages(STREAM, 0)[0]
        self._state = {to: values[to] for to in state_of(later.info)}
        self._pictures = 1
        return {"rows": self._info.of, "of": self._info.of}
