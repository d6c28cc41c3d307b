"""ROS 2 in processes of its own: where its Python is, the node, a camera and a peer that talks to the node.

ROS' Python is VTP_ROS_PYTHON, else the one that `make test-ros` installs into build/ros.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "ros"
PATIENCE = 60.0
QUESTION = "what color is the star ?"
_NEEDED = "import rclpy, std_srvs.srv, diagnostic_msgs.msg, vtp.serve.robots.ros2, onnxruntime"


@functools.cache
def ros_python() -> str | None:
    """A Python that has rclpy, vtp and ONNX Runtime; None if there is none."""
    python = os.environ.get("VTP_ROS_PYTHON") or str(BUILD / "bin" / "python")
    try:
        found = subprocess.run([python, "-c", _NEEDED], env=environment(), capture_output=True, check=False)
    except OSError:
        return None
    return python if found.returncode == 0 else None


def environment() -> dict[str, str]:
    """Discovery on this machine alone, in a domain of this run's own."""
    own = {
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "ROS_DOMAIN_ID": str(1 + os.getpid() % 100),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, "AMENT_PREFIX_PATH": os.environ.get("AMENT_PREFIX_PATH", str(BUILD)), **own}


class Process:
    """A child whose lines of JSON are read as they come; what it logs goes into `log`.

    python  that runs it; None: ROS' own
    """

    def __init__(self, words: Sequence[str], python: str | None = None, **options: Any) -> None:
        python = python or ros_python()
        assert python is not None
        self._child = subprocess.Popen(
            [python, *words],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            **options,
        )
        self.lines: list[dict[str, Any]] = []
        self.log: list[str] = []
        self._threads = [
            threading.Thread(target=self._read_lines, daemon=True),
            threading.Thread(target=self._read_log, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _read_lines(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self.lines.append(json.loads(line) if line.startswith("{") else {"text": line})

    def _read_log(self) -> None:
        assert self._child.stderr is not None
        self.log.extend(self._child.stderr)

    def write(self, **said: Any) -> None:
        """Send a line of JSON."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(said) + "\n")
        self._child.stdin.flush()

    def signal(self, number: int) -> None:
        """Send a signal."""
        self._child.send_signal(number)

    def wait(self) -> int:
        """The exit code of a child that ends."""
        code = self._child.wait(PATIENCE)
        for thread in self._threads:
            thread.join(PATIENCE)
        return code

    def end(self, number: int | None = None) -> int:
        """Close its standard input, or send it a signal; then it must end, and no process is left."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        if number is not None and self.running:
            self.signal(number)
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self._child.kill()
            self.wait()
            raise

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._child.poll() is None

    def threads(self) -> int:
        """How many threads it has."""
        return len(list(Path(f"/proc/{self._child.pid}/task").iterdir()))


class Peer(Process):
    """tests/robots/peer.py."""

    def __init__(self) -> None:
        super().__init__([str(Path(__file__).with_name("peer.py"))])
        self._count = 0
        until(lambda: self.topic("ready"), self)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(self._ask, name)

    def _ask(self, do: str, **arguments: Any) -> Any:
        self._count += 1
        number = self._count
        self.write(id=number, do=do, **arguments)
        (answer,) = until(lambda: [line for line in list(self.lines) if line.get("id") == number], self)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def topic(self, name: str) -> list[Any]:
        """What came on a topic so far."""
        return [line["data"] for line in list(self.lines) if line.get("topic") == name]

    def more(self, topic: str, count: int = 1, where: Callable[[Any], bool] = lambda data: True) -> list[Any]:
        """Wait for so many further messages that are wanted; those."""
        before = len(self.topic(topic))
        wanted = lambda: [data for data in self.topic(topic)[before:] if where(data)]  # noqa: E731
        return until(lambda: wanted() if len(wanted()) >= count else None, self)[:count]


@contextmanager
def node(*words: str) -> Iterator[Process]:
    """vtp-ros2 with arguments; it must end well."""
    process = Process(["-m", "vtp.serve.robots.ros2", *words])
    try:
        yield process
    finally:
        code = process.end(signal.SIGINT)
    assert code == 0, process.log


@contextmanager
def camera(pictures: Path, *words: str) -> Iterator[Process]:
    """A camera that publishes."""
    process = Process([str(Path(__file__).with_name("camera.py")), str(pictures), *words])
    try:
        yield process
    finally:
        process.end()


@contextmanager
def peer() -> Iterator[Peer]:
    """Somebody who talks to the node."""
    process = Peer()
    try:
        yield process
    finally:
        process.end()


def until(value: Callable[[], Any], *processes: Process) -> Any:
    """Wait until something is there, and return it."""
    end = time.monotonic() + PATIENCE
    while not (found := value()):
        for process in processes:
            assert process.running, process.log
        assert time.monotonic() < end, [process.log[-20:] for process in processes]
        time.sleep(0.01)
    return found


def write_pictures(path: Path, pictures: Sequence[dict[str, Any]]) -> Path:
    """Messages' fields for camera.py; `data` are bytes."""
    told = [{**one, "data": base64.b64encode(one["data"]).decode()} for one in pictures]
    path.write_text(json.dumps(told))
    return path


def raw(encoding: str, pixels: np.ndarray, padding: int = 0) -> dict[str, Any]:
    """The fields of sensor_msgs/Image for pixels [H,W,bytes of a pixel]."""
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    filled = np.pad(rows, ((0, 0), (0, padding)), constant_values=171)
    return {
        "encoding": encoding,
        "height": height,
        "width": width,
        "step": filled.shape[1],
        "data": filled.tobytes(),
    }


def parameters(bundle: Path, **more: Any) -> list[str]:
    given = {"bundle": bundle, "prompt": QUESTION, "engine": "ort-cpu", "threads": 1, **more}
    return ["--ros-args", *(word for name, value in given.items() for word in ("-p", f"{name}:={value}"))]


def place_of(said: dict[str, Any]) -> int:
    """Which picture an answer is about: the camera says it in the frame's name."""
    return int(said["frame_id"].removeprefix("camera_"))
