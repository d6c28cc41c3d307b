"""llama.cpp as a peer: on converted tiny models its binaries answer as transformers does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vtp.bench.common.agreement import likeness
from vtp.bench.compare.llamacpp import built, convert
from vtp.bench.compare.peer import Spec, peer_class
from vtp.bench.compare.peer_llamacpp import LlamaCpp, class_last
from vtp.bench.compare.peer_torch import Torch
from vtp.engines import VtpError
from vtp.runtime.compare import compare

from ..models.tiny import save_tiny

pytest.importorskip("gguf", reason="gguf is not installed")
needs_build = pytest.mark.skipif(not built.is_built(), reason="llama.cpp is not built: make llamacpp")

MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"decoder": "qwen2", "tied": True, "head_dim": 16},
    "llama": {"decoder": "llama", "head_dim": 16},
    "siglip": {"decoder": "qwen2", "vision": "siglip", "head_dim": 16},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llamacpp")
    for name, options in MODELS.items():
        save_tiny(root / name, **options)
    return root


def test_without_a_build_the_peer_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(built.FOLDER, str(tmp_path))
    assert peer_class("llamacpp-q4_0").lacking() == "make llamacpp" and built.how_built(tmp_path) == {}
    with pytest.raises(VtpError, match="llama-quantize is not built; run: make llamacpp"):
        convert.quantise(tmp_path / "a", tmp_path / "b", "q4_0")


class Exact(LlamaCpp):
    """Everything in float32, cache and attention included."""

    text = "f32"
    more = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")


def spec(models: Path, name: str, picture: Path) -> Spec:
    work = str(models / f"{name}-work")
    return Spec(str(models / name), work, str(picture), "what color is the star ?", 8, 1, [], 3)


@pytest.fixture
def answer(picture_file: Path) -> Iterator[Any]:
    """Opens a peer and returns its tokens and first logits; ends it when the test does."""
    opened: list[Any] = []

    def ask(kind: Any, told: Spec) -> tuple[list[int], np.ndarray]:
        one = kind(told)
        opened.append(one)
        if one.made():
            one.prepare()
        one.open()
        return one.run().tokens, one.first_logits()

    yield ask
    for one in opened:
        one.close()


def centred(logits: np.ndarray) -> np.ndarray:
    return logits - logits.mean()


@needs_build
@pytest.mark.parametrize("name", list(MODELS))
def test_llama_cpp_answers_as_transformers_does(
    models: Path, picture_file: Path, answer: Any, name: str
) -> None:
    """Greedy tokens, and the logits of all of the vocabulary; the projector's gelu is llama.cpp's by tanh."""
    told = spec(models, name, picture_file)
    tokens, logits = answer(Exact, told)
    wanted_tokens, wanted = answer(peer_class("torch-class-last"), told)
    found = compare(centred(logits), centred(wanted), "float16")
    assert found.ok and found.cosine > 0.9999, found
    assert tokens == wanted_tokens
    plain = compare(centred(logits), centred(answer(Torch, told)[1]), "float16")
    assert plain.ok == (name == "siglip"), "of CLIP llama.cpp takes the class row for a patch: issue 25814"


@needs_build
def test_fewer_bits_are_the_same_model(models: Path, picture_file: Path, answer: Any) -> None:
    told = spec(models, "qwen2", picture_file)
    wanted = answer(peer_class("torch-class-last"), told)
    cosines = [
        likeness(wanted, answer(peer_class(name), told))["cosine"]
        for name in ("llamacpp", "llamacpp-q8_0", "llamacpp-f32-q4_0")
    ]
    assert cosines[0] > 0.999 and cosines[1] > 0.98 and 0.5 < cosines[2] < cosines[1]


@needs_build
def test_a_peers_parts_make_up_its_first_token(models: Path, picture_file: Path) -> None:
    peer = LlamaCpp(spec(models, "siglip", picture_file))
    try:
        peer.prepare()
        peer.open()
        run = peer.run()
        assert len(run.tokens) == 8 and set(run.parts) == {"encoder", "prompt"}
        assert 0 < sum(run.parts.values()) <= run.ttft and run.tpot > 0
        assert Path(f"/proc/{peer.pid}/status").exists()
    finally:
        peer.close()


def test_class_last_rolls_rows_and_keeps_places() -> None:
    embeddings = torch.nn.Module()
    embeddings.position_embedding = torch.nn.Embedding(3, 2)
    places = embeddings.position_embedding.weight.detach()
    rows = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]])
    found = class_last(embeddings, None, rows + places)
    assert torch.allclose(found, rows[:, [1, 2, 0]] + places)
