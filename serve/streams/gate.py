"""Asks nothing while little changes: small grey copies of the pictures are compared with a reference.

The reference is the last picture that was asked about, not the one before: a drift that is slow adds up until
it is seen. The copy has 64 x 64 values and is compared in blocks of 8 x 8, so that a small thing that moves
counts as much as it fills of its block, and a camera's noise is averaged away.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from vtp.engines import UsageError
from vtp.engines.errors import quoted_argument
from vtp.runtime.generation.arguments import is_number

DEFAULT_CHANGE = 0.03
_EDGE, _BLOCK = 64, 8


class Gate:
    """Lets pictures through that differ enough from the last one that was let through.

    least  the change from which on a picture is let through: the mean difference within the block that
           differs most, above 0 and at most 1 (black against white)
    """

    def __init__(self, least: float = DEFAULT_CHANGE) -> None:
        if not is_number(least) or not 0 < least <= 1:
            raise UsageError(
                f"a change of {quoted_argument(least)} is not allowed; give a number above 0 (all but equal) "
                "and at most 1 (black against white)"
            )
        self._least = least
        self._reference: np.ndarray | None = None

    def change(self, picture: Image.Image) -> float | None:
        """How much an RGB picture differs, if enough, and it is then the reference; None if not.

        The first picture differs by 1.
        """
        small = _small(picture)
        changed = 1.0 if self._reference is None else _largest_block(np.abs(small - self._reference))
        if changed < self._least:
            return None
        self._reference = small
        return changed

    def reset(self) -> None:
        """Let the next picture through, whatever it shows: something else is asked."""
        self._reference = None


def _small(picture: Image.Image) -> np.ndarray:
    """Grey, float32 [64,64] from 0 to 1."""
    grey = picture.convert("L").resize((_EDGE, _EDGE), Image.Resampling.BOX)
    return np.asarray(grey, np.float32) / 255


def _largest_block(difference: np.ndarray) -> float:
    """The largest mean of the blocks of [64,64]."""
    count = _EDGE // _BLOCK
    return float(difference.reshape(count, _BLOCK, count, _BLOCK).mean(axis=(1, 3)).max())
