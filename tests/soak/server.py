"""make soak-serve: a real vtp-serve under mixed load for an hour; it must not grow, fail or err.

    python -m tests.soak.server [--seconds N] [--bundle DIR] [--seed N]

Bursts of requests at once, in random order: whole answers and streams, compared with `Pipeline.generate`;
streams that their clients leave, requests whose clients go away at once, questions for decisions, Ollama's
API, and bad input of many kinds. One summary line; exit code 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from vtp import Pipeline
from vtp.engines.child import python_command
from vtp.scenes import examples_dir

from ..kill.bundles import make_bundles
from .growth import ask, course, grown, look

CHAT, PATIENCE = "/v1/chat/completions", 120.0
POOLED = min(32, (os.cpu_count() or 1) + 4)  # threads of asyncio's pool, in which pictures are decoded
PROMPTS = ("what color is the star ?", "how many circles are there ?", "where is the red one ?")
BAD: tuple[tuple[Any, int], ...] = (
    (b"{", 400),
    (b"\xff\xfe", 400),
    ([], 400),
    ({}, 400),
    ({"messages": []}, 400),
    ({"messages": [{"role": "user", "content": 3}]}, 400),
    ({"messages": [{"role": "user", "content": "what ?"}], "max_tokens": -1}, 400),
    ({"messages": [{"role": "user", "content": "what ?"}], "temperature": "hot"}, 400),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400),
    ({"messages": [{"role": "user", "content": "what " * 5000}]}, 400),
    ({"model": "another", "messages": [{"role": "user", "content": "what ?"}]}, 404),
)
_URLS = ("data:image/png;base64,AAAA", "data:,x", "http://127.0.0.1/x.png", "file:///etc/passwd", "")


class Asker:
    """What is asked of one server; what was answered wrongly is in `wrong`."""

    def __init__(self, port: int, bundle: Path, seed: int) -> None:
        self._port, self._chance = port, random.Random(seed)
        self._pictures = [
            f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
            for path in sorted(examples_dir().glob("*.png"))
        ]
        paths = sorted(examples_dir().glob("*.png"))
        with Pipeline.load(bundle, threads=1) as pipe:
            self._expected = {
                (picture, prompt): pipe.generate(path, prompt, max_new_tokens=12).raw_text
                for picture, path in enumerate(paths)
                for prompt in PROMPTS
            }
        self._kinds = [self._whole, self._stream, self._leave, self._gone, self._ollama, self._refused]
        if self._can_decide():
            self._kinds.append(self._decide)
        self.wrong: list[str] = []
        self.done: Counter[str] = Counter()

    def burst(self) -> None:
        """One to eight requests at once."""
        some = [self._chance.choice(self._kinds) for _ in range(self._chance.randint(1, 8))]
        seeds = [self._chance.random() for _ in some]
        threads = [threading.Thread(target=self._try, args=pair) for pair in zip(some, seeds, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _try(self, kind: Callable[[random.Random], None], seed: float) -> None:
        name = kind.__name__.strip("_")
        try:
            kind(random.Random(seed))
        except Exception as error:
            self.wrong.append(f"{name}: {type(error).__name__}: {error}")
        self.done[name] += 1

    def _question(self, chance: random.Random, **more: Any) -> tuple[dict[str, Any], str]:
        picture, prompt = chance.randrange(len(self._pictures)), chance.choice(PROMPTS)
        content = [
            {"type": "image_url", "image_url": {"url": self._pictures[picture]}},
            {"type": "text", "text": prompt},
        ]
        asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, **more}
        return asked, self._expected[picture, prompt]

    def _whole(self, chance: random.Random) -> None:
        asked, expected = self._question(chance)
        said = json.loads(self._send(CHAT, asked, 200))["choices"][0]["message"]["content"]
        assert said == expected, f"{said!r} is not {expected!r}"

    def _stream(self, chance: random.Random) -> None:
        asked, expected = self._question(chance, stream=True)
        lines = self._send(CHAT, asked, 200).decode().splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        assert lines[-2:] == ["data: [DONE]", ""] and said == expected, f"{said!r} is not {expected!r}"

    def _leave(self, chance: random.Random) -> None:
        asked, _ = self._question(chance, stream=True)
        with self._raw(asked) as raw:
            assert raw.recv(200).startswith(b"HTTP/1.1 200")

    def _gone(self, chance: random.Random) -> None:
        asked, _ = self._question(chance, stream=chance.random() < 0.5)
        with self._raw(asked):
            time.sleep(chance.random() * 0.05)

    def _can_decide(self) -> bool:
        """Whether the model's tokenizer has tokens for yes and no, which a tiny one lacks."""
        try:
            self._decide(self._chance)
        except AssertionError as error:
            assert "has no token for the label" in str(error), error
            return False
        return True

    def _decide(self, chance: random.Random) -> None:
        questions = [{"type": "yes_no", "question": "is there a star ?"}]
        asked = {"images": [chance.choice(self._pictures)], "questions": questions}
        json.loads(self._send("/v1/decisions", asked, 200))

    def _ollama(self, chance: random.Random) -> None:
        image = chance.choice(self._pictures).partition(",")[2]
        asked = {"messages": [{"role": "user", "content": PROMPTS[0], "images": [image]}], "stream": False}
        json.loads(self._send("/api/chat", {"model": "bundle", **asked, "options": {"num_predict": 4}}, 200))

    def _refused(self, chance: random.Random) -> None:
        if chance.random() < 0.5:
            body, status = chance.choice(BAD)
        else:
            part = {"type": "image_url", "image_url": {"url": chance.choice(_URLS)}}
            body, status = {"messages": [{"role": "user", "content": [part]}]}, 400
        error = json.loads(self._send(CHAT, body, status))["error"]
        assert error["message"] and "\n" not in error["message"]

    def _send(self, path: str, body: Any, status: int) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        assert answer.status == status, f"status {answer.status} instead of {status}: {content[:200]!r}"
        return content

    @contextmanager
    def _raw(self, body: Any) -> Iterator[socket.socket]:
        data = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE) as raw:
            raw.sendall(head.encode() + data)
            yield raw


