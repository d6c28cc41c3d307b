"""The pipeline on tiny random models: answers, streams, one generation at a time, capacity, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import UserDict
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.runtime import Pipeline
from vtp.runtime.prompt.prompter import TextSpec

PROMPT = "what shape is the red ?"
LENGTH = 128  # the bundles' max_length; see tests/conftest.py
VISUAL = 16


def refuse(match: str | None, act: Callable[[], object], kind: type[VtpError] = UsageError) -> None:
    with pytest.raises(kind, match=match) as caught:
        act()
    assert "\n" not in str(caught.value)


# -- answers -------------------------------------------------------------------------------------------------


def test_result_says_it_all(pipe: Pipeline, picture: Image.Image) -> None:
    result = pipe.generate(picture, PROMPT, max_new_tokens=5)
    assert result.visual_tokens == (16, 6)
    assert result.visual_tokens.before == 16 and result.visual_tokens.after == 6
    assert len(result.kept) == 6 and result.kept == sorted(set(result.kept))
    assert len(result.token_ids) == 5 and result.finish_reason == "length"
    assert result.prompt_tokens > 5
    stages = ["preprocess", "tokenize", "vision_encoder", "pruner", "projector", "embed_tokens", "splice"]
    assert list(result.timings.to_dict()) == [*stages, "decoder", "ttft", "tpot", "total"]
    assert all(value > 0 for value in result.timings.to_dict().values())
    assert sum(result.timings.stages.values()) <= result.timings.ttft + 1e-3
    assert result.timings.ttft <= result.timings.total
    data = json.loads(json.dumps(result.to_json()))
    assert data["visual_tokens"] == {"before": 16, "after": 6}
    assert data["text"] == result.text and data["token_ids"] == result.token_ids


def test_unpruned_keeps_all(exported: Callable[[str], Any], picture: Image.Image) -> None:
    with Pipeline.load(exported("none").folder, threads=1) as pipe:
        result = pipe.generate(picture, PROMPT, max_new_tokens=2)
    assert result.visual_tokens == (16, 16) and result.kept == list(range(16))


def test_every_form_of_a_picture_gives_the_same_answer(
    pipe: Pipeline, picture: Image.Image, picture_file: Path
) -> None:
    forms = [picture, picture_file, str(picture_file), picture_file.read_bytes(), np.asarray(picture)]
    answers = [pipe.generate(form, PROMPT, max_new_tokens=8) for form in forms]
    assert len({tuple(answer.token_ids) for answer in answers}) == 1
    assert len({tuple(answer.kept) for answer in answers}) == 1


def test_pictures_matter(pipe: Pipeline, picture: Image.Image) -> None:
    other = Image.new("RGB", (64, 64), "red")
    assert pipe.generate(picture, PROMPT).token_ids != pipe.generate(other, PROMPT).token_ids


@pytest.mark.parametrize("name", ["vispruner", "adaptprune", "original", "fastv", "none"])
def test_repeats_itself_whatever_ran_before(
    exported: Callable[[str], Any], picture: Image.Image, name: str
) -> None:
    """A longer, other conversation in between leaves nothing in the caches."""
    with Pipeline.load(exported(name).folder, threads=1) as pipe:
        keeps = pipe.manifest.visual.keep
        first = [pipe.generate(picture, PROMPT, keep_tokens=keep, max_new_tokens=12) for keep in keeps]
        pipe.generate(Image.new("RGB", (50, 80), "blue"), PROMPT * 2, max_new_tokens=40)
        again = [pipe.generate(picture, PROMPT, keep_tokens=keep, max_new_tokens=12) for keep in keeps]
    assert [one.token_ids for one in first] == [one.token_ids for one in again]
    assert [one.visual_tokens.after for one in first] == keeps
    assert [len(one.kept) for one in first] == keeps


def test_keep_tokens_chooses(split: Pipeline, picture: Image.Image) -> None:
    assert split.generate(picture, PROMPT, max_new_tokens=1).visual_tokens.after == 7
    assert split.generate(picture, PROMPT, max_new_tokens=1, keep_tokens=4).visual_tokens.after == 4
    assert split.generate(picture, PROMPT, max_new_tokens=1, keep_tokens=np.int64(4)).visual_tokens.after == 4


@pytest.mark.parametrize("keep", [4.0, True, "4", [4], float("nan")])
def test_a_keep_count_is_a_whole_number(split: Pipeline, picture: Image.Image, keep: Any) -> None:
    refuse(
        r"keep_tokens .* is not a whole number; choose one of those that this bundle holds: 4, 7$",
        lambda: split.generate(picture, PROMPT, keep_tokens=keep),
    )


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_an_unknown_keyword_is_told_with_the_nearest(
    split: Pipeline, picture: Image.Image, method: str
) -> None:
    wanted = rf"Pipeline.{method}\(\) got .* argument 'max_tokens'; did you mean 'max_new_tokens'\?"
    with pytest.raises(TypeError, match=wanted):
        getattr(split, method)(picture, PROMPT, max_tokens=4)


@pytest.mark.parametrize("keep", [0, -4, 5, 16])
def test_a_keep_count_that_is_not_there(split: Pipeline, picture: Image.Image, keep: Any) -> None:
    refuse(
        r"not in this bundle, which holds 4, 7; ", lambda: split.generate(picture, PROMPT, keep_tokens=keep)
    )


def test_messages_equal_the_prompt(pipe: Pipeline, picture: Image.Image) -> None:
    wanted = pipe.generate(picture, PROMPT, max_new_tokens=6).token_ids
    parts = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    for content in (PROMPT, parts, parts[1:]):
        found = pipe.generate(picture, messages=[{"role": "user", "content": content}], max_new_tokens=6)
        assert found.token_ids == wanted


class Endless(Sequence[Any]):
    """A sequence that says how long it is, and never ends where that is."""

    def __init__(self, item: Any, count: int) -> None:
        self.item, self.count = item, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: Any) -> Any:
        assert place < self.count, "read on beyond its end"
        return self.item


def test_messages_of_other_types_equal_the_prompt(pipe: Pipeline, picture: Image.Image) -> None:
    wanted = pipe.generate(picture, PROMPT, max_new_tokens=6).token_ids
    marked = [MappingProxyType({"type": "image"}), {"type": "text", "text": PROMPT}]
    for turn in (UserDict(role="user", content=PROMPT), {"role": "user", "content": marked}):
        for turns in ([turn], Endless(turn, 1)):
            found = pipe.generate(picture, messages=turns, max_new_tokens=6)
            assert found.token_ids == wanted
    refuse("has 99999999 turns", lambda: pipe.generate(picture, messages=Endless(turn, 99999999)))


def test_several_turns(pipe: Pipeline, picture: Image.Image) -> None:
    turns = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": "a star"},
        {"role": "user", "content": "where is the blue ?"},
    ]
    before = json.dumps(turns)
    result = pipe.generate(picture, messages=turns, max_new_tokens=4)
    assert result.prompt_tokens > pipe.generate(picture, PROMPT, max_new_tokens=1).prompt_tokens
    assert json.dumps(turns) == before  # the caller's list is his


BAD_MESSAGES: list[Any] = [
    [],
    {},
    "text",
    5,
    [5],
    [None],
    ["text"],
    iter([{"role": "user", "content": "x"}]),
    [{"role": "user"}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": []}],
    [{"role": "user", "content": [5]}],
    [{"role": "user", "content": {"type": "text"}}],
    [{"role": "robot", "content": "x"}],
    [{"role": "assistant", "content": "x"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "x"}]}],
    [{"role": "user", "content": "<image> x"}],
    [{"role": "user", "content": "x", "name": "y"}],
]


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=[str(place) for place in range(len(BAD_MESSAGES))])
def test_malformed_messages(pipe: Pipeline, picture: Image.Image, messages: Any) -> None:
    refuse(None, lambda: pipe.generate(picture, messages=messages))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either a prompt or messages"),
        ({"prompt": "x", "messages": []}, "either a prompt or messages"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": 5}, "a prompt must be text"),
        ({"prompt": "look: <image>"}, "'<image>', a control token"),
        ({"prompt": "bye</s>"}, "'</s>', a control token"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens 0 is not a whole number of at least 1"),
        ({"prompt": "x", "max_new_tokens": 2.0}, "max_new_tokens 2.0"),
        ({"prompt": "x", "max_new_tokens": True}, "max_new_tokens True"),
        ({"prompt": "x", "max_new_tokens": None}, "max_new_tokens None"),
        ({"prompt": "x", "temperature": -1}, "temperature -1"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature nan"),
        ({"prompt": "x", "top_p": 0}, "top_p 0"),
        ({"prompt": "x", "seed": -1}, "seed -1"),
        ({"prompt": "x", "stop": ""}, "stop string"),
        ({"prompt": "x", "stop": [""]}, "stop string"),
        ({"prompt": "x", "stop": 5}, "stop string"),
        ({"prompt": "x", "stop": [5]}, "stop string"),
    ],
)
def test_bad_arguments(pipe: Pipeline, picture: Image.Image, options: dict[str, Any], message: str) -> None:
    refuse(message, lambda: pipe.generate(picture, **options))
    assert pipe.generate(picture, PROMPT, max_new_tokens=1).token_ids  # and the pipeline is free


@pytest.mark.parametrize(
    "image", [None, 5, "no such file.png", b"", b"junk", np.zeros((4, 4)), "https://x/y.png"]
)
def test_pictures_that_are_none(pipe: Pipeline, image: Any) -> None:
    refuse(None, lambda: pipe.generate(image, PROMPT), VtpError)


def test_stop_ends_the_answer_before_the_string(pipe: Pipeline, picture: Image.Image) -> None:
    whole = pipe.generate(picture, PROMPT, max_new_tokens=30)
    place = next(place for place in range(3, len(whole.text)) if whole.text[place : place + 2].isascii())
    stop = whole.text[place : place + 2]
    cut = pipe.generate(picture, PROMPT, max_new_tokens=30, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop" and len(cut.token_ids) < len(whole.token_ids)
    assert cut.text == pipe.generate(picture, PROMPT, max_new_tokens=30, stop=["zzzz", stop]).text
    assert pipe.generate(picture, PROMPT, max_new_tokens=30, stop=None).text == whole.text


def test_eos_ends_the_answer(exported: Callable[[str], Any], picture: Image.Image, tmp_path: Path) -> None:
    """Make the fourth token of a known answer the end: it is counted and not shown."""
    folder = shutil.copytree(exported("none").folder, tmp_path / "bundle")
    with Pipeline.load(folder, threads=1) as pipe:
        free = pipe.generate(picture, PROMPT, max_new_tokens=12)
    end = next(token for token in free.token_ids[3:] if token not in free.token_ids[:3])
    data = json.loads((folder / "manifest.json").read_text())
    data["text"]["eos_token_ids"] = [2, end]
    (folder / "manifest.json").write_text(json.dumps(data))
    with Pipeline.load(folder, threads=1) as pipe:
        ended = pipe.generate(picture, PROMPT, max_new_tokens=12)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert ended.finish_reason == "eos" and free.text.startswith(ended.text)


def test_seeds_repeat_and_differ(pipe: Pipeline, picture: Image.Image) -> None:
    def ask(seed: int | None) -> list[int]:
        return pipe.generate(picture, PROMPT, max_new_tokens=12, temperature=1.5, seed=seed).token_ids

    assert ask(1) == ask(1)
    assert len({tuple(ask(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("threads", [1, 2, np.int64(1)])
def test_threads(exported: Callable[[str], Any], picture: Image.Image, pipe: Pipeline, threads: int) -> None:
    with Pipeline.load(exported("vispruner").folder, threads=threads) as other:
        found = other.generate(picture, PROMPT, max_new_tokens=8)
    assert found.token_ids == pipe.generate(picture, PROMPT, max_new_tokens=8).token_ids


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_bad_threads(exported: Callable[[str], Any], threads: Any) -> None:
    refuse(
        "threads .* is not a whole number", lambda: Pipeline.load(exported("none").folder, threads=threads)
    )


@pytest.mark.parametrize("value", ["no", "x", -1, 0, None, []])
def test_switches_are_true_or_false(
    exported: Callable[[str], Any], pipe: Pipeline, picture: Image.Image, value: Any
) -> None:
    folder = exported("vispruner").folder
    for name in ("check_hashes", "prefix_caching", "reuse_prompt"):
        refuse(f"{name} .* give True or False", lambda name=name: Pipeline.load(folder, **{name: value}))
    for name in ("skip_special_tokens", "allow_special_tokens"):
        refuse(
            f"{name} .* give True or False", lambda name=name: pipe.generate(picture, PROMPT, **{name: value})
        )


def test_warmup(split: Pipeline, picture: Image.Image) -> None:
    before = split.generate(picture, PROMPT, max_new_tokens=3).token_ids
    split.warmup()
    assert split.generate(picture, PROMPT, max_new_tokens=3).token_ids == before


def test_reused_pictures_give_the_same_answers(exported: Callable[[str], Any], picture: Image.Image) -> None:
    other = Image.new("RGB", (60, 60), "green")
    for name in ("vispruner", "adaptprune"):
        folder = exported(name).folder
        with Pipeline.load(folder, threads=1) as plain, Pipeline.load(folder, image_cache=1) as reusing:
            for image, keep in product((picture, picture, other, picture), plain.manifest.visual.keep):
                wanted = plain.generate(image, PROMPT, keep_tokens=keep, max_new_tokens=6)
                found = reusing.generate(image, PROMPT, keep_tokens=keep, max_new_tokens=6)
                assert (found.token_ids, found.kept) == (wanted.token_ids, wanted.kept)


# -- capacity ------------------------------------------------------------------------------------------------


def words(pipe: Pipeline, picture: Image.Image, tokens: int) -> str:
    """A prompt that takes exactly `tokens` text tokens."""
    base = pipe._prompter.encode(pipe._prompter.messages_for("x"))
    prompt = "x" * (1 + tokens - (len(base.ids) - 1))
    assert len(pipe._prompter.encode(pipe._prompter.messages_for(prompt)).ids) - 1 == tokens
    return prompt


def test_a_prompt_too_long_is_refused_before_anything_runs(
    pipe: Pipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = LENGTH - VISUAL - 1
    monkeypatch.setattr("vtp.runtime.stages.stage.Stage.run", lambda *_: pytest.fail("a stage ran"))
    message = f"has {room + 1} tokens; beside 16 visual tokens this bundle has room for {room}; shorten it"
    refuse(message, lambda: pipe.stream(picture, words(pipe, picture, room + 1)), VtpError)
    pipe.stream(picture, words(pipe, picture, room))


@pytest.mark.parametrize("name", ["none", "vispruner", "original", "adaptprune", "fastv"])
def test_an_answer_that_fills_the_bundle_ends_with_length(
    exported: Callable[[str], Any], picture: Image.Image, name: str
) -> None:
    with Pipeline.load(exported(name).folder, threads=1) as pipe:
        object.__setattr__(pipe.manifest.text, "eos_token_ids", ())
        for keep in pipe.manifest.visual.keep:
            result = pipe.generate(picture, PROMPT, max_new_tokens=10_000, keep_tokens=keep)
            assert result.finish_reason == "length"
            # The last token is given but not fed, so it takes no place.
            spare = max(pipe.manifest.visual.keep) - keep if name == "vispruner" else 0
            most = LENGTH - VISUAL - result.prompt_tokens + 1
            assert len(result.token_ids) == most + spare


def test_the_longest_prompt_still_gets_a_token(pipe: Pipeline, split: Pipeline, picture: Image.Image) -> None:
    for pipeline in (pipe, split):
        prompt = words(pipeline, picture, LENGTH - VISUAL - 1)
        assert pipeline.generate(picture, prompt, max_new_tokens=50).token_ids


# -- bundles that cannot run ---------------------------------------------------------------------------------


@pytest.fixture
def spoilt(exported: Callable[[str], Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported("none").folder, tmp_path / "bundle"))


def change(bundle: Path, act: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    act(data)
    (bundle / "manifest.json").write_text(json.dumps(data))


def test_another_target_names_the_export_line(spoilt: Path) -> None:
    change(spoilt, lambda data: data.update(target="gpu9"))
    refuse("made for target 'gpu9'.*vtp-export --target ort", lambda: Pipeline.load(spoilt), VtpError)


def test_unknown_engine(spoilt: Path) -> None:
    refuse(
        "unknown engine 'ort-cup'; did you mean 'ort-cpu'", lambda: Pipeline.load(spoilt, engine="ort-cup")
    )


def test_a_graph_that_is_not_the_manifests(spoilt: Path) -> None:
    shutil.copy(spoilt / "projector.onnx", spoilt / "splice.onnx")
    size = (spoilt / "splice.onnx").stat().st_size
    change(spoilt, lambda data: data["files"]["splice.onnx"].update(bytes=size))
    refuse("splice.onnx and the manifest disagree about input", lambda: Pipeline.load(spoilt), VtpError)


def test_a_graph_of_other_shapes(spoilt: Path) -> None:
    change(
        spoilt,
        lambda data: data["graphs"]["projector.onnx"]["inputs"]["image_features"].update(shape=[1, 2, 3]),
    )
    refuse("projector.onnx: input 'image_features' is", lambda: Pipeline.load(spoilt), VtpError)


def test_a_graph_that_is_garbage(spoilt: Path) -> None:
    size = (spoilt / "decoder.onnx").stat().st_size
    (spoilt / "decoder.onnx").write_bytes(b"x" * size)
    refuse(r"decoder\.onnx is not an ONNX graph", lambda: Pipeline.load(spoilt), VtpError)


def test_a_tokenizer_that_is_garbage(spoilt: Path) -> None:
    size = (spoilt / "tokenizer.json").stat().st_size
    (spoilt / "tokenizer.json").write_bytes(b"x" * size)
    refuse("not a readable tokenizer", lambda: Pipeline.load(spoilt), VtpError)


def test_an_unknown_cache_convention(spoilt: Path) -> None:
    change(spoilt, lambda data: data["graphs"]["decoder.onnx"]["kv"].update(lengths="magic"))
    refuse("cache convention 'magic' is unknown", lambda: Pipeline.load(spoilt), VtpError)


def test_a_template_that_does_not_compile(spoilt: Path) -> None:
    change(spoilt, lambda data: data["text"].update(chat_template="{% if %}"))
    refuse("does not compile", lambda: Pipeline.load(spoilt), VtpError)


def test_a_template_cannot_reach_the_machine(spoilt: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    change(spoilt, lambda data: data["text"].update(chat_template=template))
    refuse("unsafe", lambda: Pipeline.load(spoilt), VtpError)


def test_a_template_without_end_is_refused_at_load(spoilt: Path) -> None:
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    change(spoilt, lambda data: data["text"].update(chat_template=template))
    refuse("cannot be prompted.*more work", lambda: Pipeline.load(spoilt), VtpError)


# -- weight --------------------------------------------------------------------------------------------------


def test_the_runtime_imports_no_torch(exported: Callable[[str], Any], picture_file: Path) -> None:
    script = (
        "import sys; from vtp.runtime import Pipeline; import vtp.runtime.commands.run\n"
        "pipe = Pipeline.load(sys.argv[1]); pipe.generate(sys.argv[2], 'what ?', max_new_tokens=2)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxscript', 'safetensors'} & set(sys.modules)\n"
        "export = [name for name in sys.modules if name.startswith('vtp.export')]\n"
        "assert not heavy and not export, (heavy, export)\n"
    )
    command = [sys.executable, "-c", script, str(exported("none").folder), str(picture_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_spec_types_survive_the_manifest(pipe: Pipeline) -> None:
    assert isinstance(pipe.manifest.text, TextSpec)
    assert isinstance(pipe.manifest.image.mean, tuple)
