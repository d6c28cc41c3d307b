"""vtp-run: what it prints, and one line with the right exit code for whatever is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtp.runtime import NO_PICTURE, Pipeline
from vtp.runtime.commands.run import main

PROMPT = "what shape is the red ?"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def bundle(exported: Callable[[str], Any]) -> Path:
    return exported("vispruner").folder


@pytest.fixture
def ask(bundle: Path, picture_file: Path) -> list[str]:
    """A good command line; a flag given again wins, but a further --image is a further picture."""
    return [str(bundle), "--image", str(picture_file), "--prompt", PROMPT, "--max-new-tokens", "6"]


def run(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_prints_the_answer_and_then_the_figures(
    ask: list[str], bundle: Path, picture: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(ask) == 0
    out, err = capsys.readouterr()
    with Pipeline.load(bundle) as pipe:
        assert out == pipe.generate(picture, PROMPT, max_new_tokens=6).text + "\n"
    assert "visual tokens: 16 → 6" in err
    assert all(stage in err for stage in ("preprocess", "vision_encoder", "decoder", "ttft", "tpot"))


def test_json_is_one_object(ask: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ask, "--json", "--keep-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert out.count("\n") == 1 and err == ""
    assert data["visual_tokens"] == {"before": 16, "after": 3}
    assert {"vision_encoder", "pruner", "projector", "decoder", "ttft", "tpot", "total"} <= set(
        data["timings"]
    )
    assert all(isinstance(value, float) and value >= 0 for value in data["timings"].values())
    assert len(data["kept"]) == 3 and data["engine"] == "ort-cpu" and data["finish_reason"] == "length"
    assert len(data["token_ids"]) == 6 and isinstance(data["text"], str)


def test_an_answer_that_is_out_of_time(ask: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ask, "--json", "--timeout-ms", "1e-6"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["finish_reason"], data["text"], data["token_ids"]) == ("timeout", "", [])
    for bad in ("0", "nan", "soon"):
        assert run([*ask, "--timeout-ms", bad]) == 2
        assert re.search(r"timeout.ms .*is not a number", capsys.readouterr().err)


def test_options_reach_the_pipeline(ask: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*options: str) -> dict[str, Any]:
        assert run([*ask, "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    greedy = answer("--threads", "1", "--engine", "ort-cpu", "--check-hashes")
    assert len(answer("--max-new-tokens", "2")["token_ids"]) == 2
    warm = [
        answer("--temperature", "1.5", "--top-p", "0.9", "--seed", seed)["token_ids"]
        for seed in ("1", "1", "2")
    ]
    assert warm[0] == warm[1]
    assert {tuple(warm[0]), tuple(warm[2])} != {tuple(greedy["token_ids"])}
    penalised = [answer("--repetition-penalty", much)["token_ids"] for much in ("1", "30")]
    assert penalised[0] == greedy["token_ids"] != penalised[1]
    stop = next(character for character in greedy["text"][1:] if character.isascii())
    assert answer("--stop", stop)["finish_reason"] == "stop"


def test_show_kept_writes_a_picture(
    ask: list[str], picture: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*ask, "--show-kept", str(tmp_path / "kept.png")]) == 0
    assert f"kept tokens shown in {tmp_path / 'kept.png'}" in capsys.readouterr().err
    with Image.open(tmp_path / "kept.png") as shown:
        assert shown.size == picture.size
    assert [path.name for path in tmp_path.iterdir()] == ["kept.png"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--prompt", ""], 2, "the prompt is empty"),
        (["--prompt", "  "], 2, "the prompt is empty"),
        (["--prompt", "what is <image> ?"], 2, "'<image>', a control token"),
        (["--prompt", "x" * 300], 1, "this bundle has room for 111; shorten it"),
        (["--keep-tokens", "5"], 2, "keep_tokens 5 is not in this bundle, which holds 3, 6"),
        (["--keep-tokens", "0"], 2, "keep_tokens 0 is not in this bundle"),
        (["--keep-tokens", "-3"], 2, "keep_tokens -3 is not in this bundle"),
        (["--keep-tokens", "many"], 2, "keep-tokens 'many' is not a whole number"),
        (["--keep-tokens", "3.0"], 2, "keep-tokens '3.0' is not a whole number"),
        (["--keep-tokens", ""], 2, "keep-tokens '' is not a whole number"),
        (["--max-new-tokens", "0"], 2, "max_new_tokens 0 is not"),
        (["--max-new-tokens", "²"], 2, "max-new-tokens '²' is not a whole number"),
        (["--temperature", "hot"], 2, "temperature 'hot' is not a number"),
        (["--temperature", "nan"], 2, "temperature 'nan' is not a number"),
        (["--top-p", "2"], 2, "top_p 2.0 is not allowed"),
        (["--repetition-penalty", "0"], 2, "repetition_penalty 0.0 is not allowed; choose a number above 0"),
        (["--repetition-penalty", "1e-46"], 2, "choose a number above 0 (1: off), from 1.2e-38 to 3.4e+38"),
        (["--repetition-penalty", "x"], 2, "repetition-penalty 'x' is not a number"),
        (["--seed", "-1"], 2, "seed -1 is not allowed"),
        (["--threads", "0"], 2, "threads 0 is not"),
        (["--stop", ""], 2, "a stop string must be text"),
        (["--engine", "ort-gpu"], 2, "unknown engine 'ort-gpu'; did you mean 'ort-cpu'"),
        (["--show-kept", "kept.tiff"], 2, "choose one of .png"),
        (["--show-kept", "no/such/kept.png"], 2, "does not exist"),
        (["--image", "no-such.png"], 2, "no such file: 'no-such.png'"),
        (["--image", "."], 2, "is a directory"),
        (["--image", "https://x/y.png"], 2, "is not a local file"),
        (["--bogus"], 2, "unrecognized arguments: --bogus"),
        (["--image"], 2, "expected one argument"),
        (["another"], 2, "unrecognized arguments: another"),
    ],
)
def test_bad_requests_are_one_line(
    ask: list[str], options: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*ask, *options]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("vtp-run: error: ") and message in err


@pytest.mark.parametrize("argv", [[], ["bundle", "--video", "x"], ["bundle", "--image", "x"]])
def test_what_is_required(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(argv) == 2
    err = capsys.readouterr().err
    assert "the following arguments are required" in err and err.count("\n") == 1


def test_several_pictures_in_a_prompt(ask: list[str], tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (40, 60), "blue").save(other)
    assert run([*ask, "--image", str(other), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["visual_tokens"] == {"before": 32, "after": 12} and list(map(len, data["kept"])) == [6, 6]
    assert run([*ask, "--image", str(other), "--show-kept", str(tmp_path / "kept.png")]) == 2
    assert "--show-kept shows one picture" in capsys.readouterr().err


def test_a_batch_answers_line_by_line(
    bundle: Path, picture: Image.Image, tmp_path: Path, capsys: Any
) -> None:
    """More lines than run together, with one or two pictures; relative paths; other keys are let be."""
    picture.save(tmp_path / "a.png")
    Image.new("RGB", (40, 60), "blue").save(tmp_path / "b.png")
    images: list[Any] = [
        ["a.png", "b.png"] if place == 4 else "ab"[place % 2] + ".png" for place in range(10)
    ]
    prompts = [PROMPT + " red" * place for place in range(10)]
    lines = [
        json.dumps({"image": image, "prompt": words, "answer": "x"})
        for image, words in zip(images, prompts, strict=True)
    ]
    (tmp_path / "asked.jsonl").write_text("\n\n".join(lines) + "\n")
    flags = ["--temperature", "0.8", "--seed", "3", "--max-new-tokens", "3"]
    assert run([str(bundle), "--batch", str(tmp_path / "asked.jsonl"), *flags]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sources = [[tmp_path / one for one in ([image] if isinstance(image, str) else image)] for image in images]
    with Pipeline.load(bundle) as pipe:
        for place, (data, paths, words) in enumerate(zip(found, sources, prompts, strict=True)):
            wanted = pipe.generate(paths, words, temperature=0.8, seed=3 + place, max_new_tokens=3)
            assert data["token_ids"] == wanted.token_ids and data["kept"] == wanted.kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "asked.jsonl: No such file"),
        ("\n", "holds no prompt"),
        ("{", "line 1 is not valid JSON"),
        ('{"image": "a.png"}', 'line 1 has no "prompt"; a line is {"image"'),
        ('\n{"prompt": "x"}', 'line 2 has no "image"'),
        ('{"prompt": "x", "image": []}', 'line 1 has no "image"'),
        ('{"prompt": "x", "image": ["a.png", 5]}', 'line 1 has no "image"'),
        ('{"prompt": "x", "image": "no.png"}', "names the picture 'no.png', which does not exist"),
    ],
)
def test_bad_batch_files(
    bundle: Path, tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    if text is not None:
        (tmp_path / "asked.jsonl").write_text(text)
    assert run([str(bundle), "--batch", str(tmp_path / "asked.jsonl")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_without_a_picture_the_prompt_is_answered_as_text(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a note says so, for who forgot it."""
    with Pipeline.load(bundle, threads=1) as pipe:
        right = pipe.generate(NO_PICTURE, "how many ?", max_new_tokens=6)
    assert run([str(bundle), "--prompt", "how many ?", "--max-new-tokens", "6", "--json"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert (data["text"], data["token_ids"]) == (right.text, right.token_ids)
    assert data["visual_tokens"] == {"before": 0, "after": 0}
    assert err.startswith("vtp-run: note: no picture was given, so the prompt is answered as text alone;")
    assert err.count("\n") == 1
    assert run([str(bundle), "--prompt", "x", "--show-kept", "kept.png"]) == 2
    assert "--show-kept shows a picture; give --image" in capsys.readouterr().err


def test_a_batch_names_its_own_pictures(ask: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ask, "--batch", "asked.jsonl"]) == 2
    assert "leave out --image, --video, --prompt and --show-kept" in capsys.readouterr().err


def spoil_missing(folder: Path) -> None:
    (folder / "decoder.onnx.data").unlink()


def spoil_truncated(folder: Path) -> None:
    os.truncate(folder / "decoder.onnx.data", 1000)


def spoil_schema(folder: Path) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**data, "schema": 99}))


