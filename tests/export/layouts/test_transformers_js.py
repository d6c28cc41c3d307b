"""Layout transformers.js: folders driven as the client drives them answer as the pipeline does."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from PIL import Image

from vtp.calib.cli import main as calib
from vtp.engines import VtpError
from vtp.engines.ort.library import load_onnxruntime
from vtp.export.layouts.transformers_js import joining, weights
from vtp.export.layouts.transformers_js.folder import lay_out
from vtp.export.layouts.transformers_js.rehearsal import Rehearsal
from vtp.runtime import Pipeline

from ...models.tiny import save_tiny
from ...models.tiny_gemma import save_gemma, tiny_gemma3, tiny_paligemma
from ...models.tiny_split import save_idefics3
from ...once import Once
from .js_processor import JsProcessor

MOST = 10
PROMPTS = ("what color is the star ?", "Describe the picture.", "how many, and why ?")


def save_llava(path: Path) -> Any:
    return save_tiny(path, layers=3)


def save_plain_llava(path: Path) -> Any:
    """A model without a chat template: LLaVA's plain form."""
    model = save_tiny(path, layers=2, vision="siglip", seed=5)
    (path / "chat_template.jinja").unlink()
    return model


def save_tied(path: Path) -> Any:
    """Embeddings that are also the head, above the megabyte from which a table is stored once."""
    return save_tiny(path, layers=2, heads=16, head_dim=48, kv_heads=2, tied=True, seed=4)


def save_smolvlm(path: Path) -> Any:
    return save_idefics3(path, kind="smolvlm", tied=True, side=8, seed=7)


def save_one_idefics3(path: Path) -> Any:
    return save_idefics3(path, seed=4)


def save_pali(path: Path) -> Any:
    return save_gemma(path, tiny_paligemma())


def save_pali2(path: Path) -> Any:
    return save_gemma(path, tiny_paligemma("gemma2", seed=1))


def save_gemma3(path: Path) -> Any:
    return save_gemma(path, tiny_gemma3(seed=3))


@dataclass(frozen=True)
class Case:
    save: Callable[[Path], Any]
    edge: int
    wishes: dict[str, Any]


CASES = {
    "llava": Case(save_llava, 56, {"method": "vispruner", "keep_tokens": "5"}),
    "plain": Case(save_plain_llava, 56, {"method": "holov", "keep_tokens": "5"}),
    "tied": Case(save_tied, 56, {"method": "divprune", "keep_tokens": "6"}),
    "none": Case(save_llava, 56, {"method": "none"}),
    "half": Case(save_llava, 56, {"method": "vispruner", "keep_tokens": "5", "dtype": "float16"}),
    "smolvlm": Case(save_smolvlm, 56, {"method": "divprune", "keep_tokens": "5", "image_size": (56, 56)}),
    "idefics3": Case(save_one_idefics3, 28, {"method": "random", "keep_tokens": "2", "image_size": (28, 28)}),
    "pali": Case(save_pali, 56, {"method": "vispruner", "keep_tokens": "6"}),
    "pali2": Case(save_pali2, 56, {"method": "divprune", "keep_tokens": "6"}),
    "gemma3": Case(save_gemma3, 56, {"method": "vispruner", "keep_tokens": "6"}),
}
LATER = {"none", "idefics3", "pali"}  # of each kind another case stays in the default tier


@dataclass(frozen=True)
class Laid:
    """A bundle and what was laid out of it."""

    bundle: Path
    folder: Path
    case: Case


@pytest.fixture(scope="module")
def laid(once: Once, saved: Callable[..., tuple[Path, Any]]) -> Callable[[str], Laid]:
    """By case; made at the first call. Read only."""

    def get(name: str) -> Laid:
        case = CASES[name]
        model = saved(case.save)[0]
        bundle = once.bundle(model, max_length=128, verify="none", **case.wishes)
        key = f"transformers.js-{name}"
        return Laid(bundle, once.folder(key, lambda part: lay_out(bundle, str(model), part)), case)

    return get


