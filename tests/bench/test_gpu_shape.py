"""A full-size shape's way to a GPU, on the CPU with a tiny one: packed empty, filled, beside PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtp.bench.gpu import beside as gpu_beside
from vtp.bench.gpu import beside_torch as gpu_torch
from vtp.bench.gpu import pack as gpu_pack
from vtp.bench.gpu import shape as gpu_shape
from vtp.bench.gpu import weights as gpu_weights
from vtp.bench.gpu.checks import Job
from vtp.bench.gpu.device import Cpu
from vtp.bench.shapes import models as shapes
from vtp.bench.shapes.weight_map import MODEL, WEIGHT_MAP, read_weight_map
from vtp.engines import VtpError, open_graph
from vtp.runtime.bundle.folder import open_bundle

from ..models.tiny import text_config, vision_config

ROOT = Path(__file__).parents[2]
TINY = {"none": ("none", None), "vispruner": ("vispruner", "6,3")}


def tiny() -> Any:
    """The parts of `llava-1.5-7b` with 16 visual tokens and a few thousand weights."""
    made = shapes.SHAPES["llava-1.5-7b"].parts()
    made.config.vision_config = vision_config("clip", 56, 14, 2)
    made.config.text_config = text_config("llama", 4, 2, 3, 8, False, vocab_size=32064)
    made.config.image_seq_length = 16
    sides = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    return replace(made, processor={**made.processor, **sides})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bundles of a tiny shape, packed, unpacked and filled."""
    folder = tmp_path_factory.mktemp("shape")
    with pytest.MonkeyPatch.context() as patch:
        shape = replace(shapes.SHAPES["llava-1.5-7b"], name="tiny", parts=tiny)
        patch.setitem(shapes.SHAPES, "tiny", shape)
        patch.setattr(gpu_pack, "BUNDLES", TINY)
        assert gpu_pack.main(["--shape", "tiny", "--out", str(folder / "packed.tar.xz"), "--debug"]) == 0
    with tarfile.open(folder / "packed.tar.xz") as archive:
        assert not [name for name in archive.getnames() if name.endswith(".data")]
        archive.extractall(folder, filter="data")
    assert (folder / "packed.tar.xz").stat().st_size < 1 << 20
    folder = folder / gpu_pack.FOLDER
    found = gpu_weights.fill_bundles(sorted(folder.iterdir()), "cpu")
    assert found["written"] > 0
    assert gpu_weights.fill_bundles(sorted(folder.iterdir()), "cpu") == {"written": 0, "linked": 0}
    return folder


def test_weights_lie_where_the_graphs_look_for_them(work: Path) -> None:
    """The embeddings graph gives the very rows that were drawn, and every file holds the model's numbers."""
    bundle = open_bundle(work / "none")
    (piece,) = read_weight_map(work / "none")["embed_tokens.onnx.data"]
    table = gpu_weights.draw(piece.name, piece.shape, "cpu").numpy()
    embed = open_graph(bundle.path("embed_tokens.onnx"), "ort-cpu", 1)
    ids = np.array([[5, 31999]], np.int64)
    assert (embed.run({"input_ids": embed.put(ids)})["inputs_embeds"].numpy() == table[ids]).all()
    held = gpu_torch.TorchModel(work / "none", "cpu").model.state_dict()
    for file, pieces in read_weight_map(work / "none").items():
        stored = np.memmap(work / "none" / file, np.uint8, "r")
        for piece in pieces:
            wanted = held[piece.name].T if piece.transposed else held[piece.name]
            raw = wanted.contiguous().numpy().tobytes()
            assert stored[piece.offset : piece.offset + len(raw)].tobytes() == raw, piece


def test_equal_files_lie_on_the_disk_once(work: Path) -> None:
    shared = [work / name / "embed_tokens.onnx.data" for name in ("none", "vispruner")]
    assert shared[0].samefile(shared[1])


def test_scales_are_one_and_the_rest_is_drawn_by_name() -> None:
    import torch

    assert (gpu_weights.draw("a.norm.weight", (8,), "cpu") == 1).all()
    bias, matrix = gpu_weights.draw("a.bias", (4000,), "cpu"), gpu_weights.draw("a.weight", (300, 40), "cpu")
    assert bias.dtype == matrix.dtype == torch.float16
    assert all(
        abs(one.float().std() - 0.02) < 2e-3 and abs(one.float().mean()) < 2e-3 for one in (bias, matrix)
    )
    assert (gpu_weights.draw("a.bias", (4000,), "cpu") == bias).all()
    assert not (gpu_weights.draw("b.bias", (4000,), "cpu") == bias).all()


