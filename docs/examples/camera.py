"""Ask a question about the newest frame of a camera, again and again: the latest frame wins.

    pip install 'vtp-edge[ort]' opencv-python-headless
    python camera.py bundle 0 "what is ahead ?"

`vtp-watch` does more (reconnects, alerts, JSON, no OpenCV); this shows the loop, for programs of your own.
"""

import sys
import threading

from vtp.runtime import Pipeline


class NewestFrame:
    """Reads a camera in a thread of its own, and keeps the last frame alone."""

    def __init__(self, read):
        """read: gives (True, frame), and (False, None) at the end, as cv2.VideoCapture.read does."""
        self._read, self._changed = read, threading.Condition()
        self._frame, self._number, self._taken, self._over = None, 0, 0, False
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        try:
            good, frame = self._read()
            while good:  # as fast as the camera: a frame that nobody asked about is replaced
                with self._changed:
                    self._frame, self._number = frame, self._number + 1
                    self._changed.notify()
                good, frame = self._read()
        finally:  # also if reading raised: nobody waits for a frame that does not come
            with self._changed:
                self._over = True
                self._changed.notify()

    def take(self):
        """(frame, its number from 1), newer than any that was taken; (None, 0) after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._number > self._taken or self._over)
            if self._number == self._taken:
                return None, 0
            self._taken = self._number
            return self._frame, self._number


def answers(pipe, read, question):
    """The number of a frame and the Result about it, until the camera ends."""
    newest = NewestFrame(read)
    frame, number = newest.take()
    while frame is not None:
        yield number, pipe.generate(frame, question, color="bgr", max_new_tokens=16)
        frame, number = newest.take()


def main(bundle, camera="0", question="what is ahead ?"):
    """Print a line for each answer."""
    import cv2

    video = cv2.VideoCapture(int(camera) if camera.isdigit() else camera)
    if not video.isOpened():
        sys.exit(f"camera {camera} cannot be opened")
    with Pipeline.load(bundle) as pipe:
        pipe.warmup()
        for number, result in answers(pipe, video.read, question):
            print(f"frame {number}, {result.timings.total:.0f} ms: {result.text}", flush=True)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        sys.exit("usage: camera.py BUNDLE [CAMERA [QUESTION]]")
    main(*sys.argv[1:])
