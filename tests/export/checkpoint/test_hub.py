"""Models of a hub that cannot be reached, and weights beyond float16."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
import torch

from vtp.engines import VtpError
from vtp.export.checkpoint import loading as checkpoint
from vtp.export.exporter import Request, export

from ..test_bad_models import tensors
from .test_hostile_folders import Change, cached


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a hub that cannot be reached."""

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    return tmp_path / "hub"


def test_an_unreached_hub_says_what_to_do(hub: Path) -> None:
    with pytest.raises(VtpError, match=r"ConnectionError: Name or service not known.*hf download org/name"):
        checkpoint.resolve("org/name")


def test_an_offline_hub_is_not_asked(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(VtpError, match=r"HF_HUB_OFFLINE is set: unset it, or download it elsewhere"):
        checkpoint.resolve("org/name")


@pytest.mark.parametrize("offline", [False, True])
def test_a_cached_snapshot_is_used(
    hub: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    cached(folder)
    refs = hub / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abc")
    assert checkpoint.resolve("org/name") == hub / "models--org--name" / "snapshots" / "0123abc"
    assert checkpoint.load(checkpoint.resolve("org/name"), "float32").name == "org/name"


@pytest.mark.slow  # it waits for the client's own ten seconds
def test_a_hub_that_never_answers(tmp_path: Path) -> None:
    """It takes the connection and says nothing: given up after seconds, not minutes."""
    import subprocess
    import sys

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "vtp.export.cli", "--model", "org/name", "-o", str(tmp_path / "out")],
            env={
                **os.environ,
                "HF_ENDPOINT": address,
                "HF_HOME": str(tmp_path),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_ETAG_TIMEOUT": "2",  # ten seconds unless it is set
            },
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert done.returncode == 1
    assert re.fullmatch(r"vtp-export: error: no such model folder: org/name; .*Timeout.*\n", done.stderr)


# -- float16 -------------------------------------------------------------------------------------------------


def scaled(part: str, factor: float, dtype: torch.dtype = torch.float32) -> Change:
    return tensors(
        lambda found: {
            name: (tensor * factor if part in name else tensor).to(dtype) for name, tensor in found.items()
        }
    )


def in_float16(folder: Path, tmp_path: Path, verify: str) -> str:
    request = Request(
        tmp_path / "out",
        model=str(folder),
        max_length=128,
        method="none",
        dtype="float16",
        verify=verify,
    )
    with pytest.raises(VtpError) as caught:
        export(request)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_a_weight_beyond_float16_is_named(folder: Path, tmp_path: Path) -> None:
    scaled("layers.1.mlp.up_proj", 1e7, torch.bfloat16)(folder)
    text = in_float16(folder, tmp_path, "none")
    assert re.search(
        r"the weight \S*layers\.1\.mlp\.up_proj\.weight holds \S+, beyond float16's 65504", text
    ), text
    assert "--dtype float32" in text


def test_values_beyond_float16_are_named(folder: Path, tmp_path: Path) -> None:
    scaled("multi_modal_projector.linear_2", 30000.0)(folder)
    text = in_float16(folder, tmp_path, "full")
    assert "float16 overflow: projector.onnx gives image_embeds" in text and "--dtype float32" in text
