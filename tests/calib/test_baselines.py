"""What a method has to beat: a random choice in the place of a pruner's, other bundles, and what is said."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from vtp.calib import cli
from vtp.calib.baselines.against import Beside, _beside, _check_model
from vtp.calib.baselines.random_choice import Draws, RandomChoice, _wrapped, question_seed, why_not
from vtp.engines import UsageError
from vtp.export.pruners import find_method
from vtp.export.verify.parity import Chosen
from vtp.export.verify.reference import reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.opening import Opening
from vtp.runtime.result import Timings
from vtp.runtime.stages.runner import StageRunner

from ..models.tiny import IMAGE, pixels, prompt_ids
from .asked import unpruned_answers

N = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, exported: Any) -> Path:
    """Five questions whose accepted answers are what the unpruned model says."""
    return unpruned_answers(tmp_path_factory.mktemp("data"), exported("none").folder, 5)


def calib(*arguments: object) -> int:
    return cli.main([*map(str, arguments), "--threads", "1", "--max-new-tokens", "4"])


@pytest.mark.parametrize(("name", "positions"), [("vispruner", "compact"), ("original", "original")])
def test_tokens_kept_at_random_answer_as_torch_with_those_tokens(exported, name, positions) -> None:
    """The whole way: drawn places, gathered rows, places in the prompt, a step after it."""
    made, ids, draws = exported(name), prompt_ids(N), Draws(np.random.default_rng(0))
    bundle = open_bundle(made.folder)
    runner = StageRunner(bundle, "ort-cpu", 1, Opening(wrapped=_wrapped(made.folder, draws)))
    draws.begin(42)
    row = ids[0].tolist()
    start = row.index(IMAGE)
    picture = pixels(seed=1)
    short = [*row[:start], IMAGE, *row[start + N :]]
    values = runner.prefill(6, picture.numpy(), short, start, Timings())
    places = np.sort(np.random.default_rng(42).permutation(N)[:6])
    assert values["keep_indices"].numpy().tolist() == [places.tolist()]
    model = LlavaForConditionalGeneration.from_pretrained(made.model).eval()
    pruner = Chosen(find_method("vispruner")((4, 4), 6), torch.from_numpy(places)[None])
    answer = reference_generate(model, pruner, ids, picture, 2, positions=positions)
    np.testing.assert_allclose(values["logits"].numpy()[0, 0], answer.step_logits[0], atol=2e-4)
    position = int(values["next_position"].numpy()[0])
    after = runner.step(6, answer.token_ids[0], position)
    np.testing.assert_allclose(after, answer.step_logits[1], atol=2e-4)
    runner.close()


def test_a_question_keeps_its_own_places_wherever_it_is_asked(exported, data) -> None:
    draws, folder = Draws(np.random.default_rng(0)), exported("vispruner").folder
    pictures = [data.parent / f"{number}.png" for number in range(2)]
    questions = [(picture, prompt) for picture in pictures for prompt in ("what ?", "who ?")]
    with Pipeline.load(folder, "ort-cpu", 1, opening=Opening(wrapped=_wrapped(folder, draws))) as pipe:

        def kept(image: Path, prompt: str, keep: int) -> tuple[int, ...]:
            draws.begin(question_seed(image, prompt))
            return tuple(pipe.generate(image, prompt, keep_tokens=keep, max_new_tokens=1).kept)

        first = [kept(*question, keep=3) for question in questions]
        again = [kept(*question, keep=3) for question in reversed(questions)]
        more = [kept(*question, keep=6) for question in questions]
    assert first == again[::-1] and len(set(first)) == len(questions)
    assert all(set(few) < set(many) and len(many) == 6 for few, many in zip(first, more, strict=True))


def test_rows_of_several_pictures_and_of_half_precision_are_those_that_came_in(exported) -> None:
    """Each picture has a draw of its own; rows keep their dtype."""
    with Pipeline.load(exported("float16").folder, "ort-cpu", 1) as pipe, pipe.claimed() as runner:
        (stage,) = [stage for stage in runner.stages("image", 6) if stage.info.role == "pruner"]
        width = stage.graph.inputs["image_features"].shape[2]
        rows = np.random.default_rng(1).normal(size=(2, N, width)).astype(np.float16)
        choice = RandomChoice(Draws(np.random.default_rng(7)), "image_features", stage.engine)
        answer = choice.run({"image_features": choice.put(rows)})
        places, kept = answer["keep_indices"].numpy(), answer["kept_features"].numpy()
    drawn = np.random.default_rng(7)
    assert places.tolist() == [sorted(drawn.permutation(N)[:6].tolist()) for _ in range(2)]
    assert kept.dtype == np.float16
    for picture in range(2):
        for slot, place in enumerate(places[picture]):
            assert np.array_equal(kept[picture, slot], rows[picture, place])


@pytest.mark.parametrize(
    ("ahead", "beaten", "says"),
    [
        (30, True, "m:4 beats it: 0.800 against 0.500, +0.300 (+0.210 to +0.390), 100 questions"),
        (0, False, "m:4 does not beat it: 0.500 against 0.500, +0.000 (+0.000 to +0.000), 100 questions"),
        (2, False, "m:4 does not beat it: 0.520 against 0.500, +0.020 (+0.000 to +0.050), 100 questions"),
    ],
)
def test_a_line_has_both_figures_the_interval_and_the_number(ahead, beaten, says) -> None:
    """A binomial's own quantiles: of 100 resampled questions 21 to 39 of 30 %, 0 to 5 of 2 %."""
    other = [1.0] * 50 + [0.0] * 50
    own = [1.0] * (50 + ahead) + [0.0] * (50 - ahead)
    found = _beside("m:4", "it", own, other)
    assert found.beaten is beaten
    number = r"[+-]\d\.\d{3}"
    assert re.sub(rf"\({number} to {number}\)", "", found.line) == re.sub(
        rf"\({number} to {number}\)", "", says
    )
    wanted = [float(text) for text in re.findall(number, says)][-2:]
    assert [found.ahead.low, found.ahead.high] == pytest.approx(wanted, abs=0.011)
    assert found.to_json()["beaten"] is beaten and isinstance(found, Beside)


