"""--tower stc: a later picture's tower against numpy loops, and a camera's pictures through one bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vtp.engines import UsageError, VtpError
from vtp.export.checkpoint.loading import load
from vtp.export.checkpoint.weights import fill
from vtp.export.cli import _report
from vtp.export.exporter import Request, export
from vtp.export.families.base import Family
from vtp.export.families.gemma.gemma3 import Gemma3
from vtp.export.families.llava.llava_onevision import LlavaOnevision
from vtp.export.families.llava.video_llava import VideoLlavaClips
from vtp.export.families.tiled.internvl import InternVL
from vtp.export.graphs.attention.operators import emitting
from vtp.export.towers import parse_reduction
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import Bundle, open_bundle
from vtp.runtime.bundle.manifest import parse_manifest
from vtp.runtime.opening import Opening
from vtp.runtime.parity_gate import cases
from vtp.runtime.stages.boundary import find_boundary
from vtp.runtime.triton.repository import write_repository

from ...models.tiny import pixels, save_tiny
from ...models.tiny_gemma import save_gemma, tiny_paligemma
from ...models.tiny_qwen import save_qwen
from ...oracles.numpy_towers import Tower

SIDE, BLOCKS = 84, 4  # 36 patches; of the tower's blocks CLIP's last is not used
CUES = ("attention_scores", "vision_keys")
ASKED = "what is it ?"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny LLaVA by its kind of tower."""
    root = tmp_path_factory.mktemp("stc")

    def get(vision: str) -> Path:
        if not (root / vision).is_dir():
            save_tiny(root / vision, layers=2, vision=vision, vision_layers=BLOCKS, image_size=SIDE, seed=3)
        return root / vision

    return get


@pytest.fixture(scope="module")
def bundle(exported: Callable[[str], Any]) -> Bundle:
    """Four of 17 rows; a new reference after four pictures. Held against torch when it is exported."""
    return open_bundle(exported("stc").folder)