def spoil_path(folder: Path) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    data["files"]["../../etc/passwd"] = {"sha256": "", "bytes": 1}
    (folder / "manifest.json").write_text(json.dumps(data))


def spoil_graph(folder: Path) -> None:
    size = (folder / "projector.onnx").stat().st_size
    (folder / "projector.onnx").write_bytes(b"\n" * size)


def spoil_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def spoil_all(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil_weights(folder: Path) -> None:
    data = bytearray((folder / "decoder.onnx.data").read_bytes())
    data[0] ^= 255
    (folder / "decoder.onnx.data").write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing, "lacks the file decoder.onnx.data"),
        (spoil_truncated, "decoder.onnx.data has 1000 bytes where the manifest says"),
        (spoil_weights, "decoder.onnx.data does not have the manifest's sha256"),
        (spoil_schema, "schema version 99; this vtp reads versions 1 to 2"),
        (spoil_path, "'../../etc/passwd', which leaves the bundle"),
        (spoil_graph, "projector.onnx is not an ONNX graph"),
        (spoil_manifest, "manifest.json is not valid JSON"),
        (spoil_all, "no such folder"),
    ],
)
def test_spoilt_bundles_are_one_line(
    ask: list[str],
    bundle: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    spoil(folder)
    hashes = ["--check-hashes"] if spoil is spoil_weights else []
    assert run([str(folder), *ask[1:], *hashes]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1, err
    assert message in err


def bad_pictures() -> dict[str, bytes]:
    """Files that are no pictures, by name."""
    from io import BytesIO

    whole = BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    png = whole.getvalue()
    header = bytearray(png[:33])
    huge = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + b"IHDR" + (50_000).to_bytes(4, "big") * 2
    huge += b"\x08\x02\x00\x00\x00"
    from zlib import crc32

    huge += crc32(huge[12:]).to_bytes(4, "big")
    zero = bytes(header[:16]) + bytes(8) + bytes(header[24:29])
    zero += crc32(zero[12:]).to_bytes(4, "big")
    return {
        "text.png": b"not a picture",
        "empty.png": b"",
        "truncated.png": png[: len(png) // 2],
        "huge.png": huge,
        "zero.png": zero,
    }


@pytest.mark.parametrize("name", ["text.png", "empty.png", "truncated.png", "huge.png", "zero.png"])
def test_bad_pictures_are_one_line(
    ask: list[str], tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(bad_pictures()[name])
    assert run([*ask, "--image", str(tmp_path / name)]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and name in err, err


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "I;16", "RGBA", "1", "LA"])
def test_odd_pictures_work(ask: list[str], tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    Image.new(mode, (50, 40)).save(path)
    assert run([*ask, "--image", str(path), "--json"]) == 0


def test_debug_shows_the_traceback(ask: list[str]) -> None:
    command = [str(BIN / "vtp-run"), *ask, "--prompt", "", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr and "UsageError: the prompt is empty" in done.stderr


def test_an_unforeseen_error_is_one_line_too(
    ask: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("vtp.runtime.media.pictures.preprocess", fail)
    assert run(ask) == 1
    assert (
        capsys.readouterr().err == "vtp-run: error: RuntimeError: first second (a bug; --debug shows where)\n"
    )


def test_the_command_itself(ask: list[str]) -> None:
    done = subprocess.run([str(BIN / "vtp-run"), *ask, "--json"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["visual_tokens"]["after"] == 6
    wrong = subprocess.run(
        [str(BIN / "vtp-run"), "/no/such", *ask[1:]], capture_output=True, text=True, check=False
    )
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (1, "", 1)


def test_without_onnxruntime_the_extra_is_named(ask: list[str]) -> None:
    script = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'onnxruntime' else find(name, *rest)\n"
        "from vtp.runtime.commands.run import main; sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *ask], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "pip install 'vtp-edge[ort]'" in done.stderr


def test_a_reader_that_leaves_is_no_error_message(ask: list[str]) -> None:
    command = [str(BIN / "vtp-run"), *ask, "--max-new-tokens", "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in err and "BrokenPipe" not in err and "Exception ignored" not in err


def test_unwritable_kept_picture_leaves_nothing(
    ask: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system takes a part of the picture and refuses the rest, as a full disk does."""
    resource = pytest.importorskip("resource", reason="limits of files' sizes are POSIX")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert run([*ask, "--json", "--show-kept", str(tmp_path / "kept.png")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_logprobs_are_part_of_the_json(
    ask: list[str], bundle: Path, picture: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*ask, "--json", "--logprobs", "2"]) == 0
    data = json.loads(capsys.readouterr().out)
    with Pipeline.load(bundle) as pipe:
        wanted = pipe.generate(picture, PROMPT, max_new_tokens=6, logprobs=2)
    assert data["logprobs"] == wanted.to_json()["logprobs"] and len(data["logprobs"]) == 6
    assert run([*ask, "--logprobs", "2"]) == 2
    assert "give --json as well" in capsys.readouterr().err
    assert run([*ask, "--json", "--logprobs", "21"]) == 2
    assert "give 0 (the chosen token's only) to 20" in capsys.readouterr().err
