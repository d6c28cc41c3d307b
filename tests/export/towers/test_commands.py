"""--tower on the command line: what is refused, in one line, and what manifest and results say."""

from __future__ import annotations

import json
import re
from importlib import util
from pathlib import Path

import numpy as np
import pytest

from vtp.engines import UsageError
from vtp.engines.tensorrt.library import build_engine
from vtp.export.cli import main
from vtp.export.exporter import Request, export
from vtp.export.towers import TowerReduction, TowerShape, parse_reduction
from vtp.runtime import NO_PICTURE, Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands.build import profile_of

from ...models.tiny import save_tiny
from ...models.tiny_gemma import save_gemma, tiny_gemma3
from ...models.tiny_qwen import save_qwen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("towers")
    save_tiny(root / "llava", layers=2, vision_layers=5, image_size=84)
    save_qwen(root / "qwen2_5", "qwen2_5_vl")
    save_gemma(root / "gemma3", tiny_gemma3())
    return root


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    """By IPCV, verified by layers."""
    wishes = {"method": "vispruner", "keep_tokens": "5", "tower": "ipcv:0.35", "tower_options": ["stable=1"]}
    wishes["verify"] = "layers"
    request = Request(folder / "ipcv", model=str(folder / "llava"), max_length=128, **wishes)  # type: ignore[arg-type]
    return export(request).folder


@pytest.mark.parametrize(
    ("model", "flags", "code", "words"),
    [
        ("llava", ["--tower", "ipcv:0"], 2, "tower ipcv: keep is 0; choose a fraction above 0 and up to 1"),
        (
            "llava",
            ["--tower", "ipcv:1.5"],
            2,
            "tower ipcv: keep is 1.5; choose a fraction above 0 and up to 1",
        ),
        (
            "llava",
            ["--tower", "ipcv:nan"],
            2,
            "tower ipcv: keep is 'nan'; give a finite number, such as 0.35",
        ),
        (
            "llava",
            ["--tower", "ipcv:1.0000001"],
            2,
            "keep is 1.0000001; choose a fraction above 0 and up to 1",
        ),
        ("llava", ["--tower", "ipcv:"], 2, "tower ipcv: keep is ''; give a finite number, such as 0.35"),
        (
            "llava",
            ["--tower", "ipcv:0.001"],
            2,
            "keep is 0.001; that keeps none of the 36 patches; choose 0.0278 to 1",
        ),
        (
            "llava",
            ["--tower", "ipcv", "--tower-option", "cut=4"],
            2,
            "tower ipcv: cut is 4; the vision tower runs 4 blocks; choose 1 to 3",
        ),
        ("llava", ["--tower", "ipcv", "--tower-option", "cut=0"], 2, "cut is 0; choose at least 1"),
        ("llava", ["--tower", "ipcv", "--tower-option", "cut"], 2, "'cut' is not of the form name=value"),
        ("llava", ["--tower", "ipcv:1", "--tower-option", "keep=1"], 2, "keep is given twice; give it once"),
        (
            "llava",
            ["--tower", "ipcv", "--tower-option", "cuts=2"],
            2,
            "no option 'cuts'; did you mean 'cut'?",
        ),
        ("llava", ["--tower", "ipvc"], 2, "unknown tower reduction 'ipvc'; did you mean 'ipcv'?"),
        ("llava", ["--tower", "none:3"], 2, "tower none has no options; leave out '3'"),
        ("llava", ["--tower", "none:"], 2, "tower none has no options; leave out ':', or choose a reduction"),
        (
            "llava",
            ["--tower-option", "keep=1"],
            2,
            "tower none has no options; leave out 'keep=1', or choose",
        ),
        (
            "llava",
            ["--tower", "ipcv", "--tower-option", "stable=9223372036854775808"],
            2,
            "tower ipcv: stable is '9223372036854775808'; give at most 9223372036854775807, such as 7",
        ),
        (
            "llava",
            ["--method", "apet", "--method-option", "basis=99999999999999999999"],
            2,
            "method apet: basis is '99999999999999999999'; give at most 9223372036854775807, such as 10",
        ),
        ("llava", ["--tower", "tome:1_0"], 2, "merge is '1_0'; give a whole number, such as 16"),
        ("llava", ["--tower", "tome:-1"], 2, "merge is -1; choose 0 or more pairs of rows for every block"),
        (
            "llava",
            ["--tower", "tome:9"],
            2,
            "tower tome: merge is 9; 37 rows and 4 blocks do not have as many pairs; choose 0 to 7",
        ),
        (
            "llava",
            ["--tower", "tome:5", "--keep-tokens", "30"],
            2,
            "keep-tokens 30 is more than tower tome leaves apart: 17 of 37 rows make 16 different tokens",
        ),
        (
            "llava",
            ["--tower", "downsample:84"],
            2,
            "choose a multiple of the patches' 14 pixels, from 14 to 70",
        ),
        (
            "llava",
            ["--tower", "downsample:60"],
            2,
            "choose a multiple of the patches' 14 pixels, from 14 to 70",
        ),
        (
            "qwen2_5",
            ["--tower", "ipcv"],
            2,
            "family qwen2_5_vl does not serve tower ipcv: most of its tower's",
        ),
        (
            "gemma3",
            ["--tower", "downsample"],
            2,
            "family gemma3 does not serve tower downsample: its projector",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    flags: list[str],
    code: int,
    words: str,
) -> None:
    out = tmp_path / "out"
    assert main(["--model", str(folder / model), "--method", "vispruner", "-o", str(out), *flags]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "load the model" not in line]
    assert len(lines) == 1 and words in lines[0], lines
    assert not out.exists()


@pytest.mark.parametrize(
    ("flag", "first", "second"), [("--tower", "ipcv:0.5", "tome:1"), ("--then", "fastv:1", "dart:1")]
)
def test_two_of_a_kind_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, first: str, second: str
) -> None:
    """The first would be left out without a word."""
    with pytest.raises(SystemExit) as left:
        main([flag, first, flag, second, "-o", str(tmp_path / "out")])
    assert left.value.code == 2 and not (tmp_path / "out").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"argument {flag}: given twice, {first} and {second}; choose one" in line


@pytest.mark.parametrize("has_cls", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 4, 7])
@pytest.mark.parametrize("patches", [1, 2, 4, 5, 9, 36, 81])
def test_tome_merges_as_many_as_every_block_has_pairs_for(patches: int, blocks: int, has_cls: bool) -> None:
    """Against rows that are dealt to A and B one by one and leave A, as in the paper."""

    def runs(merge: int) -> bool:
        rows = list(range(patches + has_cls))
        for _ in range(blocks):
            joining, partners = rows[0::2][int(has_cls) :], rows[1::2]
            if merge and (len(joining) < merge or not partners):
                return False
            rows = [row for row in rows if row not in joining[:merge]]
        return True

    shape = TowerShape(patches, blocks, has_cls)
    most = max(merge for merge in range(patches + 1) if runs(merge))
    for merge in range(patches + 3):
        made = reduction(f"tome:{merge}")
        if merge <= most:
            made.check(shape)
        else:
            with pytest.raises(UsageError, match=f"do not have as many pairs; choose 0 to {most}$"):
                made.check(shape)


