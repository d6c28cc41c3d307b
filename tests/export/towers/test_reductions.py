"""Tower reductions against numpy loops, transformers' own towers, and every family's reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vtp.export.checkpoint.loading import load
from vtp.export.checkpoint.weights import fill
from vtp.export.exporter import Request, export
from vtp.export.graphs.attention.operators import emitting
from vtp.export.towers import parse_reduction

from ...models.tiny import pixels, save_tiny
from ...models.tiny_families import save_anyres
from ...models.tiny_gemma import save_gemma, tiny_gemma3, tiny_paligemma
from ...models.tiny_split import save_idefics3, save_internvl
from ...models.tiny_video import save_onevision, save_video_llava
from ...oracles.numpy_towers import Tower

SIDE = 84  # 36 patches
BLOCKS = 6  # of the tower, of which CLIP's last is not used
IPCV = [("ipcv:0.35", ("cut=3", "stable=1")), ("ipcv:0.6", ("cut=1", "stable=0")), ("ipcv:0.2", ())]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny LLaVA with a tower of six blocks, by its kind."""
    root = tmp_path_factory.mktemp("towers")

    def get(vision: str) -> Path:
        if not (root / vision).is_dir():
            save_tiny(root / vision, layers=2, vision=vision, vision_layers=BLOCKS, image_size=SIDE, seed=3)
        return root / vision

    return get


def encoded(
    folder: Path, tower: str, options: Any, cues: tuple[str, ...], size: int = SIDE
) -> list[np.ndarray]:
    """What the module that is exported gives of one picture."""
    model = load(folder, "float32", tower=parse_reduction(tower, options))
    fill(model.family.model)
    with torch.no_grad(), emitting(model.family.decoder.model, model.family.tower):
        return [part.numpy()[0] for part in model.family.vision_encoder(cues)(pixels(size, seed=5))]


