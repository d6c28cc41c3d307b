"""The parts of vtp-calib: reading data, judging answers, intervals, the journal, the search."""

from __future__ import annotations

import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vtp.calib import metrics, stats
from vtp.calib.data import Sample, load_samples
from vtp.calib.keep import report, search
from vtp.calib.keep.examiner import Marks
from vtp.calib.keep.journal import Answer, Journal
from vtp.engines import UsageError, VtpError
from vtp.runtime.bundle.folder import open_bundle
from vtp.scenes import model_dir

# -- data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the pictures that the sets below name."""
    for name in ("a.png", "7.jpg", "COCO_val2014_000000000042.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def write(file: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    file.write_text(text, encoding="utf-8")
    return file


def test_jsonl_takes_one_answer_several_or_none(folder: Path) -> None:
    lines = [
        {"image": "a.png", "prompt": "what ?", "answer": "star"},
        {"image": "a.png", "prompt": "why ?", "answer": ["so", "because"], "kind": "ignored"},
    ]
    file = write(folder / "data.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = load_samples(file)
    assert first == Sample(folder / "a.png", "what ?", ("star",))
    assert second.answers == ("so", "because")
    assert first.key != second.key and first.key == Sample(folder / "a.png", "what ?", ("star",)).key
    (folder / "a.png").write_bytes(b"another picture under the same name")
    assert Sample(folder / "a.png", "what ?", ("star",)).key != first.key
    (bare,) = load_samples(write(folder / "bare.jsonl", '{"image": "a.png", "prompt": "x"}'))
    assert bare.answers == ()


def test_public_sets_are_recognised(folder: Path) -> None:
    questions = {
        "data_subtype": "val2014",
        "questions": [{"question_id": 5, "image_id": 42, "question": "what ?"}],
    }
    answers = {"annotations": [{"question_id": 5, "answers": [{"answer": "cat"}, {"answer": "dog"}]}]}
    file, notes = write(folder / "q.json", questions), write(folder / "a.json", answers)
    (vqa,) = load_samples(file, annotations=notes)
    assert vqa == Sample(folder / "COCO_val2014_000000000042.jpg", "what ?", ("cat", "dog"))
    gqa = {"201": {"imageId": "7", "question": "who ?", "answer": "man", "types": {}}}
    assert load_samples(write(folder / "g.json", gqa)) == [Sample(folder / "7.jpg", "who ?", ("man",))]
    text = {"data": [{"image_id": "7", "question": "read ?", "answers": ["stop"] * 10}]}
    (read,) = load_samples(write(folder / "t.json", text))
    assert len(read.answers) == 10
    kinds = {"query": "open", "verify": "binary", "compare": "binary"}
    gqa = {name: {**gqa["201"], "types": {"structural": name}} for name in kinds}
    assert [one.kind for one in load_samples(write(folder / "g.json", gqa))] == list(kinds.values())
    asked = {"question_id": 1, "image": "7.jpg", "text": "Is there a dog in the image?", "label": "no"}
    lines = "\n".join(json.dumps({**asked, "label": label}) for label in ("yes", "no"))
    polls = load_samples(write(folder / "coco_pope_popular.json", lines))
    assert polls[1] == Sample(folder / "7.jpg", asked["text"], ("no",), "popular")
    assert polls[0].answers == ("yes",)
    assert load_samples(write(folder / "polls.json", lines), "pope")[0].kind == ""


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("d.jsonl", "", "holds no question"),
        ("d.jsonl", "{", "line 1 is not valid JSON"),
        ("d.jsonl", '{"prompt": "x"}', 'has no "image"'),
        ("d.jsonl", '{"image": "a.png", "prompt": 3}', 'has no "prompt"'),
        ("d.jsonl", '{"image": "a.png", "prompt": "x", "answer": 3}', "neither a string"),
        ("d.jsonl", '{"image": "b.png", "prompt": "x"}', "b.png, which does not exist"),
        (
            "d.jsonl",
            '{"image": "a.png", "prompt": "x"}\n{"image": "a.png", "prompt": "x", "answer": "y"}',
            "some questions have answers",
        ),
        ("d.json", "[1]", "has an unknown format"),
        ("d.json", "{", "is not valid JSON"),
        ("d.json", '{"questions": []}', "--annotations"),
        ("d.json", '{"1": {"imageId": "7", "answer": "x"}}', "not a valid gqa file"),
        ("d.json", '{"data": [{"question": "x"}]}', "not a valid textvqa file"),
        (
            "coco_pope_random.json",
            '{"image": "a.png", "text": "x", "label": "maybe"}',
            "line 1 is not a line of",
        ),
        ("coco_pope_random.json", '{"image": 3, "text": "x", "label": "no"}', "line 1 is not a line of POPE"),
        ("coco_pope_random.json", "[]", "line 1 is not a line of POPE"),
        ("coco_pope_random.json", '{"image": "b.png", "text": "x", "label": "no"}', "which does not exist"),
        ("d.json", '{"1": {"imageId": "7", "question": "x", "answer": "y", "types": []}}', "valid gqa file"),
    ],
)
def test_unreadable_data_is_refused_in_one_line(folder: Path, name: str, content: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        load_samples(write(folder / name, content))
    assert "\n" not in str(caught.value)


def test_missing_data_and_unknown_formats_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_samples(folder / "none.jsonl")
    with pytest.raises(UsageError, match="unknown data format 'coco'"):
        load_samples(write(folder / "x.json", {}), "coco")


# -- metrics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("The Red star.", "red star"),
        (" an apple ", "apple"),
        ("Two dogs", "2 dogs"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("yes, it is", "yes it is"),
        ("t-shirt", "t shirt"),
        ("don't", "don't"),
    ],
)
def test_answers_are_normalised(given: str, plain: str) -> None:
    assert metrics.normalize(given) == plain
    assert metrics.normalize(plain) == plain


