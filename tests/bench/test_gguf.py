"""GGUF files hold a model's own weights, and llama.cpp's report is read as it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from vtp.bench.compare.llamacpp import built, convert, report
from vtp.bench.compare.llamacpp.checkpoint import Checkpoint
from vtp.bench.compare.llamacpp.projector_mlp import used_layers
from vtp.bench.compare.llamacpp.text_model import interleaved, write_text_model
from vtp.bench.compare.llamacpp.vision_model import write_vision_model
from vtp.bench.compare.llamacpp.vocabulary import cut_of
from vtp.engines import UsageError, VtpError

from ..models.tiny import save_tiny
from ..models.tiny_split import save_idefics3, save_internvl
from .smol_vocabulary import add_blank_line

gguf = pytest.importorskip("gguf", reason="gguf is not installed")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gguf")
    save_tiny(root / "qwen2", decoder="qwen2", tied=True, head_dim=16)
    save_idefics3(root / "smolvlm", kind="smolvlm")
    add_blank_line(root / "smolvlm")
    return root


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys and tensors of a GGUF file, by the package's reader."""
    reader = gguf.GGUFReader(path)
    return (
        {name: field.contents() for name, field in reader.fields.items()},
        {tensor.name: np.array(tensor.data) for tensor in reader.tensors},
    )


