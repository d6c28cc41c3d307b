"""vtp-export of methods of one's own: what is refused, in one line, and what runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands.run import main as run_main

from .test_cli import PROGRESS, refuse, run

MINE = """
import torch
from vtp.export.pruners.base import Pruner

class Mine(Pruner):
    \"\"\"Keeps the tokens with the largest first number.\"\"\"
    name = "mine"
    site = "projector"
    needs = ("image_embeds",)
    options = {"channel": 0}

    def forward(self, image_embeds):
        from vtp.export.pruners import ops
        return ops.raster(ops.top_k(image_embeds[:, :, self.settings["channel"]].float(), self.keep))

class Unsorted(Mine):
    name = "unsorted"
    def forward(self, image_embeds):
        return super().forward(image_embeds).flip(1)

class Twice(Mine):
    name = "twice"
    def forward(self, image_embeds):
        return torch.zeros(image_embeds.shape[0], self.keep, dtype=torch.int64)

class Fewer(Mine):
    name = "fewer"
    def forward(self, image_embeds):
        return super().forward(image_embeds)[:, 1:]

class Floats(Mine):
    name = "floats"
    def forward(self, image_embeds):
        return super().forward(image_embeds).float()

class Nothing(Mine):
    name = "nothing"
    def forward(self, image_embeds):
        return None

class Raises(Mine):
    name = "raises"
    def forward(self, image_embeds):
        raise ValueError("no such\\nchannel")

class Chance(Mine):
    name = "chance"
    def forward(self, image_embeds):
        return super().forward(image_embeds + 0 * torch.rand_like(image_embeds))

class Layers(Mine):
    name = "layers"
    site = "decoder"
    needs = ("hidden_states",)
    @classmethod
    def sites(cls, layers, count, keep, settings):
        return [1]
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Unsorted", "not ascending"),
        ("Twice", "without repeats"),
        ("Fewer", r"returns torch.int64 \[2, 3\]; keep_indices must be torch.int64 \[batch, 4\]"),
        ("Floats", "returns torch.float32"),
        ("Nothing", "returns NoneType"),
        ("Raises", r"method raises: forward\(\) fails: ValueError: no such channel \(--debug"),
        ("Layers", r"method layers: sites\(\) fails: TypeError"),
    ],
)
def test_an_outside_method_that_chooses_wrongly(
    model_folder: Callable[[str], Path],
    mine: Path,
    name: str,
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = str(model_folder("mha"))
    capfd.readouterr()
    argv = [
        "--model",
        model,
        "--method",
        f"{mine}:{name}",
        "--keep-tokens",
        "4",
        "-o",
        str(mine.parent / "out"),
    ]
    refuse(argv, 1, message, capfd)
    assert not (mine.parent / "out").exists()


def test_an_outside_method_whose_graph_no_bundle_may_hold(
    model_folder: Callable[[str], Path], mine: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Refused while it is written, unverified or not: no bundle is left that cannot be opened."""
    model, out = str(model_folder("mha")), mine.parent / "out"
    capfd.readouterr()
    argv = ["--model", model, "--method", f"{mine}:Chance", "--keep-tokens", "4", "--verify", "none"]
    refuse([*argv, "-o", str(out)], 1, r"pruner\.onnx has random numbers \(Random\w+\)", capfd)
    assert not out.exists()


def test_an_outside_method_exports_as_json_and_runs(
    model_folder: Callable[[str], Path],
    mine: Path,
    picture_file: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model, out = str(model_folder("mha")), mine.parent / "out"
    capfd.readouterr()
    argv = [
        "--model",
        model,
        "--method",
        f"{mine}:Mine",
        "--method-option",
        "channel=3",
        "--keep-tokens",
        "2,5",
    ]
    assert run([*argv, "-o", str(out), "--json", "--dtype", "float16"]) == 0
    text, err = capfd.readouterr()
    data = json.loads(text)
    assert data["visual_tokens"] == {"before": 16, "after": 5} and data["keep_tokens"] == [2, 5]
    assert data["method"] == "mine" and data["bundle"] == str(out) and data["parity"]["mode"] == "full"
    assert data["bytes"] == sum(info.bytes for info in open_bundle(out).manifest.files.values())
    assert all(PROGRESS.fullmatch(line) for line in err.splitlines())
    assert "\r" not in err and "\033" not in err
    assert open_bundle(out).manifest.method.options == {"channel": 3}
    for keep in (2, 5):
        ask = [
            str(out),
            "--image",
            str(picture_file),
            "--prompt",
            "what ?",
            "--keep-tokens",
            str(keep),
            "--json",
        ]
        assert run_main([*ask, "--max-new-tokens", "3"]) == 0
        answer = json.loads(capfd.readouterr().out)
        assert answer["visual_tokens"] == {"before": 16, "after": keep} and len(answer["kept"]) == keep