def test_exact_takes_any_accepted_answer() -> None:
    assert metrics.exact("A red star.", ["blue star", "red star"]) == 1
    assert metrics.exact("red", ["red star"]) == 0


@pytest.mark.parametrize(("votes", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_votes(votes: int, score: float) -> None:
    """The known values of the VQA accuracy for ten annotators."""
    assert metrics.vqa("cat", ["cat"] * votes + ["dog"] * (10 - votes)) == pytest.approx(score)


def test_agreement_counts_up_to_the_first_difference() -> None:
    assert metrics.agreement([1, 2, 3], [1, 2, 3]) == 1
    assert metrics.agreement([1, 9, 3], [1, 2, 3]) == pytest.approx(1 / 3)
    assert metrics.agreement([1, 2, 3, 4], [1, 2]) == 0.5
    assert metrics.agreement([], []) == 1


def test_metric_follows_the_data() -> None:
    assert metrics.choose_metric("auto", []) == "agreement"
    assert metrics.choose_metric("auto", ["x"]) == "exact"
    assert metrics.choose_metric("auto", ["x"] * 10) == "vqa"
    assert metrics.choose_metric("agreement", ["x"]) == "agreement"
    with pytest.raises(UsageError, match="needs answers"):
        metrics.choose_metric("exact", [])
    with pytest.raises(UsageError, match="unknown metric"):
        metrics.choose_metric("bleu", ["x"])


# -- intervals -----------------------------------------------------------------------------------------------


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng, held = np.random.default_rng(1), 0
    for _ in range(60):
        base = rng.random(300) < 0.9
        kept = base & (rng.random(300) < 0.95)
        estimate = stats.ratio(kept.astype(float), base.astype(float))
        held += estimate.low <= 0.95 <= estimate.high
    assert held >= 52


def test_intervals_drawn_in_pieces_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    kept, base = rng.random(301), rng.random(301)
    draws = np.random.default_rng(301).integers(0, 301, (stats.RESAMPLES, 301))
    shares = kept[draws].mean(axis=1) / base[draws].mean(axis=1)
    monkeypatch.setattr(stats, "_AT_A_TIME", 7 * 301 + 5)
    found = stats.ratio(kept, base)
    assert [found.low, found.high] == list(np.quantile(shares, [0.025, 0.975]))
    found = stats.mean(kept)
    assert [found.low, found.high] == list(np.quantile(kept[draws].mean(axis=1), [0.025, 0.975]))


def test_intervals_of_a_large_set_take_little_memory() -> None:
    """As many questions as VQAv2's validation set: all draws at once would be 3.4 GB of question numbers."""
    tracemalloc.start()
    stats.ratio(np.ones(214_354), np.ones(214_354))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=30))
def test_a_bundle_compared_with_itself_differs_by_nothing(scores: list[float]) -> None:
    gap, share = stats.difference(scores, scores), stats.ratio(scores, scores)
    assert (gap.value, gap.low, gap.high) == (0, 0, 0)
    assert (share.value, share.low, share.high) == (1, 1, 1)
    whole = stats.mean(scores)
    assert whole.low - 1e-9 <= whole.value <= whole.high + 1e-9


# -- journal -------------------------------------------------------------------------------------------------


def test_a_journal_cut_short_by_a_kill_goes_on(tmp_path: Path) -> None:
    file, answers = tmp_path / "deep/answers.jsonl", [Answer("a star", [1, 2], 3.5), Answer("", [], 1.0)]
    journal = Journal(file)
    journal.add("b", 3, "q1", answers[0])
    journal.add("b", 3, "q2", answers[1])
    journal.close()
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    again = Journal(file)
    assert again.get("b", 3, "q1") == answers[0] and again.get("b", 3, "q2") is None
    assert again.get("b", 4, "q1") is None and again.get("c", 3, "q1") is None
    again.add("b", 3, "q2", answers[1])
    again.close()
    assert file.read_bytes() == whole


def test_another_file_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(VtpError, match="not a journal"):
        Journal(tmp_path / "x.jsonl")