@pytest.mark.parametrize("name", ["ipcv", "stc"])
def test_the_least_share_that_is_named_is_taken(name: str) -> None:
    """Of 41 rows 1/41 was named as 0.0243902, which is none of them."""
    for count in range(2, 1500):
        shape = TowerShape(count, 4, False)
        with pytest.raises(UsageError) as refused:
            reduction(f"{name}:1e-9").check(shape)
        least = re.search(r"choose (\S+) to 1$", str(refused.value))
        assert least is not None
        reduction(f"{name}:{least[1]}").check(shape)
        assert float(least[1]) < 1.1 / count


def reduction(text: str) -> TowerReduction:
    made = parse_reduction(text)
    assert made is not None
    return made


def test_the_manifest_and_every_result_say_it(bundle: Path) -> None:
    said = {"name": "ipcv", "rows": 13, "of": 37}  # 12 of 36 patches and CLS
    tower = json.loads((bundle / "manifest.json").read_text())["tower"]
    assert {name: tower[name] for name in said} == said
    assert tower["options"] == {"keep": 0.35, "cut": 3, "stable": 1}
    with Pipeline.load(bundle) as pipe:
        result = pipe.generate(np.zeros((60, 80, 3), np.uint8), "what is it ?", max_new_tokens=2)
        alone = pipe.generate(NO_PICTURE, "what is it ?", max_new_tokens=2)
    assert result.to_json()["tower"] == said
    assert alone.tower is None and alone.visual_tokens == (0, 0)  # the tower did not run
    assert result.visual_tokens == (36, 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rows", 38), ("rows", 0), ("of", "37"), ("more", 1), ("name", ""), ("name", "a\nb"), ("name", "stc")],
)
def test_a_manifest_that_lies_is_refused(bundle: Path, tmp_path: Path, name: str, value: object) -> None:
    import shutil

    from vtp.engines import VtpError

    shutil.copytree(bundle, tmp_path / "copy")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["tower"][name] = value
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VtpError, match="tower"):
        open_bundle(tmp_path / "copy")


def test_by_layers_it_is_verified_too(bundle: Path) -> None:
    parity = open_bundle(bundle).manifest.parity
    assert parity["mode"] == "layers" and parity["layers"]["vision_encoder"]


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["ipcv:0.5", "tome:2"])
def test_by_layers_others_are_verified(folder: Path, tmp_path: Path, tower: str) -> None:
    wishes = {"method": "vispruner", "keep_tokens": "5", "tower": tower, "verify": "layers"}
    request = Request(tmp_path / "out", model=str(folder / "llava"), max_length=128, **wishes)  # type: ignore[arg-type]
    assert export(request).manifest.parity["mode"] == "layers"


@pytest.mark.trtrtx
@pytest.mark.skipif(util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
@pytest.mark.parametrize("tower", ["ipcv:0.5", "tome:2", "downsample:56"])
def test_tensorrt_rtx_builds_it(folder: Path, tmp_path: Path, tower: str) -> None:
    wishes = {"method": "vispruner", "keep_tokens": "5", "tower": tower, "target": "tensorrt"}
    request = Request(
        tmp_path / "out",
        model=str(folder / "llava"),
        max_length=128,
        verify="none",
        **wishes,  # type: ignore[arg-type]
    )
    made = export(request)
    file = "vision_encoder.onnx"
    profile = profile_of(made.manifest.graphs[file])
    assert build_engine(made.path(file), "tensorrt-rtx", profile).plan.nbytes
