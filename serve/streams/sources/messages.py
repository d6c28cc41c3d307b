"""Frames of ROS 2's messages, recorded or sent: pictures are decoded when they are asked about."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from vtp.engines import VtpError
from vtp.serve.robots.cdr import read_message
from vtp.serve.robots.images import picture_of
from vtp.serve.streams.frames import ROS, Frame


def frame_of(number: int, kind: str, data: bytes, came_ns: int) -> Frame:
    """The frame of a message of type `kind` in CDR; of a message that is damaged, loading it says so.

    number   counts the source's frames, from 0
    came_ns  the stamp of a message without one
    """
    now = time.monotonic()
    try:
        message = read_message(kind, data)
    except VtpError as error:
        return Frame(partial(_refuse, error), number, came_ns, now, ROS)
    stamp = message.header.stamp_ns or came_ns
    return Frame(partial(picture_of, message), number, stamp, now, ROS, message.header.frame_id)


def _refuse(error: VtpError) -> Any:
    raise error