def pictures(edge: int) -> list[Image.Image]:
    rng = np.random.default_rng(8)
    return [Image.fromarray(rng.integers(0, 256, (edge, edge, 3), dtype=np.uint8)) for _ in PROMPTS]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LATER else []) for name in CASES]
)
def test_answers_are_the_pipelines(laid: Callable[[str], Laid], name: str) -> None:
    """Prompt, picture and loop as transformers.js has them, from the folder's files alone."""
    found = laid(name)
    process, client = JsProcessor(found.folder), Rehearsal(found.folder)
    with Pipeline.load(found.bundle, engine="ort-cpu") as pipe:
        keep = pipe.manifest.visual.keep[0]
        for image, prompt in zip(pictures(found.case.edge), PROMPTS, strict=True):
            ids, pixel_values = process(image, prompt)
            assert ids.count(client.config["image_token_id"]) == keep
            tokens = client.answer(ids, client.image_features(pixel_values), MOST)
            assert tokens == list(pipe.generate(image, prompt, max_new_tokens=MOST).token_ids)


def test_what_is_given_and_taken_has_the_clients_names(laid: Callable[[str], Laid]) -> None:
    folder = laid("llava").folder / "onnx"
    graphs = {path.stem: onnx.load(path, load_external_data=False).graph for path in folder.glob("*.onnx")}
    assert set(graphs) == {"vision_encoder", "embed_tokens", "decoder_model_merged"}
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for graph in graphs.values()
        for value in [*graph.input, *graph.output]
    }
    assert shapes["pixel_values"] == ["batch_size", 3, 56, 56]
    assert shapes["image_features"][1:] == [5, 32]
    assert shapes["inputs_embeds"] == ["batch_size", "sequence_length", 32]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.0.key"] == ["batch_size", 2, "past_sequence_length", 8]
    assert shapes["present.2.value"] == ["batch_size", 2, "total_sequence_length", 8]
    assert shapes["logits"] == ["batch_size", 1, 384]


def test_several_pictures_and_rows_of_one_length(laid: Callable[[str], Laid]) -> None:
    """Two rows of a batch answer as they do alone; a mask with padding ends the run, and says why."""
    found = laid("llava")
    process, client = JsProcessor(found.folder), Rehearsal(found.folder)
    alone = [process(image, PROMPTS[0]) for image in pictures(56)[:2]]
    features = [client.image_features(pixels) for _, pixels in alone]
    together = client.image_features(np.concatenate([pixels for _, pixels in alone]))
    assert np.allclose(together, np.concatenate(features), atol=1e-5)
    rows = [next(client.logits(ids, part)) for (ids, _), part in zip(alone, features, strict=True)]
    ids = np.array([ids for ids, _ in alone])
    embeds = client._embed.run(None, {"input_ids": ids})[0]
    for row, part in enumerate(features):
        embeds[row, ids[row] == client.config["image_token_id"]] = part
    cache = {name: np.repeat(value, 2, axis=0) for name, value in client._empty().items()}
    mask = np.ones_like(ids)
    logits = client._decoder.run(["logits"], {"inputs_embeds": embeds, "attention_mask": mask, **cache})[0]
    assert np.allclose(logits[:, 0], rows, atol=1e-4)
    mask[0, 0] = 0
    with pytest.raises(Exception, match="attention_mask holds padding; give one prompt at a time"):
        client._decoder.run(["logits"], {"inputs_embeds": embeds, "attention_mask": mask, **cache})


def test_gemma_3_is_told_where_a_picture_ends(laid: Callable[[str], Laid]) -> None:
    """The last column counts down over a picture and is 0 for text; without it the answer is another."""
    found = laid("gemma3")
    process, client = JsProcessor(found.folder), Rehearsal(found.folder)
    ids, pixels = process(pictures(56)[0], PROMPTS[0])
    features = client.image_features(pixels)
    assert features[:, -1].tolist() == [5, 4, 3, 2, 1, 0]
    assert not client._embed.run(None, {"input_ids": np.array([ids])})[0][..., -1].any()
    told = next(client.logits(ids, features))
    features[:, -1] = 0
    assert np.abs(next(client.logits(ids, features)) - told).max() > 1e-2


