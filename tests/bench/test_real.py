"""`python -m vtp.bench.real` from a model folder to the table, on a tiny model and the three sets in small.

Truths are made of what the unpruned bundle says, so that the figures are known beforehand.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vtp.bench.real import bundles, command
from vtp.bench.real.bundles import Exports
from vtp.bench.real.sets import SETS
from vtp.calib.keep import examiner
from vtp.calib.metrics import normalize, says_yes
from vtp.engines import VtpError
from vtp.runtime import Pipeline

from ..stand_ins.hub_server import connect, serving
from . import real_files

TOKENS = 3
# As LLaVA-1.5's on the hub: no word before a system turn, and text that is in no list is dropped.
TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role | upper }}: {% endif %}"
    "{% for part in m.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QUICK = [
    "--max-length",
    "640",
    "--threads",
    "1",
    "--engine",
    "ort-cpu",
    "--max-new-tokens",
    str(TOKENS),
    "--verify",
    "none",
]


@dataclass
class Place:
    """A model folder with LLaVA-1.5-7B's name, the work folder with its unpruned bundle, and the sets."""

    model: Path
    work: Path
    data: Path

    def run(self, *more: str) -> int:
        """The command on all three sets, at one keep-count and one that prunes nothing here."""
        words = ["--model", str(self.model), "--data", "gqa,textvqa,pope", "--data-dir", str(self.data)]
        words += ["--work", str(self.work), "--keep", "20,4", *QUICK, *more]
        return command.main(words)

    @property
    def results(self) -> Path:
        return self.work / self.model.name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]) -> Place:
    root = tmp_path_factory.mktemp("real")
    model = Path(shutil.copytree(model_folder("mha"), root / "llava-1.5-7b-hf"))
    assert (model / "chat_template.jinja").is_file()
    (model / "chat_template.jinja").write_text(TEMPLATE)
    made = Place(model, root / "work", root / "data")
    exports = Exports(model, made.results, image_fit="letterbox", max_length=640, verify="none")
    bundle = exports.unpruned(lambda _: None, lambda _: None)
    real_files.gqa(made.data / "gqa", ["?"] * 4)
    real_files.textvqa(made.data / "textvqa", [["?"] * 10] * 2)
    real_files.pope(made.data / "pope", ["yes"] * 3)
    with Pipeline.load(bundle.folder, "ort-cpu", threads=1) as pipe:
        said = {
            name: [_answer(pipe, one) for one in SETS[name].read(made.data / name, None)] for name in SETS
        }
    known = [text.strip().rstrip(".").lower() for text in said["gqa"][:2]]
    real_files.gqa(made.data / "gqa", [*known, "zebra", "zebra"])
    votes = [
        [text] * count + ["zebra"] * (10 - count) for text, count in zip(said["textvqa"], (2, 9), strict=True)
    ]
    real_files.textvqa(made.data / "textvqa", votes)
    assert all(normalize(text) not in ("", "zebra") for text in said["textvqa"])
    right = ["yes" if says_yes(text) else "no" for text in said["pope"][:3]]
    assert right == ["yes"] * 3 and all(map(says_yes, said["pope"]))  # a random model never says "no"
    real_files.pope(made.data / "pope", ["yes", "yes", "no"])
    return made


def _answer(pipe: Pipeline, sample: Any) -> str:
    asked = [{"type": "image"}, {"type": "text", "text": sample.prompt}]
    system = {"role": "system", "content": [{"type": "text", "text": command.VICUNA}]}
    turns = [system, {"role": "user", "content": asked}]
    return pipe.generate(sample.image, messages=turns, max_new_tokens=TOKENS).raw_text


