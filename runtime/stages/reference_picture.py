"""The picture that a method compares the next one with (`change`): the one that was asked about before it."""

from __future__ import annotations

import numpy as np

from vtp.runtime.stages.vision_feature_cache import digest


class ReferencePicture:
    """Remembers a camera's last two pictures. Asked about again, a picture keeps the reference it had."""

    def __init__(self) -> None:
        self._now: tuple[bytes, np.ndarray] | None = None
        self._before: np.ndarray | None = None

    def of(self, pixels: np.ndarray) -> np.ndarray:
        """What a picture's pixel_values are compared with; grey (zeros) for a first one."""
        name = digest(pixels)
        if self._now is None or self._now[0] != name:
            self._before = None if self._now is None else self._now[1]
            self._now = name, pixels.copy()
        return np.zeros_like(pixels) if self._before is None else self._before

    def forget(self) -> None:
        """Let the next picture be a first one."""
        self._now = self._before = None
