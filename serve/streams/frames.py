"""A frame, and what gives frames: the protocol between cameras, files or robots and the watcher.

A source is anything that

- is iterated once, in the watcher's capture thread: each step waits for the next frame and yields it; the
  iteration ends when the source is over, and raises VtpError if it cannot go on;
- numbers every frame that it received, from 0: a number that is left out is a frame that the source itself
  dropped, and answers count it as dropped;
- has `close()`, which any thread may call, more than once and also while the iteration waits: the iteration
  then ends within a second or so;
- has a `name`, by which messages call it, without passwords;
- may have `every_frame = True`: it has no time of its own, so it waits and none of its frames is dropped.

A source whose frames are handed to it (a subscription's callback) is `PushedFrames` of `newest.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

from vtp.runtime.media.images import ImageSource, load_image

UNIX, MEDIA, ROS = "unix", "media", "ros"  # clocks of stamps


@dataclass(frozen=True)
class Frame:
    """One picture of a stream.

    picture   uint8 RGB [H,W,3], or anything else that `Pipeline.generate` takes as one picture, such as the
              bytes of a JPEG, which are then decoded only if the frame is asked about; or a function that
              gives one of these, called from another thread and only if the frame is asked about
    number    counts the frames that the source received, from 0
    stamp_ns  when it was taken, in nanoseconds of the source's clock
    arrived   when it came here, in seconds of `time.monotonic()`
    clock     the source's clock: "unix" (since 1970), "media" (since the stream's start) or "ros" (whatever
              time the publisher uses)
    name      what the source calls it: a file's name, a frame_id; "" if nothing
    """

    picture: ImageSource | Callable[[], ImageSource] = field(repr=False, compare=False)
    number: int
    stamp_ns: int
    arrived: float
    clock: str = UNIX
    name: str = ""

    @property
    def stamp(self) -> float:
        """`stamp_ns` in seconds, to about a microsecond."""
        return self.stamp_ns / 1e9

    def load(self) -> Image.Image:
        """The picture, decoded, upright, RGB. Raises VtpError for one that cannot be decoded."""
        return load_image(self.picture() if callable(self.picture) else self.picture)


class Source(Protocol):
    """What gives frames: see the top of this file."""

    @property
    def name(self) -> str:
        """How messages call it."""
        ...

    def __iter__(self) -> Iterator[Frame]:
        """Wait for frames and yield them."""
        ...

    def close(self) -> None:
        """End the iteration soon, from any thread."""
        ...