@pytest.fixture
def camera(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.load(bundle.folder, engine="ort-cpu", threads=1, stream_reuse=True) as pipe:
        yield pipe


def changed(picture: torch.Tensor) -> torch.Tensor:
    """Another picture in the lower right part, and a little noise."""
    generator, later = torch.Generator().manual_seed(11), picture.clone()
    later += 0.02 * torch.randn(picture.shape, generator=generator)
    later[..., 50:, 40:] = torch.randn((1, 3, SIDE - 50, SIDE - 40), generator=generator)
    return later


def run_both(folder: Path, tower: str, cues: tuple[str, ...] = CUES) -> tuple[list[Any], list[Any], Any]:
    """What the two modules that are exported give of a picture and of a later one; and the family."""
    model = load(folder, "float32", tower=parse_reduction(tower))
    family, first = model.family, pixels(SIDE, seed=5)
    fill(family.model)
    with torch.no_grad(), emitting(family.decoder.model, family.tower):
        whole = family.vision_encoder(cues)(first)
        later = family.later_encoder(cues)(changed(first), *whole[1 + len(cues) :])
    return [one.numpy()[0] for one in whole], [one.numpy()[0] for one in later], family


def oracle_of(family: Any) -> tuple[Tower, np.ndarray, np.ndarray]:
    """The blocks in use for the loops, and what enters them of both pictures, float64."""
    tower, first = family.tower, pixels(SIDE, seed=5)
    has_cls = hasattr(tower.embeddings, "class_embedding")
    rows = []
    for picture in (first, changed(first)):
        with torch.no_grad():
            hidden = tower.embeddings(picture)
            hidden = tower.pre_layrnorm(hidden) if has_cls else hidden
        rows.append(hidden[0].numpy().astype(np.float64))
    used = list(tower.encoder.layers)[: family.tower_shape.blocks]
    return Tower(used, has_cls), rows[0], rows[1]


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("part", [0.25, 0.6])
def test_a_later_picture_is_its_formulae(models: Callable[[str], Path], vision: str, part: float) -> None:
    whole, later, family = run_both(models(vision), f"stc:{part}")
    oracle, first, second = oracle_of(family)
    blocks, leave = len(oracle.layers), int(oracle.has_cls)
    want = oracle.stc(first, second, int(part * len(first)))
    np.testing.assert_allclose(later[0], want.hidden[leave:], rtol=1e-3, atol=1e-4)
    assert [rows.tolist() for rows in later[3 : 3 + blocks]] == want.rows
    assert later[-1] == pytest.approx(want.cosines[0].mean(), abs=1e-5)
    mean = want.weights.mean(axis=0)
    np.testing.assert_allclose(later[1], mean[0, 1:] if leave else mean.mean(axis=0), rtol=1e-4, atol=1e-6)
    assert len(whole) == 3 + 4 * blocks and not np.allclose(whole[0], later[0], atol=1e-2)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_all_rows_recomputed_is_the_tower_itself(models: Callable[[str], Path], vision: str) -> None:
    _, later, family = run_both(models(vision), "stc:1")
    plain = load(models(vision), "float32").family
    fill(plain.model)
    with torch.no_grad(), emitting(plain.decoder.model, plain.tower):
        want = plain.vision_encoder(CUES)(changed(pixels(SIDE, seed=5)))
    for got, right in zip(later[:3], want, strict=True):
        np.testing.assert_allclose(got, right.numpy()[0], rtol=1e-4, atol=2e-5)
    assert later[3].tolist() == list(range(family.tower_shape.rows))


def test_paligemma_with_all_rows_recomputed_is_transformers_own_tower(tmp_path: Path) -> None:
    """Its features are behind the tower's last norm; of both pictures, as what methods read is."""
    from transformers import PaliGemmaForConditionalGeneration

    save_gemma(tmp_path, tiny_paligemma())
    family = load(tmp_path, "float32", tower=parse_reduction("stc:1")).family
    fill(family.model)
    first = pixels(56, seed=5)
    second = changed(torch.nn.functional.pad(first, (0, SIDE - 56, 0, SIDE - 56)))[..., 28:, 28:]
    with torch.no_grad(), emitting(family.decoder.model, family.tower):
        whole = family.vision_encoder(CUES)(first)
        later = family.later_encoder(CUES)(second, *whole[1 + len(CUES) :])
    model = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        own = [model.model.vision_tower(one, output_attentions=True) for one in (first, second)]
    for got, want in zip((whole, later), own, strict=True):
        torch.testing.assert_close(got[0], want.last_hidden_state, rtol=1e-4, atol=2e-5)
        received = want.attentions[-1].mean(dim=(1, 2))
        torch.testing.assert_close(got[1], received, rtol=1e-4, atol=1e-6)
    assert (own[0].last_hidden_state - own[1].last_hidden_state).abs().max() > 0.1
    assert later[3].tolist() == [list(range(16))]


@pytest.mark.slow  # the test before holds its tower, and LLaVA's bundle what is written
@pytest.mark.parametrize("target", ["ort", "jetpack6"])
def test_paligemma_answers_about_a_cameras_pictures(tmp_path: Path, target: str) -> None:
    """Exported against transformers' layers with the reused rows put back; one picture again is itself."""
    save_gemma(tmp_path / "model", tiny_paligemma())
    asked = {
        "method": "vispruner",
        "keep_tokens": "6",
        "max_length": 128,
        "tower": "stc:0.25",
        "target": target,
    }
    made = export(Request(tmp_path / "out", str(tmp_path / "model"), **asked))
    assert made.manifest.stream is not None and made.manifest.stream.rows == 4
    assert made.manifest.parity["stream"]["rows"] == 17  # 16 patches, one row of scores
    assert all(case["equal"] == case["tokens"] == 16 for case in made.manifest.parity["generation"].values())
    with Pipeline.load(made.folder, engine="ort-cpu", threads=1, stream_reuse=True) as pipe:
        results = [pipe.generate(frame(1, step), ASKED, max_new_tokens=8) for step in (0, 2)]
    assert [one.tower["rows"] for one in results if one.tower] == [16, 4]
    with Pipeline.load(made.folder, engine="ort-cpu", threads=1) as plain:
        alone = plain.generate(frame(1), ASKED, max_new_tokens=8)
    assert (alone.token_ids, alone.kept) == (results[0].token_ids, results[0].kept)


# -- a camera ------------------------------------------------------------------------------------------------


def frame(seed: int, moved: int = 0) -> np.ndarray:
    """A picture of large blocks of colour, uint8 [84,84,3], with a small bright square in it."""
    blocks = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    picture = blocks.repeat(28, axis=0).repeat(28, axis=1)
    picture[60:70, moved : moved + 10] = 255
    return picture


def test_a_bundle_says_what_it_reuses(bundle: Bundle) -> None:
    manifest = bundle.manifest
    stream = manifest.stream
    assert stream is not None and (stream.rows, stream.of, stream.pictures) == (4, 17, 4)
    assert manifest.tower is not None and manifest.tower.to_json() == {"name": "stc", "rows": 17, "of": 17}
    assert manifest.parity["stream"]["rows"] == 17  # 16 patches, one row of scores
    assert not (bundle.folder / "vision_encoder_later.onnx.data").exists()  # no weight is stored twice
    assert all(case["equal"] == case["tokens"] == 16 for case in manifest.parity["generation"].values())


def test_the_report_says_what_is_recomputed(bundle: Bundle) -> None:
    """Not how many rows a picture by itself has, which are all of them."""
    report = _report(bundle, bundle.folder).splitlines()
    assert "tower stc: 4 of 17 rows of a camera's later pictures" in report


def test_pictures_of_a_camera(camera: Pipeline, bundle: Bundle) -> None:
    """Whole, reused, asked again, renewed after four, and whole after a cut; others are as without reuse."""
    frames = [frame(1, step) for step in range(6)] + [frame(2)]
    results = [camera.generate(one, ASKED, max_new_tokens=8) for one in frames]
    rows = [result.tower["rows"] for result in results if result.tower]
    assert rows == [17, 4, 4, 4, 17, 4, 17]
    assert results[1].tower is not None and 0.8 <= results[1].tower["cosine"] < 1
    ran = [set(result.timings.stages) & {"vision_encoder", "vision_encoder_later"} for result in results]
    assert ran[0] == ran[4] == {"vision_encoder"} and ran[1] == {"vision_encoder_later"}
    assert ran[6] == {
        "vision_encoder",
        "vision_encoder_later",
    }  # that it is another scene was found out there
    again = camera.generate(frames[6], "what color ?", max_new_tokens=2)
    assert again.timings.reused_stages == ["vision_encoder"] and again.tower == results[6].tower
    with Pipeline.load(bundle.folder, engine="ort-cpu", threads=1) as plain:
        for place in (0, 4, 6):
            alone = plain.generate(frames[place], ASKED, max_new_tokens=8)
            assert alone.token_ids == results[place].token_ids and alone.kept == results[place].kept
        assert alone.tower == {"name": "stc", "rows": 17, "of": 17}
        assert "vision_encoder_later.onnx" not in plain._open_runner()._opened._engines


@pytest.mark.parametrize(
    "engines",
    [
        "openvino-cpu",
        # The reference's state goes from one engine to the other.
        pytest.param("ort-cpu,vision_encoder=openvino-cpu", marks=pytest.mark.slow),
        pytest.param("ort-cpu,vision_encoder_later=openvino-cpu", marks=pytest.mark.slow),
    ],
)
def test_engines_recompute_the_same_rows(bundle: Bundle, camera: Pipeline, engines: str) -> None:
    """Most of a picture stands still: its keys are alike but for rounding, and no engine's sort decides."""
    pytest.importorskip("openvino")
    frames = [frame(1, step) for step in range(4)]
    with Pipeline.load(bundle.folder, engine=engines, threads=1, stream_reuse=True) as other:
        pairs = [[pipe.generate(one, ASKED, max_new_tokens=8) for pipe in (camera, other)] for one in frames]
    assert all(mine.token_ids == theirs.token_ids and mine.kept == theirs.kept for mine, theirs in pairs)
    assert [mine.tower["rows"] for mine, _ in pairs if mine.tower] == [17, 4, 4, 4]


def test_several_pictures_and_a_new_stream(camera: Pipeline) -> None:
    """A batch is computed whole, and disturbs no reference; `forget` begins anew."""
    first = camera.generate(frame(1), ASKED, max_new_tokens=2)
    both = camera.generate_batch([frame(1), frame(2)], [ASKED, ASKED], max_new_tokens=2)
    assert both[0].token_ids == first.token_ids and both[0].tower == {"name": "stc", "rows": 17, "of": 17}
    assert camera.generate(frame(1, 3), ASKED, max_new_tokens=2).tower["rows"] == 4  # type: ignore[index]
    with camera.claimed() as runner:
        runner.images.forget()
    assert camera.generate(frame(1, 3), ASKED, max_new_tokens=2).tower["rows"] == 17  # type: ignore[index]
    camera.warmup()  # on a blank picture, which is nobody's reference
    assert "vision_encoder_later" not in camera.generate(frame(1), ASKED, max_new_tokens=2).timings.stages
    options = ["red", "color"]
    decided = camera.decide(frame(1, 4), "what is it ?", options, labels="texts")
    assert decided.tower is not None and decided.tower["rows"] == 4


def test_reuse_is_refused_where_there_is_none(bundle: Bundle, exported: Callable[[str], Any]) -> None:
    with pytest.raises(
        UsageError, match="makes no use of earlier pictures; leave out stream_reuse, or export"
    ):
        Pipeline.load(exported("vispruner").folder, engine="ort-cpu", stream_reuse=True)
    with pytest.raises(
        UsageError, match="makes no use of earlier pictures; leave out stream_reuse, or export"
    ):
        Pipeline.load(exported("vispruner").folder, engine="ort-cpu", opening=Opening(stream_reuse=True))
    with pytest.raises(UsageError, match="does not go together with a vision feature cache; choose one"):
        Pipeline.load(bundle.folder, engine="ort-cpu", stream_reuse=True, vision_feature_cache=1)
    with pytest.raises(UsageError, match="stream_reuse"):
        Pipeline.load(bundle.folder, engine="ort-cpu", stream_reuse="yes")  # type: ignore[arg-type]


def test_triton_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"made for a camera's pictures .*; export it without --tower stc"):
        write_repository(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_the_parity_gate_walks_later_pictures(bundle: Bundle) -> None:
    """What vtp-build compares before an engine is run: the stage is among it, on the picture itself."""
    walked = {case.file: case for case in cases(bundle)}
    later, whole = walked["vision_encoder_later.onnx"], walked["vision_encoder.onnx"]
    assert later.outputs["reference_cosine"].tolist() == [1.0]
    np.testing.assert_allclose(
        later.outputs["image_features"], whole.outputs["image_features"], rtol=1e-4, atol=1e-5
    )


def test_features_made_elsewhere_need_no_state(bundle: Bundle) -> None:
    """A caller who gives image_features is asked for nothing that only later pictures need."""
    known = find_boundary(bundle.manifest, 6, "image_features").known
    assert set(known) == {"image_features", "attention_scores"}


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"tower": "stc:0"}, "tower stc: recompute is 0; choose a fraction above 0 and up to 1"),
        ({"tower": "stc:0.01"}, "recompute is 0.01; of 37 rows that leaves none; choose 0.0271 to 1"),
        ({"tower": "stc", "tower_options": ["alike=1.5"]}, "alike is 1.5; choose a mean cosine, from -1"),
        ({"tower": "stc", "tower_options": ["every=0"]}, "every is 0; choose 1 "),
        ({"tower": "stc", "method": "hiprune"}, "needs middle_received, which a tower with fewer rows does"),
    ],
)
def test_what_does_not_fit_is_refused(
    models: Callable[[str], Path], tmp_path: Path, wishes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        export(Request(tmp_path / "out", str(models("clip")), **{"method": "none", **wishes}))
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_other_towers_are_refused(tmp_path: Path) -> None:
    save_qwen(tmp_path / "model", "qwen2_5_vl")
    with pytest.raises(UsageError, match="family qwen2_5_vl does not serve tower stc"):
        export(Request(tmp_path / "out", str(tmp_path / "model"), "none", tower="stc"))


@pytest.mark.parametrize(
    ("family", "why"),
    [
        (
            InternVL,
            "family internvl does not serve tower stc: a reference picture would be kept for every tile",
        ),
        (
            LlavaOnevision,
            "family llava_onevision does not serve tower stc: a reference picture would be kept",
        ),
        (Gemma3, "family gemma3 does not serve tower stc: what it keeps of a picture's 4,096 patches"),
        (
            VideoLlavaClips,
            "does not serve tower stc: it is for single pictures of a camera, not for clips",
        ),
    ],
)
def test_the_reason_is_the_towers_own(family: type[Family], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        family.check_reduction("stc")
    with pytest.raises(UsageError) as other:
        family.check_reduction("downsample")
    assert why not in str(other.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.pop("stream"), "manifest.stream and the stages differ"),
        (lambda data: data["stream"].update(rows=38), "manifest.stream is out of range"),
        (lambda data: data["stream"].update(least_cosine=2), "manifest.stream is out of range"),
        (lambda data: data["stream"].update(rows=3), "manifest.stream and the rows of the graphs differ"),
        (
            lambda data: (data["stream"].update(of=16), data["tower"].update(rows=16, of=16)),
            "manifest.tower, manifest.stream and the rows of the graphs differ",
        ),
        (lambda data: data["tower"].update(rows=16), "manifest.tower, manifest.stream and the rows"),
        (lambda data: data["tower"].update(name="ipcv"), "manifest.tower and manifest.stream differ"),
        (lambda data: data.update(tower=None), "manifest.tower and manifest.stream differ"),
        (lambda data: data["stages"].append(data["stages"][1]), "the stages do not hold one encoder"),
        (
            lambda data: data["stages"][1]["inputs"].update({"reference.0.key": "soup"}),
            r"stage vision_encoder_later reads \['soup'\], which vision_encoder does not give",
        ),
        (
            lambda data: data["stages"][1]["outputs"].pop("attention_scores"),
            r"stage vision_encoder_later does not give \['attention_scores'\]",
        ),
    ],
)
def test_a_manifest_that_contradicts_itself(bundle: Bundle, change: Any, words: str) -> None:
    data = json.loads((bundle.folder / "manifest.json").read_text())
    change(data)
    with pytest.raises(VtpError, match=words):
        parse_manifest(json.dumps(data))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "wishes"),
    [
        ("siglip", {"dtype": "float16"}),
        ("clip", {"verify": "layers"}),
        ("siglip", {"target": "jetpack6"}),
        ("clip", {"target": "tensorrt"}),
    ],
)
def test_other_forms_are_held_against_torch(
    models: Callable[[str], Path], tmp_path: Path, vision: str, wishes: dict[str, Any]
) -> None:
    asked = {"method": "vispruner", "keep_tokens": "6", "tower": "stc:0.5", "max_length": 128, **wishes}
    made = export(Request(tmp_path / "out", str(models(vision)), **asked)).folder
    assert open_bundle(made).manifest.parity["stream"]["relative"] < 0.02
