"""What requests must not leave behind, or hold up: large pictures, and texts that no prompt can be."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from PIL import Image

from vtp.runtime.scheduler import Scheduler
from vtp.serve import memory

from .client import Site, shown, wait_until, words

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
