"""vtp-export --layout: one line for what is not served, and what is printed of what is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtp.export.cli import main

from ...models.tiny_families import save_anyres
from ...models.tiny_qwen import save_qwen
from ...models.tiny_split import save_idefics3
from ...once import Once

JS = ["--layout", "transformers.js"]


def refused(argv: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and the one line."""
    code = main(argv)
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if not line.startswith("[")]  # progress
    assert line.startswith("vtp-export: error: ") and len(line) < 500
    return code, line.removeprefix("vtp-export: error: ")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "fastv"], ("method fastv drops tokens inside the decoder (decoder:2)", "vispruner")),
        (
            ["--method", "adaptprune"],
            ("method adaptprune drops tokens inside the decoder", "for example --method vispruner"),
        ),
        (
            ["--method", "cdpruner"],
            ("method cdpruner reads the question", "methods that work: apet, "),
        ),
        (
            ["--method", "vispruner", "--method-option", "positions=original"],
            ("method vispruner keeps the original positions", "use --method-option positions=compact"),
        ),
        (
            ["--method", "vispruner", "--keep-tokens", "3,6"],
            ("keep-tokens 3,6 are 2 keep-counts", "choose one"),
        ),
        (
            ["--method", "vispruner", "--keep-tokens", "2:6:2"],
            ("keep-tokens 2,4,6 are 3 keep-counts", "holds one"),
        ),
        (["--method", "vispruner", "--target", "tensorrt"], ("leave out --target tensorrt",)),
        (["--method", "vispruner", "--frames", "4"], ("leave out --frames",)),
        (["--from-bundle", "b", "--keep-tokens", "4"], ("leave out --keep-tokens",)),
        (["--from-bundle", "b", "--method-option", "r=1"], ("leave out --method-option",)),
        (["--from-bundle", "b", "--tower", "tome:2"], ("leave out --tower",)),
        (["--from-bundle", "b", "--then", "fastv"], ("leave out --then",)),
        (["--from-bundle", "b", "--then-option", "share=0.5"], ("leave out --then-option",)),
        (["--from-bundle", "b", "--restore"], ("leave out --restore",)),
        (["--from-bundle", "b", "--share", "tile"], ("leave out --share",)),
        (["--from-bundle", "b", "--method", "divprune"], ("leave out --method",)),
        (["--from-bundle", "b", "--target", "jetpack6"], ("leave out --target",)),
        (["--from-bundle", "b", "--image-fit", "crop"], ("leave out --image-fit",)),
        (["--tower", "stc:0.5"], ("layout transformers.js computes every picture whole", "--tower stc")),
        (["--from-bundle", "nowhere"], ("no bundle at nowhere",)),
        (["--from-bundle", "b", "--verify", "half"], ("unknown verify 'half'; choose one of full",)),
    ],
)
def test_what_the_layout_does_not_serve_is_one_line(
    flags: list[str],
    said: tuple[str, ...],
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    argv = ["--model", str(model_folder("mha")), "-o", str(output), *JS, *flags]
    capfd.readouterr()  # what making the model said
    code, line = refused(argv, capfd)
    assert code in (1, 2)
    assert all(part in line for part in said), line
    assert list(tmp_path.iterdir()) == []


def test_unknown_layouts_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, line = refused(["--layout", "gguf", "-o", str(tmp_path / "out")], capfd)
    assert (code, line) == (2, "unknown layout 'gguf'; choose one of bundle, transformers.js")
    code, line = refused(["--from-bundle", "b", "-o", str(tmp_path / "out")], capfd)
    said = "--from-bundle goes with --layout transformers.js or --push-to-hub: it is a bundle already"
    assert (code, line) == (2, said)


@pytest.mark.parametrize(
    ("save", "said"),
    [
        (
            lambda path: save_anyres(path, "llava_onevision", decoder="qwen2", vision="siglip"),
            "cuts no picture",
        ),
        (lambda path: save_anyres(path, "llava_next"), "transformers.js has no class for it"),
        (lambda path: save_qwen(path, "qwen2_5_vl"), "this family's kept tokens keep theirs"),
    ],
)
def test_an_unserved_family_is_refused_before_it_is_loaded(
    save: Callable[[Path], Any], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "model")
    capfd.readouterr()
    argv = ["--model", str(tmp_path / "model"), "--method", "divprune", "-o", str(tmp_path / "out"), *JS]
    code, line = refused(argv, capfd)
    assert code == 1 and said in line
    assert line.endswith("families that it serves: llava, paligemma, gemma3, idefics3, smolvlm")
    assert not (tmp_path / "out").exists()


def test_a_picture_in_tiles_is_refused_with_the_size_that_works(
    saved: Callable[..., tuple[Path, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = str(saved(save_idefics3)[0])
    capfd.readouterr()
    argv = ["--model", model, "--method", "divprune", "--keep-tokens", "3", "-o", str(tmp_path / "out"), *JS]
    code, line = refused(argv, capfd)
    assert code == 2
    assert line.startswith("this bundle cuts a picture into 5 tiles") and "--image-size 28x28" in line
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_with_several_keep_counts_or_a_decoder_site_is_refused(
    once: Once, model_folder: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = model_folder("gqa")
    for wishes, said in (
        ({"method": "vispruner", "keep_tokens": "3,6"}, "keep-tokens 3,6 are 2 keep-counts"),
        ({"method": "fastv", "keep_tokens": "5"}, "method fastv drops tokens inside the decoder"),
    ):
        bundle = once.bundle(model, max_length=128, verify="none", **wishes)
        argv = ["--model", str(model), "--from-bundle", str(bundle), "-o", str(tmp_path / "out"), *JS]
        code, line = refused(argv, capfd)
        assert code == 2 and said in line
    argv[1] = str(model_folder("mha"))
    code, line = refused(
        [*argv[:3], str(once.bundle(model, method="none", max_length=128)), *argv[4:]], capfd
    )
    assert code == 2 and "was made from the model" in line and "give that one with --model" in line


def test_an_export_says_what_it_made(
    model_folder: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the default method, verified, as JSON, with a pruner in float32, and again over itself."""
    output = tmp_path / "out"
    argv = ["--model", str(model_folder("mha")), "--keep-tokens", "5", *JS]
    assert main([*argv, "-o", str(output), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["visual_tokens"] == {"before": 16, "after": 5}
    assert told["browsers"] is True
    assert told["parity"]["mode"] == "full"
    checked = told["parity"]["transformers.js"]
    assert checked["equal"] == checked["tokens"] > 0
    assert json.loads((output / "vtp.json").read_text())["parity"] == told["parity"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert main([*argv, "-o", str(output), "--overwrite", "--verify", "none"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("vispruner: visual tokens 16 → 5; ")
    assert "fidelity: the folder was not compared with its bundle" in out


def test_a_float64_pruner_is_told_to_be_for_node(
    once: Once, model_folder: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = model_folder("mha")
    bundle = once.bundle(model, method="vispruner", keep_tokens="5", max_length=128, verify="none")
    output = tmp_path / "out"
    argv = ["--model", str(model), "--from-bundle", str(bundle), "-o", str(output), *JS]
    assert main(argv) == 0
    assert "computes in float64, which browsers do not: the folder is for Node" in capfd.readouterr().err
    assert "- It runs in Node alone" in (output / "README.md").read_text()
