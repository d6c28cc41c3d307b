"""How much of a picture is cut off before a model sees it, and the line that says so."""

from __future__ import annotations

import sys
import warnings

from vtp.runtime.preprocess import ImageSpec, source_box

__all__ = ["CutOffWarner", "cut_off_line", "share_cut_off"]

_WORTH_SAYING = 0.02  # a pixel here and there is rounding


def share_cut_off(spec: ImageSpec, width: int, height: int) -> float:
    """The share of a picture of `width` x `height` pixels that the model does not see, from 0 to 1."""
    box = source_box(spec, width, height)
    wide = min(box.right, width) - max(box.left, 0)
    high = min(box.bottom, height) - max(box.top, 0)
    return 1 - max(wide, 0) * max(high, 0) / (width * height)


def cut_off_line(spec: ImageSpec, width: int, height: int) -> str | None:
    """What to tell the person who shows such a picture; None: (nearly) all of it is seen."""
    share = share_cut_off(spec, width, height)
    if share < _WORTH_SAYING:
        return None
    return (
        f"{share:.0%} of a picture of {width}x{height} is cut off at its sides, as this model's image "
        "processor does; vtp-export --image-fit letterbox makes a bundle that sees all of it"
    )


class CutOffWarner:
    """Warns a Python program of the first picture that loses its sides; commands say it in their own lines.

    A program that shows pictures of many sizes is warned once, not once a size.
    """

    def __init__(self, spec: ImageSpec) -> None:
        self._spec = spec
        self._done = False

    def see(self, width: int, height: int) -> None:
        """Look at the size of a picture that is going to be answered about."""
        if not self._done and (line := cut_off_line(self._spec, width, height)):
            self._done = True
            warnings.warn(line, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """The `stacklevel` by which a warning of `see` names the line that called this library."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("vtp."):
        frame, level = frame.f_back, level + 1
    return level
