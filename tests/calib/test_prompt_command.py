"""vtp-calib quantize --prompt int8: from questions to a bundle with two decoder graphs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from vtp.calib import cli
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vispruner", ["--prompt", "int4"], "--prompt int4 is not known; choose one of decoder, int8"),
        ("vispruner", ["--prompt", "int8", "--decoder", "int8"], "a second graph beside an int4 decoder"),
        ("vispruner", ["--prompt", "int8", "--decoder", "none"], "--decoder is none"),
        (
            "vispruner",
            ["--head", "int8"],
            "--head int8 does not go with --decoder int4; choose float or int4",
        ),
        ("vispruner", ["--decoder", "int8", "--head", "int4"], "choose float or int8"),
        ("float16", ["--prompt", "int8"], "--prompt int8 is for target ort in float32"),
        ("jetpack6", ["--decoder", "int8"], "--decoder int8 is for target ort in float32"),
    ],
)
def test_bad_flags_are_one_line(
    exported: Any, tmp_path: Path, capsys: Any, name: str, arguments: list[str], message: str
) -> None:
    out = tmp_path / "o"
    given = ["--data", str(tmp_path / "none.jsonl"), "--output", str(out), *arguments]
    assert cli.main(["quantize", str(exported(name).folder), *given]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and said[-1].startswith("vtp-calib quantize: error: ") and not out.exists()


def test_the_command_makes_measures_and_records_it(
    exported: Any, picture_file: Path, tmp_path: Path, capsys: Any
) -> None:
    """One command, from a user's questions to a bundle that answers; what it holds is in its record."""
    lines = [
        {"image": str(picture_file), "prompt": f"what is {number} ?", "answer": "x"} for number in range(4)
    ]
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines))
    arguments = [
        "--data",
        str(data),
        "--output",
        str(tmp_path / "o"),
        "--force",
        "--prompt",
        "int8",
        "--json",
    ]
    arguments += ["--max-new-tokens", "2", "--threads", "1", "--samples", "1", "--out", str(tmp_path / "r")]
    assert cli.main(["quantize", str(exported("vispruner").folder), *arguments]) == 0
    record = json.loads(capsys.readouterr().out)["quantization"]
    assert record["decoder"] == "int4" and record["prompt"] == "int8"
    assert len(record["in_prompts"]) == 3 * 7  # all of three layers, without the head
    assert all(one["db"] > 25 for one in record["in_prompts"].values())
    with (tmp_path / "r/quantize.csv").open() as lines_of:
        told = {row["layer"]: row["db_in_prompts"] for row in csv.DictReader(lines_of)}
    assert {label: str(one["db"]) for label, one in record["in_prompts"].items()} == {
        label: db for label, db in told.items() if db
    }
    with Pipeline.load(tmp_path / "o", threads=1) as pipe:
        assert pipe.generate(picture_file, "what ?", max_new_tokens=3).token_ids
    assert "decoder_prompt.onnx" in open_bundle(tmp_path / "o").manifest.graphs
    assert cli.main(["quantize", str(tmp_path / "o"), "--data", str(data)]) == 2
    assert "quantised already (vision int8, decoder int4, prompt int8); give the" in capsys.readouterr().err