def test_from_a_folder_to_the_tables(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run("--json") == 0
    gqa, textvqa, pope = json.loads(capsys.readouterr().out)
    for found in (gqa, textvqa, pope):
        assert [(row["method"], row["keep"]) for row in found["rows"]] == [
            ("none", 16),
            ("vispruner", 4),
        ]
        assert found["system"] == command.VICUNA and found["image_fit"] == "letterbox"
        assert json.loads((place.results / f"{found['set']}.json").read_text()) == found
    assert gqa["rows"][0]["score"][0] == 0.5
    assert gqa["rows"][0]["parts"]["open"] == {"accuracy": 0.5, "questions": 2}  # questions 0 and 2
    assert textvqa["rows"][0]["score"][0] == pytest.approx((0.6 + 1) / 2) and textvqa["hinted"]
    assert pope["rows"][0]["score"][0] == pytest.approx(0.8)  # TP 2, FP 1 of each file
    assert pope["rows"][0]["parts"]["popular"]["precision"] == pytest.approx(2 / 3)
    for row in gqa["rows"]:
        assert row["difference"][0] == pytest.approx(row["score"][0] - 0.5)
        assert row["score"][1] <= row["score"][0] <= row["score"][2] and row["ttft_ms"] > 0


def test_a_second_run_exports_and_asks_nothing(place: Place, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bundles, "export", _never)
    monkeypatch.setattr(examiner, "_write", _never)
    before = (place.results / "gqa.json").read_text()
    assert place.run() == 0
    said = capsys.readouterr().out
    again = json.loads((place.results / "gqa.json").read_text())
    assert {**json.loads(before), "command": ""} == {**again, "command": ""}
    assert "# llava-1.5-7b-hf on GQA, testdev-balanced" in said and "| none | 16 | 50.0 (" in said
    assert "papers %" in said and "| vispruner | 64 | 55.8 | R |" in said
    assert said.count("attach this page and the file") == 3


def _never(*_: object, **__: object) -> None:
    raise AssertionError("this was done already")


def test_a_killed_run_goes_on_where_it_was(place: Place, monkeypatch, capsys) -> None:
    asked: list[Path] = []
    write = examiner._write

    def dying(pipe: Any, paper: Any) -> Any:
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.extend(image for image, _ in paper.questions)
        return write(pipe, paper)

    whole = {name: (place.results / f"{name}.answers.jsonl") for name in SETS}
    kept = {name: file.read_text() for name, file in whole.items()}
    whole["gqa"].unlink()
    monkeypatch.setattr(examiner, "_write", dying)
    assert place.run() == 130
    assert "every answer so far is written down" in capsys.readouterr().err
    assert len(whole["gqa"].read_text().splitlines()) == 5
    monkeypatch.setattr(examiner, "_write", write)
    assert place.run("--limit", "3") == 0
    assert "9 questions (the first 3 of each file)" in capsys.readouterr().out  # POPE's three files
    assert place.run() == 0
    texts = [
        [json.loads(line)["text"] for line in text.splitlines()]
        for text in (kept["gqa"], whole["gqa"].read_text())
    ]
    assert sorted(texts[0]) == sorted(texts[1]) and len(texts[0]) == 8


def test_a_hub_id_is_downloaded_once(place: Place, tmp_path: Path, monkeypatch, capsys) -> None:
    """From a stand-in of the hub; one that is gone is answered for by the cache."""
    words = ["--model", "llava-hf/llava-1.5-7b-hf", "--data", "gqa", "--work", str(tmp_path), "--no-fetch"]
    seen: list[Path] = []

    def exports(args: Any, model: Path, work: Path) -> Any:
        seen.extend((model, work))
        raise VtpError("as far as this test goes")

    monkeypatch.setattr(command, "_exports", exports)
    with serving() as hub:
        connect(hub, tmp_path / "home", monkeypatch)
        hub.repo("llava-hf/llava-1.5-7b-hf", {one.name: one.read_bytes() for one in place.model.iterdir()})
        for down in (False, True):
            hub.down = down
            assert command.main([*words, "--data-dir", str(place.data)]) == 1
            assert "as far as this test goes" in capsys.readouterr().err
    model, work = seen[:2]
    assert seen[2:] == [model, work] and work == tmp_path / "llava-hf--llava-1.5-7b-hf"
    assert (model / "model.safetensors").read_bytes() == (place.model / "model.safetensors").read_bytes()


def test_another_way_to_export_is_another_bundle(place: Place, monkeypatch) -> None:
    """What is there is taken only if it was made from the same model, by the same request."""
    exports = Exports(place.model, place.results, image_fit="letterbox", max_length=640, verify="none")
    monkeypatch.setattr(bundles, "export", _never)
    exports.unpruned(_ignore, _ignore)
    for other in ({"image_fit": "crop"}, {"verify": "full"}, {"max_length": 64}):
        with pytest.raises(AssertionError, match="done already"):
            Exports(**{**exports.__dict__, **other}).unpruned(_ignore, _ignore)


def _ignore(_: str) -> None:
    pass


def test_verification_follows_the_memory(place: Place, monkeypatch) -> None:
    weights = sum(file.stat().st_size for file in place.model.glob("*.safetensors"))
    made = Exports(place.model, place.work)  # float32: twice what 16 bits take
    for room, mode in ((9 * weights, "full"), (7 * weights, "layers")):
        monkeypatch.setattr(bundles, "memory_room", lambda room=room: type("Room", (), {"bytes": room}))
        assert made.checked == mode if mode == "layers" else made.checked == "full"
    monkeypatch.setattr(bundles, "free_disk", lambda _: weights)
    with pytest.raises(VtpError, match=r"2 bundles of this model take about .* GB, and .* has .* GB free"):
        made.check_disk(2)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--data", "vqav2"], "--data 'vqav2' is not a known set; choose of gqa, textvqa, pope"),
        (["--keep", "16,576"], "--keep 16 prunes nothing of this model's 16 visual tokens"),
        (["--keep", "0"], "--keep 0 keeps nothing"),
        (["--keep", "x"], "keep-tokens 'x' is not"),
        (["--limit", "0"], "--limit 0 must be at least 1"),
        (["--methods", "vispruna"], "vispruna"),
        (["--verify", "maybe"], "unknown verify 'maybe'"),
        (["--data-dir", "nowhere", "--no-fetch"], "does not exist; a folder of gqa holds"),
    ],
)
def test_bad_input_is_one_line(place: Place, capsys, flags: list[str], problem: str) -> None:
    assert place.run(*flags) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("real: error: ") and problem in said
