"""The picture that comes with vtp, for anyone who has a bundle and no picture at hand: shapes on grey."""

from __future__ import annotations

from pathlib import Path

__all__ = ["OWN_PICTURE", "OWN_QUESTION"]

OWN_PICTURE = Path(__file__).with_name("scene.jpg")  # 336 x 336 pixels
OWN_QUESTION = "what color is the star ?"  # it is blue
