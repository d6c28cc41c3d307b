"""llama.cpp as a peer: on converted tiny models its binaries answer as transformers does."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, SmolVLMForConditionalGeneration

from vtp.bench.common.agreement import likeness
from vtp.bench.compare.llamacpp import built, convert
from vtp.bench.compare.llamacpp.server import LlamaServer
from vtp.bench.compare.peer import Spec, peer_class
from vtp.bench.compare.peer_llamacpp import LlamaCpp, class_last
from vtp.bench.compare.peer_torch import Torch
from vtp.engines import VtpError
from vtp.runtime.compare import compare

from ..models.tiny import save_tiny
from ..models.tiny_split import idefics3_processor, save_idefics3
from .smol_vocabulary import add_blank_line

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
    save_idefics3(root / "smolvlm", kind="smolvlm", head_dim=16, factor=2)
    add_blank_line(root / "smolvlm")
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


class SmolVLM:
    """transformers' SmolVLM of a folder and its prompt for one picture, which is cut into tiles."""

    def __init__(self, told: Spec) -> None:
        self.model = SmolVLMForConditionalGeneration.from_pretrained(told.model).eval()
        self.processor = idefics3_processor(self.model, (56, 56))
        self.processor.tokenizer = AutoTokenizer.from_pretrained(told.model)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": told.prompt}]}
        self.words = self.processor.apply_chat_template([turn], add_generation_prompt=True)
        self.given = self.processor(
            images=Image.open(told.image), text=self.words, add_special_tokens=False, return_tensors="pt"
        )

    def answer(self, tokens: int) -> tuple[list[int], np.ndarray]:
        """Greedy tokens, whatever they are, and the first one's logits."""
        count = self.given["input_ids"].shape[1]
        with torch.inference_mode():
            made = self.model.generate(
                **self.given,
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                return_dict_in_generate=True,
                output_logits=True,
            )
        return made.sequences[0, count:].tolist(), made.logits[0][0].float().numpy()


class ExactSmolVLM(Exact):
    """The picture goes to llama.cpp as it is: resizing and cutting it is part of what is compared."""

    def open(self) -> None:
        wanted = SmolVLM(self.spec)
        tokenizer, ids = wanted.processor.tokenizer, wanted.given["input_ids"][0]
        before, after = wanted.words.split("<image>")
        text = len(tokenizer(before + after, add_special_tokens=False).input_ids)
        self._picture = base64.b64encode(Path(self.spec.image).read_bytes()).decode()
        self._vocabulary = wanted.model.config.text_config.vocab_size
        self._start(tokenizer, (before, after), len(ids) - text)


@needs_build
@pytest.mark.parametrize("size", [(60, 60), (112, 41)], ids=["2x2", "1x2"])
def test_a_smolvlm_answers_as_transformers_does(
    models: Path, tmp_path: Path, answer: Any, size: tuple[int, int]
) -> None:
    """Tiles, their names and the whole picture; the count of the prompt's tokens is held by `run`."""
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 255, (*size[::-1], 3), np.uint8)).save(picture)
    told = spec(models, "smolvlm", picture)
    wanted_tokens, wanted = SmolVLM(told).answer(told.tokens)
    tokens, logits = answer(ExactSmolVLM, told)
    found = compare(centred(logits), centred(wanted), "float16")
    assert found.ok and found.cosine > 0.9999, found
    assert tokens == wanted_tokens


@needs_build
def test_a_picture_of_one_tile_comes_twice_to_llama_cpp(
    models: Path, picture_file: Path, tmp_path: Path
) -> None:
    """As a tile and as the whole, where transformers has the whole alone: a limit of the comparison."""
    model, bits = str(models / "smolvlm"), "f32"
    files = convert.text_file(model, tmp_path, bits), convert.vision_file(model, tmp_path, bits, 28)
    with LlamaServer(*files, 1, tmp_path / "server.log", more=("--ctx-size", "256")) as server:
        picture = base64.b64encode(picture_file.read_bytes()).decode()
        prompt = {"prompt_string": server.marker, "multimodal_data": [picture]}
        answer = server.ask("/completion", {"prompt": prompt, "n_predict": 1, "cache_prompt": False})
    # fake, row 1 column 1, 4 of the tile, blank line, fake, global, 4 of the whole, fake
    assert answer["timings"]["prompt_n"] == 2 + 4 + 3 + 4 + 1


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
