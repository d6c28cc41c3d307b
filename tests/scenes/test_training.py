"""Training: forms within their limits, a reader grown out of the first model, windows, and resuming."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlavaForConditionalGeneration

from vtp.scenes import model_dir
from vtp.scenes.exam import held_out
from vtp.scenes.generator.pictures import HELD_OUT, READER_KINDS, draw
from vtp.scenes.generator.signs import ALPHABET
from vtp.scenes.training.checkpoint import Run
from vtp.scenes.training.decoder import train_decoder
from vtp.scenes.training.deepen import deepen
from vtp.scenes.training.folder import Form, build_config, build_tokenizer
from vtp.scenes.training.packing import SKIP, pack
from vtp.scenes.training.pool import Pool
from vtp.scenes.training.reader.grow import PARTS, grow, load_first
from vtp.scenes.training.reader.teacher import Teacher
from vtp.scenes.training.recipe import FIRST, READER, RECIPES, Recipe, Stage, TowerStage
from vtp.scenes.training.tower import Stream, preprocess, tower_forward
from vtp.scenes.training.train import main
from vtp.scenes.training.train_tower import train_tower

LIMIT = 9_950_000  # bytes of float32 weights, so that the folder stays below 10 MB


@pytest.fixture(scope="module")
def first() -> LlavaForConditionalGeneration:
    return load_first().eval()


@pytest.fixture(scope="module")
def grown() -> LlavaForConditionalGeneration:
    return grow(READER.form, seed=1).eval()


def images(*seeds: int, size: int = 336) -> torch.Tensor:
    return preprocess(np.stack([draw(seed, size, (1, 3)).pixels for seed in seeds]))


# -- forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_deepened_model_fits_into_ten_megabytes(recipe: Recipe) -> None:
    form = replace(recipe.form, decoder_layers=recipe.form.decoder_layers + 2)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(build_config(form))
    assert 4 * sum(weight.numel() for weight in model.parameters()) <= LIMIT


def test_the_readers_tower_has_twelve_used_blocks() -> None:
    config = build_config(READER.form)
    assert config.vision_feature_layer == -2 and config.vision_config.num_hidden_layers - 1 >= 12


def test_the_first_recipe_is_the_shipped_model(first: LlavaForConditionalGeneration) -> None:
    form = replace(FIRST.form, decoder_layers=6)
    built = build_config(form).to_dict()
    assert {n: w.shape for n, w in first.state_dict().items()} == {
        n: w.shape for n, w in LlavaForConditionalGeneration(build_config(form)).state_dict().items()
    }
    assert built["vision_config"]["num_hidden_layers"] == 5


def test_every_stage_trains_on_sizes_that_are_whole_patches() -> None:
    for recipe in RECIPES.values():
        for stage in (*recipe.tower, *recipe.decoder):
            assert all(size % 14 == 0 and size <= 336 for size in stage.sizes)
            assert stage.steps % recipe.every == 0, "the last steps would go unsaved"


# -- words ---------------------------------------------------------------------------------------------------


def test_the_readers_tokenizer_adds_to_the_first_ones() -> None:
    old, new = Tokenizer.from_file(str(model_dir() / "tokenizer.json")), build_tokenizer(reads=True)
    assert build_tokenizer().get_vocab() == old.get_vocab()
    assert old.get_vocab().items() <= new.get_vocab().items() and new.get_vocab_size() <= 512
    for item in held_out(120, kinds=READER_KINDS):
        if item.kind != "sign":
            text = f"USER: {item.prompt} ASSISTANT: {item.answer}"
            assert old.encode(text).ids == new.encode(text).ids


def test_characters_of_signs_are_single_tokens() -> None:
    tokenizer = build_tokenizer(reads=True)
    assert len(tokenizer.encode(" sign", add_special_tokens=False).ids) == 1
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list(ALPHABET), rng.choice([2, 3])))
        tokens = tokenizer.encode(" " + text, add_special_tokens=False).tokens
        assert tokens == [f"Ġ{text[0]}", *text[1:]]


# -- growing -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_grown_tower_sees_what_the_first_one_saw(grown: LlavaForConditionalGeneration) -> None:
    """Nearly: behind the projector it is nearer than the spread of things; a random tower is far off."""
    stream = Stream(replace(READER.tower[0], batch=8), 0, 1)
    pixels, corners, targets = next(stream.batches())
    teacher = Teacher()
    features, _ = tower_forward(grown.model.vision_tower, pixels, corners)
    own, _ = tower_forward(teacher.tower, pixels, corners)
    assert teacher.loss(pixels, corners, own, targets) < 1e-6
    near = teacher.loss(pixels, corners, features, targets)
    shuffled = features[:, torch.randperm(features.shape[1])]
    assert near < 1.0 < teacher.loss(pixels, corners, shuffled, targets)


def test_the_thirds_hold_every_hidden_unit_once(
    first: LlavaForConditionalGeneration, grown: LlavaForConditionalGeneration
) -> None:
    old, new = (m.model.vision_tower.encoder.layers for m in (first, grown))
    for number, layer in enumerate(list(old)[:-1]):
        parts = new[PARTS * number : PARTS * (number + 1)]
        said = torch.cat([part.mlp.fc2.weight for part in parts], 1)
        spoken = said[:, said.abs().sum(0) > 0]
        assert spoken.shape == layer.mlp.fc2.weight.shape
        assert torch.allclose(spoken.sum(1), layer.mlp.fc2.weight.sum(1), atol=1e-4)
        assert torch.allclose(sum(part.mlp.fc2.bias for part in parts), layer.mlp.fc2.bias, atol=1e-6)


def test_a_form_that_cannot_grow_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"a tower of 9 and a decoder of 4 layers cannot grow.*choose 13 and 4"
    ):
        grow(Form(tower_layers=9), seed=1)


def test_deepening_keeps_the_form(grown: LlavaForConditionalGeneration) -> None:
    deep = deepen(grown, READER.form)
    assert len(deep.model.language_model.layers) == 6
    assert deep.config.text_config.intermediate_size == READER.form.decoder_mlp
    assert len(deep.model.vision_tower.encoder.layers) == 13


# -- windows -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_whole_window_is_transformers_own_tower(grown: LlavaForConditionalGeneration) -> None:
    pixels = images(1, 2)
    reference = grown.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    features, _ = tower_forward(grown.model.vision_tower, pixels, torch.zeros(2, 2, dtype=torch.int64))
    assert torch.allclose(features, reference, atol=2e-4)


@torch.no_grad()
def test_a_window_takes_the_positions_of_its_place(first: LlavaForConditionalGeneration) -> None:
    """The same as a tower whose position table is cut out by hand."""
    tower, pixels = first.model.vision_tower, images(3, size=168)
    table = tower.embeddings.position_embedding.weight.detach().clone()
    cut = table[1:].view(24, 24, -1)[5:17, 9:21].reshape(144, -1)
    embedded = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + cut
    hidden = torch.cat((tower.embeddings.class_embedding[None, None] + table[:1], embedded), 1)
    hidden = tower.pre_layrnorm(hidden)
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    features, _ = tower_forward(tower, pixels, torch.tensor([[5, 9]]))
    assert torch.allclose(features, hidden[:, 1:], atol=1e-4)


def test_a_stream_of_windows_stays_inside_and_in_training() -> None:
    stage = replace(READER.tower[0], sizes=(168, 336), batch=4)
    batches = Stream(stage, 0, 1).batches()
    for side in (12, 24, 12):
        pixels, corners, targets = next(batches)
        assert corners is not None and corners.min() >= 0 and corners.max() <= 24 - side
        assert pixels.shape[-1] == side * 14 and targets.character.shape[1] == side * side
        assert targets.character.max() > 0 and targets.shape.max() > 0


# -- questions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["full", "chat"])
def test_packed_labels_spell_the_answers(first: LlavaForConditionalGeneration, style: str) -> None:
    encoded = Pool(first.model.vision_tower, 50, reads=True).sample(
        168, (1, 3), 2, 2, np.random.default_rng(0)
    )
    packed = pack([e.picture for e in encoded], 30, style, np.random.default_rng(1), READER_KINDS)
    tokenizer, seen = build_tokenizer(reads=True), set()
    for row, entry in enumerate(encoded):
        (sign,) = entry.picture.signs
        for kind, labels in zip(packed.kinds[row], packed.labels[row], strict=True):
            answer = tokenizer.decode(labels[labels != SKIP].tolist()).split()
            if READER_KINDS[kind] == "sign":
                assert answer[-1] == sign.text
            elif READER_KINDS[kind] == "presence":
                assert answer[-1] in ("yes", "no")
            seen.add(READER_KINDS[kind])
    assert seen == set(READER_KINDS)


def test_a_pools_windows_stand_in_the_whole_grid(first: LlavaForConditionalGeneration) -> None:
    pool = Pool(first.model.vision_tower, 0, reads=True)
    encoded = pool.sample(168, (1, 3), 24, 24, np.random.default_rng(0))
    places = np.array([(t.x, t.y) for e in encoded for t in e.picture.things])
    assert encoded[0].picture.owner.shape == (336, 336) and encoded[0].features.shape == (144, 128)
    assert places.max() > 230 and places.min() < 100 and pool.next < HELD_OUT


# -- running and resuming ------------------------------------------------------------------------------------

TINY = replace(
    READER,
    tower=(TowerStage("a", (112,), (3, 6), 4, 1e-3, 2.0, 4, (6, 10), windows=True),),
    decoder=(Stage("b", (168,), (1, 3), "full", 2, 1e-3, 2.0, 4),),
    every=2,
)


def test_a_stopped_tower_goes_on_where_it_was(tmp_path: Path, grown: LlavaForConditionalGeneration) -> None:
    model = grow(READER.form, seed=1)
    short = replace(TINY, tower=(replace(TINY.tower[0], steps=2),))
    train_tower(model.model.vision_tower, Run(tmp_path), 1, short)
    half = torch.load(tmp_path / "tower.pt", weights_only=True)
    # as if killed before the stage's end was written
    torch.save({**half, "stage": 0, "step": 2}, tmp_path / "tower.pt")
    again = grow(READER.form, seed=2)
    train_tower(again.model.vision_tower, Run(tmp_path), 1, TINY)
    done = torch.load(tmp_path / "tower.pt", weights_only=True)
    log = (tmp_path / "training.log").read_text()
    assert "from step 2" in log and "a     4" in log and log.count("a     2") == 1
    assert done["stage"] == 1 and done["picture"] > half["picture"]
    assert not torch.equal(
        done["tower"]["embeddings.patch_embedding.weight"], half["tower"]["embeddings.patch_embedding.weight"]
    )
    finished = grow(READER.form, seed=3)
    train_tower(finished.model.vision_tower, Run(tmp_path), 1, TINY)
    kept = finished.model.vision_tower.state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in done["tower"].items())


def test_a_decoder_is_trained_and_published(tmp_path: Path) -> None:
    model, published = grow(READER.form, seed=1), []
    before = model.model.multi_modal_projector.linear_1.weight.clone()
    tower = model.model.vision_tower.embeddings.patch_embedding.weight.clone()
    train_decoder(model, Run(tmp_path), 1, TINY, published.append)
    assert published == [model]
    assert not torch.equal(model.model.multi_modal_projector.linear_1.weight, before)
    assert torch.equal(model.model.vision_tower.embeddings.patch_embedding.weight, tower)
    log = (tmp_path / "training.log").read_text()
    assert all(f"{kind} " in log for kind in READER_KINDS)


def test_the_command_writes_a_grown_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "reader"
    monkeypatch.setattr(sys, "argv", ["train", "--recipe", "reader", "--init-only", "--output", str(folder)])
    main()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10_000_000
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    assert model.config.vision_config.num_hidden_layers == 13


def test_an_unknown_recipe_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--recipe", "poet"])
    with pytest.raises(SystemExit):
        main()
    assert "invalid choice: 'poet'" in capsys.readouterr().err
