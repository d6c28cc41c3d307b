"""What disks do to a running server: the bundle's folder goes or is replaced, and the log's disk is full."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtp.runtime import Pipeline
from vtp.runtime.scheduler import Scheduler
from vtp.serve import shadow

from .client import serving, shown, wait_until, words


@pytest.mark.parametrize("replaced", [False, True], ids=["gone", "replaced"])
def test_a_bundle_whose_folder_goes_is_served_on(
    exported: Callable[[str], Any], alone: Pipeline, picture: Image.Image, tmp_path: Path, replaced: bool
) -> None:
    """Also what was not asked of it before: pictures, a form."""
    folder = tmp_path / "served"
    shutil.copytree(exported("vispruner").folder, folder)
    with Scheduler.load(folder, threads=1, slots=2) as scheduler, serving({"tiny": scheduler}) as site:
        folder.rename(tmp_path / "elsewhere")
        shutil.rmtree(tmp_path / "elsewhere")
        if replaced:
            shutil.copytree(exported("none").folder, folder)
        for keep in (3, 6):
            answer = site.chat([shown(picture), words("how many ?")], max_tokens=9, vtp={"keep_tokens": keep})
            assert (
                answer.text
                == alone.generate(picture, "how many ?", max_new_tokens=9, keep_tokens=keep).raw_text
            )
        form = {"type": "json_schema", "json_schema": {"schema": {"enum": [1, 2]}}}
        assert json.loads(site.chat("how many ?", max_tokens=9, response_format=form).text) in (1, 2)
        assert site.send("/v1/models").json["data"][0]["id"] == "tiny"


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, real = tmp_path / "log.jsonl", os.write
    shadow.append(log, b'{"a": 1}\n')
    with monkeypatch.context() as patch:
        patch.setattr(shadow.os, "write", lambda file, data: real(file, data[:4]))
        with pytest.raises(OSError, match="only 4 of 9 bytes") as caught:
            shadow.append(log, b'{"b": 2}\n')
    assert caught.value.errno == errno.ENOSPC
    shadow.append(log, b'{"c": 3}\n')
    assert [json.loads(line) for line in log.read_text().splitlines()] == [{"a": 1}, {"c": 3}]


def test_a_full_disk_is_said_and_nothing_else(
    exported: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Requests are answered, failures counted, and the log says why once, then sparingly."""

    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = logging.getLogger("vtp.serve.shadow")
    sparing = shadow.Sparing()
    monkeypatch.setattr(log, "filters", [sparing])
    with Scheduler.load(exported("none").folder, threads=1, slots=1, queue=0) as other:
        idle = shadow.Shadow(other, lambda: True, 1.0, shadow.Files(tmp_path / "log.jsonl"))
        ticket = other.submit(Image.new("RGB", (40, 30)), prompt="how many ?", max_new_tokens=5, logprobs=0)
        result = ticket.result()
        wrong = replace(result, raw_text="something else")
        monkeypatch.setattr(shadow.os, "write", full)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many ?"}]}]
        exchange = shadow.Exchange(
            [Image.new("RGB", (40, 30))], messages, {"max_new_tokens": 5, "logprobs": 0}, wrong
        )
        for _ in range(12):
            idle.offer(exchange)
        wait_until(lambda: idle._outcomes["failed"] == 12)
        idle.close()
    assert not (tmp_path / "log.jsonl").read_text()
    said = [one.getMessage() for one in caplog.records if one.name == log.name]
    assert said == [
        "a request was not compared: a file could not be written: No space left on device",
        "a request was not compared: a file could not be written: No space left on device (10 times so far)",
    ]