def test_a_decoder_keeps_every_weight(models: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(models / "qwen2")
    write_text_model(checkpoint, tmp_path / "text.gguf", np.float32)
    keys, tensors = read(tmp_path / "text.gguf")
    text = checkpoint.config.text_config
    assert keys["general.architecture"] == "qwen2" and keys["qwen2.rope.freq_base"] == 10000.0
    assert (keys["qwen2.attention.head_count"], keys["qwen2.attention.head_count_kv"]) == (4, 2)
    assert len(keys["tokenizer.ggml.tokens"]) == text.vocab_size and keys["tokenizer.ggml.pre"] == "gpt-2"
    assert "output.weight" not in tensors  # tied
    assert len(tensors) == 2 + text.num_hidden_layers * 12
    wanted = checkpoint.tensor("language_model.model.layers.1.self_attn.q_proj.bias")
    assert np.array_equal(tensors["blk.1.attn_q.bias"], wanted)


def test_an_image_encoder_ends_at_the_features_layer(models: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(models / "qwen2")
    write_vision_model(checkpoint, tmp_path / "mmproj.gguf")
    keys, tensors = read(tmp_path / "mmproj.gguf")
    assert used_layers(checkpoint.config) == 2  # of 3, the features are the last but one's
    assert keys["clip.vision.block_count"] == 2 and keys["clip.vision.feature_layer"] == [2]
    assert keys["clip.projector_type"] == "mlp" and "clip.use_gelu" not in keys  # quick_gelu
    assert not any(name.startswith(("v.blk.2.", "v.post_ln")) for name in tensors)
    assert np.array_equal(
        tensors["v.patch_embd.weight"], checkpoint.tensor("vision_tower.embeddings.patch_embedding.weight")
    )


def test_a_smolvlm_keeps_every_weight(models: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(models / "smolvlm")
    write_vision_model(checkpoint, tmp_path / "mmproj.gguf")
    keys, tensors = read(tmp_path / "mmproj.gguf")
    assert keys["clip.projector_type"] == "idefics3" and keys["clip.use_gelu"]
    assert keys["clip.vision.projector.scale_factor"] == 2 and keys["clip.vision.block_count"] == 2
    assert (keys["clip.vision.image_size"], keys["clip.vision.preproc_image_size"]) == (28, 56)
    assert "clip.vision.feature_layer" not in keys  # all layers
    written = len(tensors)
    write_text_model(checkpoint, tmp_path / "text.gguf", np.float32)
    text_keys, tensors = read(tmp_path / "text.gguf")
    assert text_keys["general.architecture"] == "llama" and text_keys["tokenizer.ggml.pre"] == "smollm"
    assert np.array_equal(tensors["output.weight"], checkpoint.tensor("lm_head.weight"))
    with safe_open(models / "smolvlm/model.safetensors", framework="pt") as file:
        assert written + len(tensors) == len(file.keys())


def test_a_longest_edge_is_a_file_of_its_own(models: Path, tmp_path: Path) -> None:
    """What a bundle of one tile is held against: the checkpoint's own edge makes more tiles."""
    made = convert.vision_file(str(models / "smolvlm"), tmp_path, "f32", 28)
    assert made.name == "mmproj-f32-28.gguf" and read(made)[0]["clip.vision.preproc_image_size"] == 28
    assert convert.main([str(models / "smolvlm"), str(tmp_path), "--longest-edge", "0"]) == 2


def test_marks_that_llama_cpp_would_not_find_are_refused(models: Path, tmp_path: Path) -> None:
    """It looks a blank line up and would put token -1 into the prompt."""
    save_idefics3(tmp_path / "plain", kind="smolvlm")
    with pytest.raises(VtpError, match=r"puts the token '\\n\\n' around pictures.*cuts into 2"):
        convert.vision_file(str(tmp_path / "plain"), tmp_path, "f32")
    with pytest.raises(VtpError, match="is a internvl; the GGUF converter takes one of llava, idefics3"):
        save_internvl(tmp_path / "internvl")
        Checkpoint(tmp_path / "internvl")


def test_queries_of_llama_are_interleaved_head_by_head() -> None:
    """Two heads of four channels: the halves 0 1 | 2 3 become 0 2 1 3."""
    rows = np.arange(8.0)[:, None]
    assert interleaved(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rotating_interleaved_pairs_is_rotating_halves() -> None:
    """llama.cpp turns neighbours, transformers the two halves: the same numbers in another order."""
    rows, angles = np.random.default_rng(0).normal(size=(8, 1)), np.array([0.3, 1.1, 2.0, 0.7])
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = rows[:4], rows[4:]
    halves = np.concatenate([first * cos - second * sin, second * cos + first * sin])
    mixed = interleaved(rows, 1)
    even, odd = mixed[0::2], mixed[1::2]
    turned = np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=1).reshape(8, 1)
    assert np.allclose(turned, interleaved(halves, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": [1, 2]}, "takes one layer of clip_vision_model"),
        ({"vision_feature_select_strategy": "full"}, "takes patches alone"),
        ({"vision_feature_layer": 0}, "takes the output of a layer"),
    ],
)
def test_features_that_llama_cpp_has_not_are_refused(
    models: Path, change: dict[str, Any], message: str
) -> None:
    config = Checkpoint(models / "qwen2").config
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(VtpError, match=message):
        used_layers(config)


def test_what_is_not_known_is_one_line(models: Path, tmp_path: Path) -> None:
    with pytest.raises(VtpError, match=r"way to cut text into words \(Metaspace\)"):
        cut_of({"type": "Metaspace", "replacement": "▁"})
    with pytest.raises(UsageError, match="--text q2_k: choose one of f32, f16, q8_0, q4_0"):
        convert.text_file(str(models / "qwen2"), tmp_path, "q2_k")
    arguments = [str(models / "qwen2"), str(tmp_path), "--vision", "f16"]
    assert convert.main(arguments) == 2
    save_tiny(tmp_path / "qwen3", decoder="qwen3", head_dim=16)
    with pytest.raises(VtpError, match="takes decoders of qwen2, llama, not qwen3"):
        convert.text_file(str(tmp_path / "qwen3"), tmp_path / "out", "f16")
    assert not list((tmp_path / "out").iterdir())  # nothing half-written


def test_files_are_made_once(models: Path, tmp_path: Path) -> None:
    made = convert.text_file(str(models / "qwen2"), tmp_path, "f16")
    stamp = made.stat().st_mtime_ns
    assert convert.text_file(str(models / "qwen2"), tmp_path, "f16") == made
    assert made.stat().st_mtime_ns == stamp and [path.name for path in tmp_path.iterdir()] == [made.name]


# One answer of llama.cpp b11549's server on a tiny model, as it was written.
TIMINGS = {
    "cache_n": 0,
    "prompt_n": 31,
    "prompt_ms": 1.878,
    "prompt_per_token_ms": 0.06058064516129032,
    "predicted_n": 8,
    "predicted_ms": 0.711,
    "predicted_per_token_ms": 0.10157142857142856,
}
LOG = """\
0.00.080.096 I slot launch_slot_: id  0 | task 10 | processing task, is_child = 0
0.00.080.353 I slot   operator(): id  0 | task 10 | cached n_tokens = 4, memory_seq_rm [4, end)
0.00.080.375 I slot encode_mtmd_: id  0 | task 10 | encoding mtmd batch from idx = 4, n_chunks = 1
0.00.080.765 I decoding image batch 1/1, n_tokens_batch = 16
0.00.081.308 I image decoded (batch 1/1) in 1 ms
0.00.082.704 I slot print_timing: id  0 | task 10 | prompt eval time =       1.88 ms /    31 tokens
"""


def test_its_own_report_is_read() -> None:
    found = report.reported(TIMINGS, LOG)
    assert found.encoder == pytest.approx(0.390) and found.prompt == pytest.approx(1.878 - 0.390)
    assert found.token == pytest.approx(TIMINGS["predicted_per_token_ms"])
    assert (found.tokens, found.made) == (31, 8)


def test_an_encoding_is_the_last_answers_and_minutes_count() -> None:
    later = LOG.replace("0.00.080.375", "1.59.999.900").replace("0.00.080.765", "2.00.001.000")
    assert report.encoding_ms(LOG + later) == pytest.approx(1.1)
    assert report.encoding_ms("") is None and report.encoding_ms(LOG.split("decoding image")[0]) is None
    assert report.reported({**TIMINGS, "predicted_n": 1}, "").token == 0.0


def test_the_build_says_its_version() -> None:
    said = "version: 0.5.0-dev (build 0, commit unknown)\nbuilt with GNU 12.2.0 for Linux x86_64\n"
    found = built.version_of(said)
    assert found == {
        "version": "0.5.0-dev (build 0, commit unknown)",
        "compiler": "GNU 12.2.0 for Linux x86_64",
    }
    assert built.version_of("?") == {"version": "not told", "compiler": "not told"}


def test_the_build_says_what_it_uses() -> None:
    log = (
        "0.00.005.535 I cmn  common_param: system_info: n_threads = 1 (n_threads_batch = 1) / 2 | CPU : "
        "SSE3 = 1 | AVX2 = 1 | AVX512 = 0 | LLAMAFILE = 1 | OPENMP = 1 | REPACK = 1 | \n"
    )
    assert report.instructions(log) == ["SSE3", "AVX2", "LLAMAFILE", "OPENMP", "REPACK"]
    assert report.instructions("") == []