def test_a_second_run_with_the_same_journal_is_refused(tmp_path: Path) -> None:
    """Two runs that appended to one file would each cut the other's lines short."""
    file = tmp_path / "answers.jsonl"
    first = Journal(file)
    first.add("b", 3, "q1", Answer("a star", [1], 3.5))
    with file.open("a") as torn:
        torn.write("what the first is just writing")
    with pytest.raises(VtpError, match=r"another vtp-calib is writing .*answers.jsonl; wait until") as caught:
        Journal(file)
    assert "\n" not in str(caught.value)
    assert file.read_text().endswith("what the first is just writing")  # not taken for torn
    first.close()
    again = Journal(file)
    assert again.get("b", 3, "q1") == Answer("a star", [1], 3.5)
    again.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_journal_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "answers.jsonl")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._file.fileno())
    os.close(full)
    with pytest.raises(VtpError, match=r"cannot write .*No space left on device") as caught:
        journal.add("b", 3, "q1", Answer("a star", [1], 3.5))
    assert "\n" not in str(caught.value)
    journal.close()


# -- search --------------------------------------------------------------------------------------------------

ALL = [8, 16, 32, 64, 128, 192]


def trials(rates: dict[int, float], count: int = 400) -> search.Trials:
    """Keep-counts with given rates of right answers; an unpruned score of 1."""

    def marks(keep: int) -> Marks:
        right = round(rates[keep] * count)
        return Marks(keep, [1.0] * right + [0.0] * (count - right), 10.0 + keep)

    return search.Trials(marks, [1.0] * count)


@given(st.integers(0, len(ALL) - 1), st.integers(1, len(ALL)))
@settings(deadline=None)
def test_the_smallest_that_holds_is_found_without_trying_all(first: int, extra: int) -> None:
    rates = {keep: 0.99 if place >= first else 0.5 for place, keep in enumerate(ALL)}
    found = search.smallest_holding(ALL, 0.97, trials(rates))
    assert found.chosen.keep == ALL[first]
    assert len(found.tried) <= 4


def test_a_dip_by_noise_does_not_hide_a_smaller_count() -> None:
    rates = {8: 0.5, 16: 0.98, 32: 0.98, 64: 0.98, 128: 0.99, 192: 0.99}
    found = search.smallest_holding(ALL, 0.97, trials({**rates, 32: 0.96}))
    assert found.chosen.keep == 64  # the halving met the dip; what lies under it stays untried
    assert search.smallest_holding(ALL, 0.97, trials(rates)).chosen.keep == 16


def test_verdicts_say_what_is_noise() -> None:
    one = trials({8: 0.98, 16: 1.0, 32: 0.9})
    assert [one(keep).verdict(0.97) for keep in (8, 16, 32)] == [search.NOISE, search.HOLDS, search.FAILS]


def test_a_floor_that_nothing_holds_is_an_error() -> None:
    with pytest.raises(VtpError, match=r"holds 0\.97: the largest, 192"):
        search.smallest_holding(ALL, 0.97, trials(dict.fromkeys(ALL, 0.5)))
    with pytest.raises(UsageError, match="outside 0 to 1"):
        search.smallest_holding(ALL, 97, trials(dict.fromkeys(ALL, 0.5)))


def test_a_budget_takes_the_best_within_it() -> None:
    rates = {8: 0.6, 16: 0.8, 32: 0.95, 64: 0.95, 128: 0.99, 192: 1.0}
    assert search.best_within(ALL, 80, trials(rates)).chosen.keep == 32  # as good as 64, and smaller
    assert search.best_within(ALL, 1000, trials(rates)).chosen.keep == 192
    with pytest.raises(VtpError, match=r"the fastest, 8, takes 18\.0 ms"):
        search.best_within(ALL, 5, trials(rates))
    with pytest.raises(UsageError, match="not a time"):
        search.best_within(ALL, 0, trials(rates))


def test_a_memory_budget_tries_only_what_fits() -> None:
    rates = {8: 0.6, 16: 0.8, 32: 0.95, 64: 0.95, 128: 0.99, 192: 1.0}
    needs = {keep: 100.0 + keep for keep in ALL}
    one = trials(rates)
    assert search.best_fitting(needs, 170, one).chosen.keep == 32  # as good as 64, and smaller
    assert set(one.done) == {32, 64}
    with pytest.raises(VtpError, match="the smallest, 8, may need 108 MB"):
        search.best_fitting(needs, 107, trials(rates))
    with pytest.raises(UsageError, match="not a valid size"):
        search.best_fitting(needs, -1, trials(rates))


def test_a_finer_grid_of_the_built_in_model_names_no_folder(exported: Any) -> None:
    """Other folders are called model as well."""
    manifest = open_bundle(exported("vispruner").folder).manifest
    text = json.loads((model_dir() / "config.json").read_text())["text_config"]
    sizes = {"hidden_size": text["hidden_size"], "vocab_size": text["vocab_size"]}
    own = replace(manifest.model, name=model_dir().name, **sizes)
    for model, begins in (
        (own, "vtp-export --method vispruner"),
        (replace(own, vocab_size=32064), "vtp-export --model DIR "),
    ):
        assert report.finer(replace(manifest, model=model), [2, 6], 6).startswith(begins)