def test_the_whole_run_on_the_cpu(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "result.json"
    arguments = ["--work", str(work), "--engine", "ort-cpu", "--quick", "--json", str(target)]
    assert gpu_shape.main(arguments) == 0
    results = json.loads(target.read_text())
    assert list(results["bundles"]) == ["none 16", "vispruner 6", "vispruner 3"]
    for label, one in results["bundles"].items():
        found = one["checks"]["beside"]
        assert (found["status"], found["note"]) == ("ok", ""), label
        assert set(found["ms"]) == {"vtp", "dynamic", "static"}
        assert set(found["ratios"]["static"]) == {"encoder", "prefill", "first token", "decode step"}
        assert ("pruner" in found["ms"]["vtp"]) == (not label.startswith("none"))
        assert found["step_bytes"] > 0 and min(found["bandwidth"].values()) > 0
    whole = results["bundles"]["none 16"]["checks"]["beside"]
    assert whole["logits"]["cosine_min"] > 0.999 and whole["logits"]["compared"] == 5
    assert whole["tokens"]["vtp"] == whole["tokens"]["dynamic"]
    assert {one["met"] for one in results["aims"]} <= {True, False} and len(results["aims"]) == 7
    page = target.with_suffix(".md").read_text()
    assert "## Aims" in page and "| vispruner 3 | PyTorch static | decode step |" in page
    stamped = target.read_text()
    assert gpu_shape.main(arguments) == 0  # nothing is left to measure
    assert json.loads(target.read_text())["bundles"] == json.loads(stamped)["bundles"]
    assert "vispruner 3: measured before" in capsys.readouterr().err


def test_both_ways_of_pytorch_give_the_same_logits(work: Path) -> None:
    job = Job(str(work / "none"), "ort-cpu", keep=16, steps=3)
    shape = gpu_beside.Shape(job, Cpu())
    held = gpu_torch.TorchModel(work / "none", "cpu")
    runs = [gpu_torch.Run(held, shape.pixels, *shape.text, 3, way) for way in gpu_torch.WAYS]
    for _ in range(2):  # a second prompt into the same places
        found = []
        for run in runs:
            run.encode()
            run.prefill()
            found.append([run.answer(), *(run.step(token) for token in (7, 8, 9))])
        for one, other in zip(*found, strict=True):
            assert float(one @ other) / float(np.linalg.norm(one) * np.linalg.norm(other)) > 0.9999
    shape.close()


def test_aims_are_met_or_missed() -> None:
    def bundle(method: str, keep: int, **ms: float) -> dict[str, Any]:
        figures = {part: {"median": value} for part, value in ms.items()}
        beside = {"ms": {"vtp": figures}, "step_bytes": 9 * 10**9, "bandwidth": {"a": 1e12, "b": 4e12}}
        return {"method": method, "keep": keep, "checks": {"beside": beside}}

    step = {"decode step": 2.5}
    found = gpu_shape.aims(
        {
            "none 576": bundle("none", 576, prefill=10.0, **step),
            "v 192": bundle("v", 192, prefill=5.0, pruner=0.6, **step),
            "v 64": bundle("v", 64, prefill=2.5, pruner=0.4, **step),
        }
    )
    met = [(one["bundle"], one["what"].split(",")[0], one["met"]) for one in found]
    assert met == [
        ("none 576", "decode", True),
        ("v 192", "pruner", False),
        ("v 192", "decode", True),
        ("v 64", "share of the prefill cut", True),
        ("v 64", "pruner", True),
        ("v 64", "decode", True),
    ]
    alone = gpu_shape.aims({"v 64": bundle("v", 64, prefill=2.5, **{"decode step": 3.0})})
    assert [one["met"] for one in alone] == [None, False]


def test_what_cannot_be_filled_is_refused_in_one_line(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(VtpError, match=rf"has no readable {WEIGHT_MAP}; make it with"):
        gpu_weights.fill_bundles([tmp_path], "cpu")
    assert gpu_shape.main(["--work", str(tmp_path), "--engine", "ort-cpu"]) == 2
    assert "pack some with" in capsys.readouterr().err
    (tmp_path / WEIGHT_MAP).write_text((work / "none" / WEIGHT_MAP).read_text())
    usage = gpu_weights.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(gpu_weights.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(VtpError, match=r"0\.0 GB are free there"):
        gpu_weights.fill_bundles([tmp_path], "cpu")
    assert not list(tmp_path.glob("*.data")) and (work / "none" / MODEL).is_file()


STAND_IN = """#!/bin/sh
echo "$@" >> {calls}
while [ $# -gt 0 ]; do
  if [ "$1" = --json ]; then echo '{{}}' > "$2"; fi
  shift
done
{then}
"""


def lease(folder: Path, seconds: int, then: str = "") -> str:
    """What bench/gpu_lease.sh prints in `folder`, with a Python that notes how it was called."""
    python = folder / "python"
    python.write_text(STAND_IN.format(calls=folder / "calls", then=then))
    python.chmod(0o755)
    named = {"PYTHON": str(python), "VTP_BUILD": str(folder / "build"), "VTP_LINKS": str(folder / "links")}
    named["VTP_WEIGHTS"] = str(folder / "weights")
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu_lease.sh"), str(seconds)],
        env={**os.environ, **named, "OUT": str(folder / "out"), "ENGINE": "ort-cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout


def test_a_lease_goes_on_where_it_ended(tmp_path: Path) -> None:
    build = tmp_path / "build"
    build.mkdir()
    assert "== gpu-shape.tar.xz is not there: its pieces are left out" in lease(tmp_path, 600)
    assert not (tmp_path / "calls").exists()
    for name in ("gpu-bundles", "gpu-shape"):
        (tmp_path / name / "vispruner").mkdir(parents=True)
        with tarfile.open(build / f"{name}.tar.xz", "w:xz") as archive:
            archive.add(tmp_path / name, name)
    first = lease(tmp_path, 200)
    assert "== quick: exit 0" in first and "== shape: waits for the next call (needs 400 s)" in first
    assert lease(tmp_path, 600, "exit 3").count(": exit 3 after") == 3  # tried, and not done
    (build / "gpu-bundles.tar.xz").unlink()  # what was unpacked stays
    again = lease(tmp_path, 600)
    assert "== quick: done before" in again and again.count(": exit 0 after") == 3
    assert lease(tmp_path, 600).count("done before") == 4
    calls = (tmp_path / "calls").read_text().splitlines()
    modules = [line.split()[1].rsplit(".", 1)[-1] for line in calls]
    assert modules == ["command", *["shape", "shape", "command"] * 2]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.json")) == [
        "built-in.json",
        "quick.json",
        "shape-quick.json",
        "shape.json",
    ]
