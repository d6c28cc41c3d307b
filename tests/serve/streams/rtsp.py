"""A small RTSP camera: H.264 in RTP over the connection itself, behind a password; it can be cut off.

Written from RFC 2326 (RTSP), RFC 3550 (RTP) and RFC 6184 (H.264 in RTP); encoded by libx264.
"""

from __future__ import annotations

import base64
import re
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason="PyAV (extra [streams]) is not installed")

USER, PASSWORD = "viewer", "s3cret"
_SDP = (
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\n"
    "a=rtpmap:96 H264/90000\r\na=fmtp:96 packetization-mode=1\r\na=control:track0\r\n"
)
_PART = 1200  # bytes of a packet's payload


class RtspCamera:
    """Sends what `picture` gives to everyone who plays, `fps` a second."""

    def __init__(self, picture: Callable[[int], np.ndarray], fps: int = 20) -> None:
        self.picture, self.fps, self.port = picture, fps, 0
        self.requests: list[str] = []
        self.is_down = threading.Event()
        self._server: socketserver.ThreadingTCPServer | None = None

    @property
    def url(self) -> str:
        return f"rtsp://{USER}:{PASSWORD}@127.0.0.1:{self.port}/live"

    def up(self) -> None:
        """Listen, on the same port as before."""
        camera = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with suppress(OSError):
                    Session(camera, self.rfile, self.wfile).run()

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True

        self.is_down.clear()
        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        """Cut every player off, and listen no more."""
        self.is_down.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class Session:
    """One player's connection."""

    def __init__(self, camera: RtspCamera, reader: Any, writer: Any) -> None:
        self._camera, self._reader, self._writer = camera, reader, writer

    def run(self) -> None:
        """Answer requests until PLAY, then send."""
        while (request := self._request()) is not None:
            method, _, headers = request
            self._camera.requests.append(method)
            key = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            if method != "OPTIONS" and headers.get("authorization") != f"Basic {key}":
                self._answer(headers, "401 Unauthorized", {"WWW-Authenticate": 'Basic realm="camera"'})
            elif method == "DESCRIBE":
                self._answer(headers, "200 OK", {"Content-Type": "application/sdp"}, _SDP)
            elif method == "SETUP":
                transport = {"Transport": "RTP/AVP/TCP;unicast;interleaved=0-1", "Session": "1"}
                self._answer(headers, "200 OK", transport)
            elif method == "PLAY":
                self._answer(headers, "200 OK", {"Session": "1"})
                return self._send()
            else:
                self._answer(headers, "200 OK", {"Public": "OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN"})

    def _request(self) -> tuple[str, str, dict[str, str]] | None:
        lines = []
        while (line := self._reader.readline().decode().strip()) or not lines:
            if not line:
                return None
            lines.append(line)
        method, url, _ = lines[0].split(" ")
        found = (re.match(r"([^:]+):\s*(.*)", line) for line in lines[1:])
        return method, url, {one[1].lower(): one[2] for one in found if one}

    def _answer(self, asked: dict[str, str], status: str, headers: dict[str, str], body: str = "") -> None:
        told = {"CSeq": asked["cseq"], **headers, "Content-Length": str(len(body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
        self._writer.write(f"RTSP/1.0 {status}\r\n{head}\r\n{body}".encode())

    def _send(self) -> None:
        """Pictures in packets, until the camera is down or the player leaves."""
        sequence = 0
        for place, units in enumerate(encoded(self._camera.picture, self._camera.fps)):
            if self._camera.is_down.is_set():
                return
            parts = [
                part for number, unit in enumerate(units) for part in packets(unit, number + 1 == len(units))
            ]
            for payload, last in parts:
                stamp = place * 90_000 // self._camera.fps
                head = struct.pack(">BBHII", 0x80, 96 | last << 7, sequence & 0xFFFF, stamp, 1)
                sequence += 1
                self._writer.write(struct.pack(">cBH", b"$", 0, len(head) + len(payload)) + head + payload)
            time.sleep(1 / self._camera.fps)


def encoded(picture: Callable[[int], np.ndarray], fps: int) -> Iterator[list[bytes]]:
    """The NAL units of one picture after the other; each tenth can be decoded by itself."""
    codec: Any = av.CodecContext.create("libx264", "w")
    height, width = picture(0).shape[:2]
    codec.width, codec.height, codec.pix_fmt = width, height, "yuv420p"
    codec.time_base, codec.framerate = Fraction(1, fps), Fraction(fps)
    codec.options = {"tune": "zerolatency", "preset": "ultrafast", "g": "10", "crf": "18"}
    number = 0
    while True:
        frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
        frame.pts = number
        number += 1
        for packet in codec.encode(frame):
            yield [unit for unit in re.split(rb"\x00\x00\x00?\x01", bytes(packet)) if unit]


def packets(unit: bytes, last: bool) -> list[tuple[bytes, bool]]:
    """A NAL unit as payloads of RTP, and which of them ends a picture."""
    if len(unit) <= _PART:
        return [(unit, last)]
    kind, parts = unit[0], [unit[1:][start : start + _PART] for start in range(0, len(unit) - 1, _PART)]
    found = []
    for number, part in enumerate(parts):
        first, end = number == 0, number == len(parts) - 1
        head = bytes([kind & 0xE0 | 28, first << 7 | end << 6 | kind & 0x1F])
        found.append((head + part, last and end))
    return found


@contextmanager
def rtsp_camera(picture: Callable[[int], np.ndarray], fps: int = 20) -> Iterator[RtspCamera]:
    """A camera that is up."""
    one = RtspCamera(picture, fps)
    one.up()
    try:
        yield one
    finally:
        one.down()