@contextmanager
def serving(bundle: Path) -> Iterator[tuple[int, int]]:
    """Process number and port of a vtp-serve that runs until the block is left."""
    command = python_command(
        "vtp.serve.cli", str(bundle), "--name", "bundle", "--port", "0", "--threads", "1"
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = (re.search(r"listening on http://[^ ]*:(\d+)", line) for line in server.stdout)
            port = int(next(filter(None, found))[1])
            threading.Thread(target=server.stdout.read, daemon=True).start()
            yield server.pid, port
        finally:
            server.terminate()
            if server.wait(60):
                raise SystemExit(f"vtp-serve ended with {server.returncode}")


def main() -> int:
    """See the module's words."""
    parser = argparse.ArgumentParser(prog="tests.soak.server", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600, metavar="N", help="how long (%(default)s)")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="the one that is served")
    parser.add_argument("--least", type=int, default=60, metavar="N", help="bursts (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vtp-soak-") as name:
        bundle = args.bundle or make_bundles(Path(name))[0]
        with serving(bundle) as (process, port):
            asker = Asker(port, bundle, args.seed)
            for _ in range(10):
                asker.burst()  # what is made once is no growth
            _, samples = ask(
                {"burst": asker.burst}, args.seconds, args.least, random.Random(0), partial(look, process)
            )
    bad = [*grown(samples, POOLED), *asker.wrong]
    for line in bad[:20]:
        print(f"bad: {line}")
    kinds = ", ".join(f"{often} {kind}" for kind, often in sorted(asker.done.items()))
    print(
        f"soak of vtp-serve: {args.seconds:g} s, {sum(asker.done.values())} requests ({kinds}); "
        f"{course(samples)}; {len(bad)} bad (seed {args.seed})"
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
