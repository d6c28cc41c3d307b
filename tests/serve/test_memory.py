"""What requests must not leave behind, or hold up: large pictures, and texts that no prompt can be."""

from __future__ import annotations

import base64
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtp.runtime.scheduler import Scheduler
from vtp.serve import memory
from vtp.serve.http import fields

from .client import CHAT, Site, shown, wait_until, words

# glibc keeps what lies below a block that is still in use: here nearly all of 400 MB.
FREED = """
import ctypes, platform, re, sys
from vtp.serve.memory import trim
if platform.libc_ver()[0] != "glibc":
    sys.exit(77)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: everything comes from the heap

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10

blocks = [libc.malloc(4 << 20) for _ in range(100)]
for block in blocks:
    ctypes.memset(block, 1, 4 << 20)
last = libc.malloc(4096)
for block in blocks:
    libc.free(block)
before = resident()
trim()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
def test_freed_memory_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 300


def test_it_is_asked_for_after_large_pictures_only(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for several of them."""
    calls: list[None] = []
    monkeypatch.setattr(memory, "_SECONDS", 0.2)
    monkeypatch.setattr(memory, "trim", lambda: calls.append(None))
    ask = [shown(Image.new("RGB", (64, 64))), words("how many ?")]
    assert site.chat(ask, max_tokens=1).status == 200
    trimmer = site.server.config.app.state.service.trimmer  # type: ignore[union-attr]
    assert trimmer._timer is None and not calls
    large = [shown(Image.new("RGB", (2000, 2000))), words("how many ?")]
    for _ in range(2):
        assert site.chat(large, max_tokens=1).status == 200
    wait_until(lambda: calls and trimmer._timer is None)
    assert len(calls) <= 2


def test_without_glibc_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory._malloc_trim.cache_clear()
    memory.trim()
    memory._malloc_trim.cache_clear()


def test_text_that_no_tokens_could_hold_is_not_searched(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searching 60 MB holds up every other request for half a second."""

    def submit(*given: Any, **options: Any) -> Any:
        raise AssertionError("the text reached the model's queue")

    monkeypatch.setattr(Scheduler, "submit", submit)
    (model,) = site.models
    most = max(2**22, 1024 * model.manifest.model.max_length)
    for content in ("x" * (most + 1), [words("x" * most), words("y")]):
        answer = site.chat(content)
        assert answer.status == 400 and answer.error["code"] == "context_length_exceeded"
        assert answer.error["message"].startswith(
            f"the prompt has {most + 1} characters, more than the {most}"
        )


# -- what is left of a request once it was answered ----------------------------------------------------------

LONG = "x" * 2**19
MARKED = base64.b64encode((Path(__file__).parents[2] / "docs/photo.jpg").read_bytes() + bytes(2**19)).decode()
PICTURE = {"type": "image_url", "image_url": f"data:;base64,{MARKED}"}
NO_PICTURE = {"type": "image_url", "image_url": f"data:;base64,{LONG}"}
NO_URL = {"type": "image_url", "image_url": f"http://{LONG}"}
DECISION = {"type": "yes_no", "question": "is it ?"}


def turn(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


# What is refused, early or late, by each of the parts that a request goes through; and what is answered.
LEFT: dict[str, tuple[str, Any, int]] = {
    "no JSON": (CHAT, f'{{"a": "{LONG}'.encode(), 400),
    "a field": (CHAT, {"messages": [{"role": LONG, "content": "a"}]}, 400),
    "a model": (CHAT, {"messages": turn("a"), "model": LONG}, 404),
    "a long prompt": (CHAT, {"messages": turn(LONG)}, 400),
    "a prompt that cannot be": (CHAT, {"messages": turn([PICTURE, words("<image>")])}, 400),
    "nothing asked": (CHAT, {"messages": turn([PICTURE]), "stream": True}, 400),
    "a picture": (CHAT, {"messages": turn([NO_PICTURE])}, 400),
    "a picture's URL": (CHAT, {"messages": turn([NO_URL])}, 400),
    "a decision": ("/v1/decisions", {"questions": [{**DECISION, "question": LONG}]}, 400),
    "an option": ("/v1/decisions", {"questions": [{**DECISION, "yes": LONG}]}, 400),
    "the second decision": (
        "/v1/decisions",
        {"images": [PICTURE["image_url"]], "questions": [DECISION, {**DECISION, "question": "<image>"}]},
        400,
    ),
    "Ollama's": ("/api/generate", {"prompt": LONG, "images": [MARKED]}, 400),
    "a good one": (CHAT, {"messages": turn([PICTURE, words("what ?")]), "max_tokens": 1}, 200),
    "a good stream": (
        CHAT,
        {"messages": turn([PICTURE, words("what ?")]), "max_tokens": 1, "stream": True},
        200,
    ),
}


@contextmanager
def rings() -> Iterator[list[Any]]:
    """Objects that only a search for rings frees, of what the block leaves behind."""
    found: list[Any] = []
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found += gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("name", LEFT)
def test_an_answered_request_is_not_kept(site: Site, name: str) -> None:
    """An error and the frames that it came through may hold each other, and with them what a client sent.
    Python looks for such rings by the number of objects, so that a dozen bodies of 64 MiB stayed."""
    path, body, status = LEFT[name]
    site.send(path, body)  # what is made once
    with rings() as left:
        answer = site.send(path, body)
        assert answer.status == status, answer.content
        wait_until(lambda: not site.server.server_state.tasks)
    held = [
        type(one).__name__
        for one in left
        for part in gc.get_referents(one)
        if isinstance(part, str | bytes | bytearray) and len(part) >= len(LONG)
    ]
    assert not held


def test_huge_bodies_are_read_one_after_the_other(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text with one letter beyond the first 65,536 takes four bytes for each, twice while JSON is read."""
    at_once, most, parse = 0, 0, fields.parse_json

    def parse_json(*given: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.1)
        at_once -= 1
        return parse(*given)

    monkeypatch.setattr(fields, "parse_json", parse_json)
    body = b'{"user": "' + b"x" * fields._HUGE + b'"}'
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(site.send(CHAT, body).status)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [400] * 4 and most == 1
