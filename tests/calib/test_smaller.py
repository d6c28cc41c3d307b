"""--against downsample: the smaller picture with as many tokens, exported when it is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vtp.calib import cli
from vtp.calib.baselines import smaller
from vtp.calib.baselines.smaller import SmallerPicture, nearest_side
from vtp.engines import UsageError, VtpError
from vtp.export.exporter import Request, export
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.bundle.manifest import Manifest

from ..models.tiny_families import save_anyres
from ..models.tiny_lfm2 import save_lfm2
from ..models.tiny_pixtral import save_mistral3
from ..models.tiny_qwen import save_qwen
from .asked import unpruned_answers

ASKED = 4  # questions


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, exported: Any) -> Path:
    """Questions whose accepted answers are what the unpruned model says."""
    return unpruned_answers(tmp_path_factory.mktemp("data"), exported("none").folder, ASKED)


def calib(*arguments: object) -> int:
    return cli.main([*map(str, arguments), "--threads", "1", "--max-new-tokens", "4"])


def making(tmp_path: Path, model: Path | None) -> SmallerPicture:
    return SmallerPicture(None if model is None else str(model), tmp_path / "out", lambda _: None)


@pytest.mark.parametrize(
    ("keep", "side"), [(192, 14), (128, 11), (64, 8), (32, 6), (16, 4), (1, 1), (2, 1), (3, 2), (575, 23)]
)
def test_the_nearest_square_of_patches_is_taken(keep: int, side: int) -> None:
    assert nearest_side(keep, 24) == side
    assert all(abs(side**2 - keep) <= abs(other**2 - keep) for other in range(1, 24))


def test_score_holds_a_method_against_the_smaller_picture(exported, data, tmp_path, capsys) -> None:
    """In one command; its score is that of a bundle exported by hand, and a later run takes it again."""
    made = exported("vispruner")
    asked = ["--data", data, "--journal", tmp_path / "s", "--against", "downsample", "--model", made.model]
    assert calib("score", f"{made.folder}:3", *asked, "--json") == 0
    told = capsys.readouterr()
    _, found = json.loads(told.out)["against"]
    assert found["method"] == "vispruner:3"
    assert found["baseline"] == "a smaller picture of 28x28 pixels, 4 tokens"
    assert f"vispruner:3 beats {found['baseline']}" in told.out or "does not beat" in told.err
    by_hand = export(
        Request(tmp_path / "hand", str(made.model), "none", tower="downsample:28", verify="none")
    ).folder
    assert calib("score", by_hand, "--data", data, "--journal", tmp_path / "t", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["bundles"]
    assert found["baseline_score"] == row["score"]
    (folder,) = (tmp_path / "s").glob("downsample-28-*")
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert calib("score", f"{made.folder}:3", *asked) == 0
    told = capsys.readouterr()
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    assert f"{found['baseline']}: " in told.out + told.err and "was not asked" not in told.out


@pytest.mark.slow
def test_keep_writes_it_into_the_manifest_and_a_hint_names_it(exported, data, tmp_path, capsys) -> None:
    made = exported("vispruner")
    bundle = Path(shutil.copytree(made.folder, tmp_path / "bundle"))
    goal = ["--data", data, "--reference", exported("none").folder, "--budget-ms", 1e6]
    assert calib("keep", bundle, *goal, "--dry-run") == 0
    assert (
        "a smaller picture with as many tokens was not asked: --against downsample" in capsys.readouterr().out
    )
    assert calib("keep", bundle, *goal, "--against", "downsample", "--model", made.model) == 0
    told = capsys.readouterr()
    found = open_bundle(bundle).manifest.calibration["against"]
    assert [one["baseline"].split(" of ")[0] for one in found] == ["a random choice", "a smaller picture"]
    warned = [line for line in told.err.splitlines() if "a smaller picture of" in line]
    assert len(warned) == (not found[1]["beaten"]) and all("does not beat" in line for line in warned)
    assert list((tmp_path / "bundle-calib").glob("downsample-*"))


@pytest.mark.slow
def test_another_model_is_refused(exported, model_folder, tmp_path) -> None:
    """Of the same shape, with other weights."""
    from ..models.tiny import save_tiny

    own = open_bundle(exported("vispruner").folder).manifest
    other = tmp_path / "other"
    save_tiny(other, seed=99)
    with pytest.raises(UsageError, match=r"other is not what this bundle was made from .*embeddings differ"):
        making(tmp_path, other).bundle(own, 4)


def test_what_vtp_export_refuses_is_passed_on(exported, tmp_path) -> None:
    own = open_bundle(exported("vispruner").folder).manifest
    with pytest.raises(VtpError, match="--against downsample: vtp-export: error: ") as refused:
        making(tmp_path, tmp_path / "nowhere").bundle(own, 4)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def _video(own: Manifest) -> Manifest:
    return replace(own, image=replace(own.image, frames=8))  # type: ignore[call-arg]


def test_what_has_no_smaller_picture_is_refused_before_a_question(
    exported, saved, once, data, tmp_path, capsys, monkeypatch
) -> None:
    made = exported("vispruner")
    own, some = open_bundle(made.folder).manifest, making(tmp_path, made.model)
    named = replace(own, model=replace(own.model, name="mine"))
    with pytest.raises(UsageError, match=r"give --model with the folder or hub name .*\(mine\)"):
        making(tmp_path, None).check(named)
    with pytest.raises(UsageError, match="this bundle answers about videos"):
        some.check(_video(own))
    tiles = once.bundle(
        saved(save_anyres, "llava_next")[0], method="none", image_size=(40, 56), verify="none"
    )
    with pytest.raises(UsageError, match=r"does not serve family llava_next, whose pictures do not come in"):
        some.check(open_bundle(tiles).manifest)
    monkeypatch.setattr(smaller, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="torch is not installed: pip install 'vtp-edge\\[export\\]'"):
        some.check(own)
    asked = ["--data", data, "--journal", tmp_path / "s"]
    assert calib("score", made.folder, *asked, "--model", made.model) == 2
    assert "--model belongs to --against downsample" in capsys.readouterr().err
    assert calib("score", made.folder, *asked, "--against", "downsample", "--model", made.model) == 2
    assert "torch is not installed" in capsys.readouterr().err
    assert not (tmp_path / "s/answers.jsonl").exists() or not (tmp_path / "s/answers.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save", "kind", "size", "keep", "tokens"),
    [
        (save_qwen, ("qwen2_vl",), (32, 48), 6, 6),
        (save_mistral3, ("mistral",), (32, 40), 5, 4),
        (save_lfm2, (), (32, 48), 6, 6),
    ],
)
def test_a_tower_of_any_size_takes_a_smaller_picture(
    once, saved: Callable[..., Any], tmp_path: Path, save, kind, size, keep, tokens
) -> None:
    """The same shape of picture at fewer pixels, by --image-size, in about the same shape of grid."""
    model = saved(save, *kind)[0]
    whole = once.bundle(model, method="divprune", keep_tokens=str(keep), image_size=size, verify="none")
    own = open_bundle(whole).manifest
    making(tmp_path, model).check(own)
    made = open_bundle(making(tmp_path, model).bundle(own, keep)).manifest
    assert made.visual.count == tokens and made.method.name == "none"
    assert made.image.fixed_size < own.image.fixed_size
    assert abs(made.visual.grid[0] / made.visual.grid[1] - own.visual.grid[0] / own.visual.grid[1]) < 0.5
