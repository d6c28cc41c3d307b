"""A camera of the network: an HTTP server of MJPEG that can be cut off, and comes back on the same port."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


class Camera:
    """Serves JPEGs at `url` for as long as it is `up`."""

    def __init__(self, picture: Callable[[int], np.ndarray], fps: float = 20.0) -> None:
        self._picture, self._pause = picture, 1 / fps
        self._server: ThreadingHTTPServer | None = None
        self._down = threading.Event()
        self.silent = threading.Event()  # connections stay, nothing comes
        self.empty = threading.Event()  # connections are taken, and end at once
        self.port = self.sent = self.connections = 0
        self._cuts = 0

    @property
    def url(self) -> str:
        return f"http://user:secret@127.0.0.1:{self.port}/live.mjpg?token=secret"

    def up(self) -> None:
        """Listen, on the same port as before."""
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                camera.connections += 1
                try:
                    for data in camera._jpegs():
                        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                        self.wfile.write(head.encode() + data + b"\r\n")
                except OSError:
                    pass

            def log_message(self, *words: object) -> None:
                pass

        self._down.clear()
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        """Cut every connection off, and listen no more."""
        self._down.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def cut(self) -> None:
        """End the connections of now."""
        self._cuts += 1

    def _jpegs(self) -> Iterator[bytes]:
        cuts = self._cuts
        while not (self._down.is_set() or self.empty.is_set() or cuts < self._cuts):
            if not self.silent.is_set():
                out = io.BytesIO()
                Image.fromarray(self._picture(self.sent)).save(out, "JPEG", quality=92)
                self.sent += 1
                yield out.getvalue()
            time.sleep(self._pause)


@contextmanager
def camera(picture: Callable[[int], np.ndarray], fps: float = 20.0) -> Iterator[Camera]:
    """A camera that is up."""
    one = Camera(picture, fps)
    one.up()
    try:
        yield one
    finally:
        one.down()
