"""How much of a picture is cut off before a model sees it, and the line that says so."""

from __future__ import annotations

from vtp.runtime.preprocess import ImageSpec, source_box

__all__ = ["cut_off_line", "share_cut_off"]

_WORTH_SAYING = 0.02  # a pixel here and there is rounding


def share_cut_off(spec: ImageSpec, width: int, height: int) -> float:
    """The share of a picture of `width` x `height` pixels that the model does not see, from 0 to 1."""
    box = source_box(spec, width, height)
    wide = min(box.right, width) - max(box.left, 0)
    high = min(box.bottom, height) - max(box.top, 0)
    return 1 - max(wide, 0) * max(high, 0) / (width * height)


def cut_off_line(spec: ImageSpec, width: int, height: int) -> str | None:
    """What to tell whoever shows such a picture; None: (nearly) all of it is seen."""
    share = share_cut_off(spec, width, height)
    if share < _WORTH_SAYING:
        return None
    return (
        f"{share:.0%} of a picture of {width}x{height} is cut off at its sides, as this model's image "
        "processor does; vtp-export --image-fit letterbox makes a bundle that sees all of it"
    )
