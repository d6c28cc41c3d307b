"""Cameras and videos: the newest frame, the standing question, the answers. Never torch, transformers."""

from vtp.serve.streams.alerts import Alert, AlertReading
from vtp.serve.streams.answer import FrameAnswer
from vtp.serve.streams.frames import Frame, Source
from vtp.serve.streams.gate import Gate
from vtp.serve.streams.newest import PushedFrames
from vtp.serve.streams.sources.opening import open_source
from vtp.serve.streams.watcher import Watcher

__all__ = [
    "Alert",
    "AlertReading",
    "Frame",
    "FrameAnswer",
    "Gate",
    "PushedFrames",
    "Source",
    "Watcher",
    "open_source",
]