def parts(folder: Path) -> tuple[Any, Tower, np.ndarray]:
    """transformers' tower, its used blocks for the oracle, and their input of the same picture."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    tower = model.model.vision_tower
    has_cls = hasattr(tower.embeddings, "class_embedding")
    used = list(tower.encoder.layers)[: range(BLOCKS + 1)[model.config.vision_feature_layer]]
    with torch.no_grad():
        hidden = tower.embeddings(pixels(SIDE, seed=5))
        hidden = tower.pre_layrnorm(hidden) if has_cls else hidden
    return tower, Tower(used, has_cls), hidden[0].numpy().astype(np.float64)


def check_cues(tower: Tower, weights: np.ndarray, scores: np.ndarray) -> None:
    mean = weights.mean(axis=0)
    wanted = mean[0, 1:] if tower.has_cls else mean.mean(axis=0)
    np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize(("tower", "options"), IPCV)
@pytest.mark.parametrize("cues", [(), ("attention_scores", "vision_keys")])
def test_ipcv_is_its_formulae(
    towers: Callable[[str], Path], vision: str, tower: str, options: Any, cues: tuple[str, ...]
) -> None:
    settings = parse_reduction(tower, options).settings  # type: ignore[union-attr]
    got = encoded(towers(vision), tower, options, cues)
    _, oracle, hidden = parts(towers(vision))
    want, weights = oracle.ipcv(hidden, settings["keep"], settings["cut"], settings["stable"], bool(cues))
    np.testing.assert_allclose(got[0], want[int(oracle.has_cls) :], rtol=1e-3, atol=1e-4)
    if cues:
        check_cues(oracle, weights, got[1])


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("pairs", [1, 4])
def test_tome_is_its_formulae(towers: Callable[[str], Path], vision: str, pairs: int) -> None:
    got = encoded(towers(vision), f"tome:{pairs}", (), ("attention_scores", "vision_keys"))
    _, oracle, hidden = parts(towers(vision))
    want, weights = oracle.tome(hidden, pairs)
    np.testing.assert_allclose(got[0], want[int(oracle.has_cls) :], rtol=1e-3, atol=1e-4)
    check_cues(oracle, weights, got[1])
    used = len(oracle.layers)
    assert len(np.unique(got[0].round(4), axis=0)) == len(hidden) - int(oracle.has_cls) - used * pairs


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("tower", ["ipcv:1", "tome:0"])
def test_nothing_left_out_is_the_tower_itself(towers: Callable[[str], Path], vision: str, tower: str) -> None:
    cues = ("attention_scores", "vision_keys")
    whole, reduced = (encoded(towers(vision), name, (), cues) for name in ("none", tower))
    for got, want in zip(reduced, whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("size", [28, 56, 70])
def test_downsample_is_transformers_interpolation(
    towers: Callable[[str], Path], vision: str, size: int
) -> None:
    got = encoded(towers(vision), f"downsample:{size}", (), (), size)[0]
    tower, oracle, _ = parts(towers(vision))
    with torch.no_grad():
        states = tower(
            pixels(size, seed=5), interpolate_pos_encoding=True, output_hidden_states=True
        ).hidden_states
    want = states[len(oracle.layers)][0, int(oracle.has_cls) :].numpy()
    assert got.shape == ((size // 14) ** 2, 32)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


# -- every family --------------------------------------------------------------------------------------------

# Family: how a tiny model of it is saved, the image size, and what else the request needs.
MODELS: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "llava": (lambda path: save_tiny(path, layers=2, vision_layers=4, image_size=SIDE), {}),
    "llava_next": (lambda path: save_anyres(path, "llava_next", vision_layers=3), {"image_size": (56, 84)}),
    "llava_onevision": (
        lambda path: save_anyres(path, "llava_onevision", vision="siglip", vision_layers=3),
        {"image_size": (56, 84)},
    ),
    "llava_onevision-clips": (save_onevision, {"frames": 3}),
    "video_llava": (save_video_llava, {}),
    "internvl": (lambda path: save_internvl(path, vision_layers=4), {"image_size": (28, 56)}),
    "internvl_normed": (
        lambda path: save_internvl(path, vision_layers=3, use_qk_norm=True, norm_type="rms_norm"),
        {"image_size": (56, 56)},
    ),
    "idefics3": (lambda path: save_idefics3(path, vision_layers=3), {"image_size": (56, 56)}),
    "smolvlm": (lambda path: save_idefics3(path, kind="smolvlm", vision_layers=3), {"image_size": (56, 56)}),
    "paligemma": (lambda path: save_gemma(path, tiny_paligemma()), {}),
    "gemma3": (lambda path: save_gemma(path, tiny_gemma3()), {}),
}


# Every family once with each reduction and a method by default; the other pairs in the long tail.
PAIRS = [
    pytest.param(
        family,
        ("ipcv:0.5", "tome:1")[(number + other) % 2],
        method,
        marks=[pytest.mark.slow] if other or method not in ("fastervlm", "divprune") else [],
        id=f"{family}-{('ipcv', 'tome')[(number + other) % 2]}-{method}",
    )
    for number, family in enumerate(MODELS)
    for other in (0, 1)
    for method in ("none", "fastervlm" if "clips" not in family else "divprune", "prumerge")
    if not (method == "prumerge" and "clips" in family)
]


@pytest.mark.parametrize(("family", "tower", "method"), PAIRS)
def test_a_family_answers_as_its_reduced_torch_model(
    tmp_path: Path, family: str, tower: str, method: str
) -> None:
    save, wishes = MODELS[family]
    save(tmp_path / "model")
    keep = {} if method == "none" else {"keep_tokens": "4"}
    options = ["cut=1", "stable=1"] if tower.startswith("ipcv") else []
    request = Request(
        tmp_path / "bundle",
        model=str(tmp_path / "model"),
        method=method,
        tower=tower,
        tower_options=options,
        max_length=128,
        **wishes,
        **keep,
    )
    manifest = export(request).manifest  # verified against the reduction's long form in transformers' layers
    assert manifest.tower is not None and manifest.tower.rows < manifest.tower.of
    for case in manifest.parity["generation"].values():
        assert case["equal"] == case["tokens"] == 16


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_a_family_answers_about_smaller_pictures(tmp_path: Path, family: str) -> None:
    MODELS[family][0](tmp_path / "model")
    wishes: dict[str, Any] = {"method": "fastervlm", "keep_tokens": "2", "tower": "downsample:28"}
    manifest = export(Request(tmp_path / "out", str(tmp_path / "model"), max_length=128, **wishes)).manifest
    assert manifest.visual.count == 4 and manifest.image.fixed_size == (28, 28)
    assert all(case["equal"] == case["tokens"] == 16 for case in manifest.parity["generation"].values())
