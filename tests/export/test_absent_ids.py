"""Image tokens outside the embedding table, which Gemma 3 and PaliGemma may have: answers of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.export.exporter import Request, export
from vtp.runtime import Pipeline

from ..models import tiny_gemma

WORDS, STEPS = "what shape is it ?", 8
TOKENS = {"gemma3": "<image_soft_token>", "pali": "<image>"}


def made(kind: str, patch: pytest.MonkeyPatch, rows: int = 0) -> Any:
    """A tiny model whose image token is the first id that its embedding table (of `rows`) has no row for."""
    token = TOKENS[kind]
    patch.setattr(tiny_gemma, "SPECIAL", [text for text in tiny_gemma.SPECIAL if text != token])
    image = tiny_gemma.gemma_tokenizer(image_token=token).convert_tokens_to_ids(token)
    patch.setattr(tiny_gemma, "SOFT" if kind == "gemma3" else "IMAGE", image)
    text = tiny_gemma._text
    patch.setattr(tiny_gemma, "_text", lambda *sizes: {**text(*sizes), "vocab_size": rows or image})
    model = tiny_gemma.tiny_gemma3(seed=3) if kind == "gemma3" else tiny_gemma.tiny_paligemma()
    assert model.config.image_token_id == image >= model.get_input_embeddings().num_embeddings
    return model


def transformers_answer(model: Any, kind: str, picture: Image.Image) -> list[int]:
    processor = tiny_gemma.processor_of(model)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": WORDS}]}
    text = f"<image>{WORDS}"
    if kind == "gemma3":
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
    given = processor(images=[[picture]], text=[text], return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**given, max_new_tokens=STEPS, do_sample=False)
    return list(ids[0, given["input_ids"].shape[1] :].tolist())


@pytest.mark.parametrize("kind", TOKENS)
def test_answers_equal_transformers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a word that the tokenizer knows and the model does not is one line, which no export tries."""
    model = tiny_gemma.save_gemma(tmp_path / "model", made(kind, monkeypatch))
    tokenizer = tiny_gemma.processor_of(model).tokenizer
    tokenizer.add_tokens(["zzyzx"])
    tokenizer.save_pretrained(tmp_path / "model")
    pixels = np.random.default_rng(5).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    export(Request(tmp_path / "bundle", str(tmp_path / "model"), "none", max_length=128))
    with Pipeline.load(tmp_path / "bundle", threads=1) as pipe:
        answer = pipe.generate(picture, WORDS, max_new_tokens=STEPS)
        with pytest.raises(UsageError, match=r"'zzyzx'.*embedding table") as caught:
            pipe.generate(picture, "what is zzyzx ?")
    assert answer.token_ids == transformers_answer(model, kind, picture)
    assert "\n" not in str(caught.value)


def test_words_outside_the_table_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers raises an IndexError for them."""
    rows = 280  # letters from "b" on lie behind it
    model = made("pali", monkeypatch, rows)
    tiny_gemma.save_gemma(tmp_path / "model", model)
    with pytest.raises(IndexError):
        model.get_input_embeddings()(torch.tensor([[rows]]))
    request = Request(tmp_path / "bundle", str(tmp_path / "model"), "none", max_length=128)
    with pytest.raises(VtpError, match=f"embedding table has {rows} rows") as caught:
        export(request)
    assert "\n" not in str(caught.value) and not (tmp_path / "bundle").exists()
