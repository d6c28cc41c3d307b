"""The commands on arm64: vtp-watch about a video, vtp-serve to a client on this machine; as on x86-64.

H.264 is decoded to the same numbers on both; what FFmpeg makes of them as RGB may differ by a rounding.
"""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.serve.streams.moving import moving, write_video
from vtp.scenes import examples_dir

from .environment import ARM64_PYTHON, BUILD, HOST, MORE, WHEELS, environment
from .margins import MARGIN

FRAMES, STEP = 3, 20  # of the video; pixels that its scene moves between two
QUESTION = "what color is the star ?"
SECONDS = 900  # for a server to open a bundle, and for an answer
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue", "green"]}},
    "required": ["color"],
    "additionalProperties": False,
}
REQUESTS: Mapping[str, dict[str, Any]] = {
    "an answer": {"logprobs": True, "max_tokens": 8},
    "a stream": {"stream": True, "max_tokens": 8},
    "JSON": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        "max_tokens": 40,
    },
}


def check(bundle: Path) -> int:
    """Ask it by both commands on both machines; a line for each answer, 1 if any differs."""
    video = BUILD / "moving.mp4"
    write_video(video, moving(FRAMES, STEP))
    told = {}
    for where, python, sites in (
        ("x86-64", (sys.executable,), (HOST,)),
        ("arm64", ARM64_PYTHON, (MORE, WHEELS)),
    ):
        variables = environment(*sites)
        told[where] = {**watched(python, variables, bundle, video), **served(python, variables, bundle)}
    return report(told["arm64"], told["x86-64"])


def watched(
    python: Sequence[object], variables: Mapping[str, str], bundle: Path, video: Path
) -> dict[str, Any]:
    """What vtp-watch says about each frame of a file."""
    words = ("-m", "vtp", "watch", bundle, video, "--every-frame", "--json", "--prompt", QUESTION)
    command = [str(word) for word in (*python, *words)]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"vtp-watch ended with exit code {done.returncode}")
    found = {}
    for line in map(json.loads, done.stdout.splitlines()):
        stamp, visual = line["frame"]["stamp_ns"], line["visual_tokens"]
        found[f"vtp-watch, frame at {stamp / 1e6:.0f} ms"] = {"text": line["text"], "visual_tokens": visual}
    return found


def served(python: Sequence[object], variables: Mapping[str, str], bundle: Path) -> dict[str, Any]:
    """What vtp-serve answers, and how it ends."""
    found: dict[str, Any] = {}
    with serving(python, variables, bundle) as (process, address):
        for name, options in REQUESTS.items():
            found[f"vtp-serve, {name}"] = _ask(address, options)
        process.send_signal(signal.SIGTERM)
        found["vtp-serve, SIGTERM"] = {"text": f"exit code {process.wait(SECONDS)}"}
    return found


@contextmanager
def serving(
    python: Sequence[object], variables: Mapping[str, str], bundle: Path
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server that takes requests, and its address."""
    log = BUILD / "serve.log"
    command = [str(word) for word in (*python, "-m", "vtp", "serve", bundle, "--port", 0)]
    with log.open("wb") as out, subprocess.Popen(command, env=variables, stdout=out, stderr=out) as process:
        try:
            address = _until(process, lambda: _listening(log))
            _until(process, lambda: _ready(address))
            yield process, address
        finally:
            process.kill()


def _listening(log: Path) -> str:
    found = re.search(r"listening on (\S+)", log.read_text(encoding="utf-8", errors="replace"))
    return found[1] if found else ""


def _ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health/ready", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:  # an HTTPError is one as well: it loads
        return False


def _until(process: subprocess.Popen[bytes], found: Callable[[], Any]) -> Any:
    """What `found` gives as soon as it is true; an error if the server ends or takes too long."""
    end = time.monotonic() + SECONDS
    while not (value := found()):
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"vtp-serve did not start: see {BUILD / 'serve.log'}")
        time.sleep(0.5)
    return value


def _ask(address: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The text of an answer, its visual tokens and, where the request asks for them, log-probabilities."""
    picture = base64.b64encode((examples_dir() / "scene.png").read_bytes()).decode()
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    content = [shown, {"type": "text", "text": QUESTION}]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **options}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), headers, method="POST"
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        said = answer.read().decode()
    if options.get("stream"):
        events = [line.removeprefix("data: ") for line in said.splitlines() if line.startswith("data: {")]
        deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
        return {"text": "".join(delta.get("content") or "" for delta in deltas)}
    whole = json.loads(said)
    (choice,) = whole["choices"]
    likely = [one["logprob"] for one in (choice["logprobs"] or {}).get("content", [])]
    visual = whole["vtp"]["visual_tokens"]
    return {"text": choice["message"]["content"], "visual_tokens": visual, "logprobs": likely}


def report(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> int:
    """A line for each answer; 1 if any differs in more than MARGIN nats of a token."""
    wrong = sorted(set(found) ^ set(wanted))
    for name in wrong:
        print(f"WRONG  {name}: on one machine only")
    for name in (one for one in wanted if one in found):
        mine, other = dict(found[name]), dict(wanted[name])
        here, there = mine.pop("logprobs", []), other.pop("logprobs", [])
        apart = max([0.0, *(abs(one - two) for one, two in zip(here, there, strict=False))])
        nats = f", {apart:.1e} nats apart" if apart else ""
        if mine == other and len(here) == len(there) and apart <= MARGIN["float32"]:
            print(f"same   {name}: {mine['text']!r}{nats}")
        else:
            wrong.append(name)
            print(f"WRONG  {name}: {mine}, not {other}{nats}; {len(here)} tokens of {len(there)}")
    return int(bool(wrong) or not wanted)
