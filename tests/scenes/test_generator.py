"""The generator: deterministic, true to its masks, and held-out pictures apart from training ones."""

import numpy as np
import pytest

from vtp.scenes.exam import held_out
from vtp.scenes.generator.pictures import (
    COLORS,
    HELD_OUT,
    KINDS,
    PATCH,
    PLACES,
    SHAPES,
    SIZES,
    ask,
    count,
    draw,
    held_out_seed,
    place,
    training_seed,
    unique_words,
)
from vtp.scenes.training.labels import ENOUGH, patch_labels


def test_the_same_seed_draws_the_same_picture() -> None:
    first, second = draw(7), draw(7)
    assert np.array_equal(first.pixels, second.pixels) and first.things == second.things
    assert not np.array_equal(first.pixels, draw(8).pixels)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_drawn(size: int) -> None:
    picture = draw(3, size, (1, 3))
    assert picture.pixels.shape == (size, size, 3) and picture.pixels.dtype == np.uint8
    assert picture.image.size == (size, size)


@pytest.mark.parametrize("size", [0, 100, 337, 6720])
def test_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size {size} is not allowed; choose a multiple of 14"):
        draw(0, size)


def test_training_and_held_out_seeds_are_disjoint() -> None:
    assert training_seed(HELD_OUT - 1) < held_out_seed(0)
    with pytest.raises(ValueError, match="outside"):
        training_seed(HELD_OUT)
    with pytest.raises(ValueError, match="negative"):
        held_out_seed(-1)


@pytest.mark.parametrize("seed", range(25))
def test_masks_hold_the_things(seed: int) -> None:
    picture = draw(seed)
    for number, thing in enumerate(picture.things, 1):
        rows, cols = np.nonzero(picture.owner == number)
        assert len(rows) > 100
        assert abs(cols.mean() - thing.x) < thing.radius and abs(rows.mean() - thing.y) < thing.radius
        painted = picture.pixels[rows, cols].mean(0)
        nearest = min(COLORS, key=lambda c: float(np.abs(np.array(COLORS[c]) - painted).sum()))
        assert nearest == thing.color
        if thing.shape not in ("ring", "moon"):
            assert picture.owner[int(thing.y), int(thing.x)] == number


@pytest.mark.parametrize("seed", range(25))
def test_answers_are_true(seed: int) -> None:
    picture, rng = draw(held_out_seed(seed)), np.random.default_rng(seed)
    for kind in KINDS:
        question = ask(picture, kind, rng)
        word = question.text.split()[-2]
        if kind == "count":
            assert question.answer == str(sum(word in (t.shape, t.color) for t in picture.things))
            continue
        (thing,) = [t for t in picture.things if word in (t.shape, t.color)]
        expected = place(picture, thing) if kind == "where" else getattr(thing, kind)
        assert question.answer == expected


def test_questions_cover_the_vocabulary() -> None:
    rng = np.random.default_rng(0)
    answers = {k: {ask(draw(s), k, rng).answer for s in range(150)} for k in KINDS}
    assert answers["shape"] == set(SHAPES) and answers["color"] == set(COLORS)
    assert answers["where"] == set(PLACES) and answers["count"] >= {"0", "1", "2", "3", "4"}


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of shape, color, count, where"):
        ask(draw(1), "taste", np.random.default_rng(0))


@pytest.mark.parametrize("seed", range(10))
def test_patch_labels_agree_with_the_masks(seed: int) -> None:
    picture = draw(seed)
    labels, grid = patch_labels(picture), 336 // PATCH
    for patch in range(grid * grid):
        row, col = divmod(patch, grid)
        cell = picture.owner[row * PATCH : (row + 1) * PATCH, col * PATCH : (col + 1) * PATCH]
        covered = (cell > 0).sum()
        if labels.shape[patch] > 0:
            assert covered >= ENOUGH
            shown = {(SHAPES.index(picture.things[n - 1].shape) + 1) for n in np.unique(cell) if n}
            assert labels.shape[patch] in shown
        elif labels.shape[patch] == 0:
            assert covered == 0
    assert labels.anchor.sum() == len(picture.things)
    for index, word in enumerate((*SHAPES, *COLORS)):
        assert labels.summary[index] == count(picture, word)


def test_unique_words_are_unique() -> None:
    picture = draw(11)
    assert all(count(picture, word) == 1 for word in unique_words(picture))


def test_the_exam_shares_pictures_and_repeats() -> None:
    first, second = list(held_out(10)), list(held_out(10))
    assert [(i.prompt, i.answer) for i in first] == [(i.prompt, i.answer) for i in second]
    assert [i.picture for i in first] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert first[0].image is first[3].image
    assert [(i.prompt, i.answer) for i in held_out(10, seed=5)] != [(i.prompt, i.answer) for i in first]