def test_keep_holds_its_choice_against_a_random_one(exported, data, tmp_path, capsys) -> None:
    bundle = Path(shutil.copytree(exported("vispruner").folder, tmp_path / "bundle"))
    goal = ["--data", data, "--reference", exported("none").folder, "--budget-ms", 1e6]
    assert calib("keep", bundle, *goal) == 0
    told = capsys.readouterr()
    (found,) = open_bundle(bundle).manifest.calibration["against"]
    keep = open_bundle(bundle).manifest.visual.default_keep
    assert found["method"] == f"vispruner:{keep}" and found["baseline"] == f"a random choice of {keep} tokens"
    tried = open_bundle(bundle).manifest.calibration["tried"][str(keep)]["score"]
    assert found["score"] == tried
    assert found["difference"][0] == pytest.approx(tried[0] - found["baseline_score"][0])
    where = told.out if found["beaten"] else told.err
    assert f"beat{'s' if found['beaten'] else ''} a random choice of {keep} tokens: " in where
    assert "5 questions" in where
    journal = bundle.parent / "bundle-calib/answers.jsonl"
    lines = len(journal.read_text().splitlines())
    assert calib("keep", bundle, *goal, "--json") == 0  # all answers are known
    assert json.loads(capsys.readouterr().out)["against"] == [found]
    assert len(journal.read_text().splitlines()) == lines
    assert calib("keep", bundle, *goal, "--json", "--against", "none") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["against"] == [] and "beat" not in said.err


def test_score_holds_every_pruned_bundle_against_others_at_the_same_cost(
    exported, data, tmp_path, capsys
) -> None:
    none, pruned, other = (exported(name).folder for name in ("none", "vispruner", "original"))
    arguments = [none, f"{pruned}:3", f"{pruned}:6", "--data", data, "--against", other]
    assert calib("score", *arguments, "--journal", tmp_path / "s", "--json") == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    names = [(one["method"], one["baseline"]) for one in found["against"]]
    assert names == [
        ("vispruner:3", "a random choice of 3 tokens"),
        ("vispruner:3", "original:3"),
        ("vispruner:6", "a random choice of 6 tokens"),
        ("vispruner:6", "original:6"),
    ]
    assert [one["score"][0] for one in found["against"][::2]] == [
        row["score"][0] for row in found["bundles"][1:]
    ]
    warned = [line for line in told.err.splitlines() if "warning" in line]
    assert len(warned) == sum(not one["beaten"] for one in found["against"])


def test_what_is_held_against_nothing_is_said(exported, data, tmp_path, capsys) -> None:
    fastv, many = exported("fastv").folder, exported("adaptprune").folder
    out = ["--data", data, "--journal", tmp_path / "s"]
    assert calib("score", fastv, *out) == 0
    assert "fastv:5 is held against no random choice: fastv chooses inside the decoder" in (
        capsys.readouterr().err
    )
    pruned = exported("vispruner").folder
    assert calib("score", f"{pruned}:3", "--against", many, *out) == 0
    assert "keeps 4 tokens at least, more than 3; it is held against nothing" in capsys.readouterr().err


def test_a_bundle_that_is_no_baseline_is_refused(exported, data, tmp_path, capsys) -> None:
    pruned, out = exported("vispruner").folder, ["--data", data, "--journal", tmp_path / "s"]
    assert calib("score", pruned, "--against", "none", "--against", pruned, *out) == 2
    assert "--against none asks for no baseline" in capsys.readouterr().err
    assert calib("score", pruned, "--against", tmp_path / "nowhere", *out) != 0
    assert "nowhere" in capsys.readouterr().err
    own = open_bundle(pruned).manifest
    wider = replace(own, model=replace(own.model, hidden_size=own.model.hidden_size * 2))
    with pytest.raises(UsageError, match="--against b is a bundle of another model"):
        _check_model("b", wider, own)


def test_baselines_have_no_baseline_and_places_known_to_the_pruner_alone_are_told(exported) -> None:
    manifest = open_bundle(exported("original").folder).manifest
    assert why_not(manifest, 3) is None
    named = replace(manifest, method=replace(manifest.method, name="random"))
    assert why_not(named, 3) == ""
    fewer = replace(manifest, visual=replace(manifest.visual, count=20, grid=[4, 5]))
    assert "known to its pruner alone" in str(why_not(fewer, 3))
    compact = open_bundle(exported("vispruner").folder).manifest
    assert why_not(replace(compact, visual=replace(compact.visual, count=20, grid=[4, 5])), 3) is None
    assert "inside the decoder" in str(why_not(open_bundle(exported("fastv").folder).manifest, 5))