def test_half_precision_gives_and_takes_float32(laid: Callable[[str], Laid]) -> None:
    """So that files of every dtype can be mixed; the cache alone is float16."""
    folder = laid("half").folder
    assert {path.name for path in (folder / "onnx").glob("*.onnx")} == {
        f"{name}_fp16.onnx" for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
    }
    client = Rehearsal(folder)
    sessions = (client._vision, client._embed, client._decoder)
    kinds = {
        value.name: value.type
        for session in sessions
        for value in [*session.get_inputs(), *session.get_outputs()]
    }
    for name in ("pixel_values", "image_features", "inputs_embeds", "logits"):
        assert kinds[name] == "tensor(float)", name
    assert kinds["past_key_values.0.key"] == kinds["present.0.key"] == "tensor(float16)"


@pytest.mark.parametrize(("decoder", "suffix"), [("int4", "q4"), ("int8", "int8")])
def test_a_quantised_bundle_has_the_suffixes_of_its_bits(
    once: Once,
    saved: Callable[..., tuple[Path, Any]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    decoder: str,
    suffix: str,
) -> None:
    """vtp-calib's int8 encoder and its decoders, whose answers the folder gives."""
    model = saved(save_llava)[0]
    bundle = once.bundle(model, max_length=128, verify="none", **CASES["plain"].wishes)
    image, small, folder = pictures(56)[0], tmp_path / "small", tmp_path / "folder"
    image.save(tmp_path / "0.png")
    (tmp_path / "d.jsonl").write_text(json.dumps({"image": "0.png", "prompt": PROMPTS[0]}) + "\n")
    argv = ["quantize", bundle, "--data", tmp_path / "d.jsonl", "--output", small, "--force", "--samples", 1]
    argv += ["--decoder", decoder]
    assert calib([str(word) for word in [*argv, "--max-new-tokens", 2, "--threads", 1]]) == 0, (
        capfd.readouterr()
    )
    written = lay_out(small, str(model), folder)
    wanted = {"vision_encoder": "int8", "embed_tokens": "fp32", "decoder_model_merged": suffix}
    assert written.dtypes == wanted
    names = {"vision_encoder_int8.onnx", "embed_tokens.onnx", f"decoder_model_merged_{suffix}.onnx"}
    assert {path.name for path in (folder / "onnx").glob("*.onnx")} == names
    client = Rehearsal(folder)
    assert client.config["transformers.js_config"]["dtype"] == wanted
    ids, pixels = JsProcessor(folder)(image, PROMPTS[0])
    with Pipeline.load(small, engine="ort-cpu") as pipe:
        tokens = pipe.generate(image, PROMPTS[0], max_new_tokens=MOST).token_ids
    assert client.answer(ids, client.image_features(pixels), MOST) == list(tokens)


# -- files ---------------------------------------------------------------------------------------------------


def test_the_record_names_every_file(laid: Callable[[str], Laid]) -> None:
    folder = laid("llava").folder
    record = json.loads((folder / "vtp.json").read_text())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {*record["files"], "vtp.json"}
    for name, info in record["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == info["sha256"]
    assert record["visual_tokens"] == {"before": 16, "after": 5}
    assert record["method"]["name"] == "vispruner"
    readme = (folder / "README.md").read_text()
    assert "Of the 16 visual tokens of a picture 5 are kept, chosen by vispruner (arXiv 2412.01818)" in readme


def test_a_tied_table_is_stored_once(laid: Callable[[str], Laid]) -> None:
    """Two names of one file, since the client lets a graph read no other graph's files."""
    found = laid("tied")
    client = json.loads((found.folder / "config.json").read_text())["transformers.js_config"]
    assert client["use_external_data_format"]["decoder_model_merged.onnx"] == 2
    table, same = (
        found.folder / "onnx" / name
        for name in ("embed_tokens.onnx_data", "decoder_model_merged.onnx_data_1")
    )
    assert table.samefile(same) and table.stat().st_size == 384 * 768 * 4
    for path in (found.folder / "onnx").glob("*.onnx"):
        own = {value.const_value.location for value in initializers(path)}
        assert own <= {name.name for name in path.parent.glob(f"{path.name}_data*")}, path
    size = sum({path.stat().st_ino: path.stat().st_size for path in found.folder.rglob("*_data*")}.values())
    given = sum(path.stat().st_size for path in found.bundle.glob("*.data"))
    assert size <= given + 16 * 4096


def initializers(path: Path) -> list[Any]:
    found = ir.load(path).graph.initializers.values()
    return [value for value in found if isinstance(value.const_value, ir.ExternalTensor)]


def test_large_data_is_cut_into_files_as_the_client_reads_them(
    laid: Callable[[str], Laid], tmp_path: Path
) -> None:
    """NAME.onnx_data, NAME.onnx_data_1, … none above the limit; the session computes the same."""
    source = laid("llava").folder / "onnx" / "embed_tokens.onnx"
    vision = laid("llava").folder / "onnx" / "vision_encoder.onnx"
    models = {"embed_tokens": ir.load(source), "vision_encoder": ir.load(vision)}
    counts = weights.save(models, tmp_path, limit=80_000)
    assert counts["vision_encoder.onnx"] > 2 and counts["embed_tokens.onnx"] == 1
    names = [
        f"vision_encoder.onnx_data{f'_{at}' if at else ''}" for at in range(counts["vision_encoder.onnx"])
    ]
    assert {path.name for path in tmp_path.glob("vision_encoder.onnx_data*")} == set(names)
    assert all((tmp_path / name).stat().st_size <= 80_000 for name in names)
    pixels = np.random.default_rng(1).normal(size=(1, 3, 56, 56)).astype(np.float32)
    run = load_onnxruntime().InferenceSession
    whole, cut = (
        run(str(path)).run(None, {"pixel_values": pixels}) for path in (vision, tmp_path / vision.name)
    )
    assert all(np.array_equal(one, other) for one, other in zip(whole, cut, strict=True))


def test_the_tokenizer_adds_no_second_bos(laid: Callable[[str], Laid]) -> None:
    """The template writes it, and transformers.js tokenizes a template's text as any other."""
    process = JsProcessor(laid("llava").folder)
    ids, _ = process(pictures(56)[0], PROMPTS[0])
    assert ids.count(process.tokenizer.token_to_id("<s>")) == 1


def test_an_answer_ends_at_the_window(laid: Callable[[str], Laid]) -> None:
    """PaliGemma 2's decoder looks back 128 tokens, and no graph would refuse to go on."""
    case = laid("pali2")
    assert json.loads((case.folder / "config.json").read_text())["max_position_embeddings"] == 128


def test_a_wrong_folder_is_not_left(
    laid: Callable[[str], Laid],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saved: Callable[..., tuple[Path, Any]],
) -> None:
    """A decoder that is not told of pictures chooses other tokens than the bundle: nothing is written."""
    found = laid("gemma3")
    nothing = [0, 0, 0, 0, 0, 1]
    monkeypatch.setattr(
        joining,
        "mark_lookahead",
        lambda tape, rows, _: tape.op("Pad", [rows, joining.constant(tape, nothing)]),
    )
    with pytest.raises(VtpError, match="logits of token 1 of the folder"):
        lay_out(found.bundle, str(saved(save_gemma3)[0]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_laid_out_folder_is_overwritten_and_nobody_elses(
    laid: Callable[[str], Laid], tmp_path: Path, saved: Callable[..., tuple[Path, Any]]
) -> None:
    found = laid("llava")
    model, output = str(saved(save_llava)[0]), tmp_path / "out"
    shutil.copytree(found.folder, output)
    with pytest.raises(VtpError, match=r"exists; choose another folder or add --overwrite"):
        lay_out(found.bundle, model, output)
    (output / "mine.txt").write_text("my own")
    with pytest.raises(VtpError, match=r"--overwrite leaves it alone"):
        lay_out(found.bundle, model, output, overwrite=True)
    (output / "mine.txt").unlink()
    (output / "README.md").write_text("changed")
    lay_out(found.bundle, model, output, overwrite=True)
    assert (output / "README.md").read_text() == (found.folder / "README.md").read_text()
