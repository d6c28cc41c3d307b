"""The exporter's shortcuts: the same graph as without them, or the exporter's own way."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import onnx_ir.schemas
import pytest
import torch
from torch import Tensor, nn

from vtp.export.exporter import Request, export
from vtp.export.onnx import emit as emitting
from vtp.export.onnx import optimize as optimizing
from vtp.export.onnx import shortcuts as shortening
from vtp.export.onnx.emit import GraphInput, GraphSpec, WeightStore, emit
from vtp.export.onnx.shortcuts import shortcuts

from ..models.tiny import save_tiny
from ..models.tiny_families import save_anyres
from ..models.tiny_gemma import save_gemma, tiny_gemma3, tiny_paligemma
from ..models.tiny_qwen import save_qwen
from ..models.tiny_split import save_idefics3, save_internvl


class Patches(nn.Module):
    """A convolution padded by a word, conversions that change nothing, and one that is an output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 8, 4, 4, padding="valid")

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.patches(image.to(torch.float32)).flatten(2).transpose(1, 2)
        return rows.to(torch.float32), rows.mean(-1).to(torch.float16)


class Mask(nn.Module):
    """Conjunctions written with &, and a length that the trace asserts something of."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        flat = image.reshape(image.shape[0], -1)
        torch._check(flat.shape[0] <= 64)
        seen = (flat > 0) & (flat < 1) | (flat > 2)
        return flat.masked_fill(~seen, 0.0), seen.long().sum(-1)


class Reversed(nn.Module):
    """1 - x is an operator of its own, which has no translation; of integers too."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - image, 3 - image.long()


class Mixed(nn.Module):
    """Operands of different types, numbers of another type than the tensor, and results of a third one."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        whole = (image * 9).long()
        parts = whole / 2 + image.half() * whole
        near = torch.where(whole > 0.5, 1, image.double()) * whole.to(torch.int32) + (whole == parts)
        return parts + torch.sqrt(whole.abs()), near.sum(-1) + (whole > 3).sum(-1) - torch.pow(
            whole, 2.0
        ).mean(-1)


class Rewritten(nn.Module):
    """What onnxscript's rules merge: transposes one after the other, bounds one after the other."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        turned = image.permute(0, 2, 3, 1).permute(0, 3, 1, 2)
        return turned * 2, image.clamp(min=0.0).clamp(max=1.0)


class Decomposed(nn.Module):
    """An operator that is only known by what it is made of."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.huber_loss(image, image * 2, reduction="none"), image + 1


class InPlace(nn.Module):
    """A tensor that is written into after a view of it was made: the order matters."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        own = image * 2
        view = own[:, :1]
        own[:, 1:] += 3
        own.mul_(2)
        return own, view.clone()


class CopyInPlace(nn.Module):
    """A conversion that changes nothing but makes a copy, which is written into."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        own = image * 2
        copied = own.to(torch.float32, copy=True)
        copied.add_(1)
        return own, copied


class Autocast(nn.Module):
    """Part of it is a program of its own inside the program."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):
            small = image.float() * 0.5
        return small, small + image


MODULES = [
    (Patches, True),
    (Mask, True),
    (Reversed, True),
    (Mixed, True),
    (Rewritten, True),
    (Decomposed, False),
    (InPlace, False),
    (CopyInPlace, False),
    (Autocast, False),
]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What `settle` said of each graph."""
    said: list[bool] = []
    settle = shortening.settle
    monkeypatch.setattr(shortening, "settle", lambda *args: said.append(settle(*args)) or said[-1])
    return said


def long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emitting, "shortcuts", contextlib.nullcontext)
    monkeypatch.setattr(optimizing, "screened_rules", contextlib.nullcontext)


def drawn(path: Path) -> dict[str, str]:
    """What each output of a graph is made of, whatever its values are called and whichever comes first.

    A value is known by its operator, the operator's attributes, and the values that go in.
    """
    graph = onnx.load(path).graph
    known = {"": "none"} | {value.name: f"input {value.name}" for value in graph.input}
    for tensor in graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        known[tensor.name] = digest(tensor.data_type, values.shape, values.tobytes())
    for node in graph.node:
        attributes = sorted(item.SerializeToString(deterministic=True) for item in node.attribute)
        for place, name in enumerate(node.output):
            known[name] = digest(
                node.domain, node.op_type, place, attributes, [known[name] for name in node.input]
            )
    return {value.name: known[value.name] for value in graph.output}


def digest(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def write(folder: Path, module: nn.Module) -> Path:
    folder.mkdir()
    image = GraphInput("image", torch.rand(2, 3, 8, 8), {0: "batch"})
    return emit(GraphSpec("graph", module, [image], ["first", "second"]), WeightStore(folder))


@pytest.mark.parametrize(("kind", "short"), MODULES)
def test_a_graph_is_the_same_as_by_the_long_way(
    kind: Callable[[], nn.Module],
    short: bool,
    settled: list[bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast = write(tmp_path / "fast", kind())
    assert settled == [short]
    long_way(monkeypatch)
    assert drawn(fast) == drawn(write(tmp_path / "slow", kind()))


def test_tables_are_made_once_and_stay_apart() -> None:
    registry = torch.onnx._internal.exporter._registration.ONNXRegistry
    whole = registry.from_torchlib(opset_version=18).functions
    with shortcuts():
        first, second = (registry().from_torchlib(opset_version=18).functions for _ in range(2))
        assert first.keys() == second.keys() == whole.keys()
        assert first["aten::add.Tensor"][0] is second["aten::add.Tensor"][0]
        first["aten::add.Tensor"].clear()
        del first["aten::sub.Tensor"]
    assert second["aten::add.Tensor"] and second["aten::sub.Tensor"]


def test_signatures_are_read_once_and_are_the_operators_own() -> None:
    read = onnx_ir.schemas.OpSignature.from_op_schema
    for name, version in (("Add", 14), ("Add", 6), ("TopK", 23), ("Cast", 23)):
        plain = read(onnx.defs.get_schema(name, version))
        with shortcuts():
            twice = [
                onnx_ir.schemas.OpSignature.from_op_schema(onnx.defs.get_schema(name, version))
                for _ in range(2)
            ]
        assert twice[0] is twice[1] and repr(twice[0]) == repr(plain)
    assert onnx_ir.schemas.OpSignature.from_op_schema == read


@pytest.mark.parametrize("name", ["from_torchlib", "decompose_with_registry"])
def test_another_torch_is_left_to_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = torch.onnx._internal.exporter
    owner = exporter._registration.ONNXRegistry if name == "from_torchlib" else exporter._fx_passes
    monkeypatch.delattr(owner, name)
    others = dict(vars(exporter._registration.ONNXRegistry)), dict(vars(exporter._fx_passes))
    with shortcuts():
        assert (dict(vars(exporter._registration.ONNXRegistry)), dict(vars(exporter._fx_passes))) == others


FAMILIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "llava": (save_tiny, "adaptprune"),
    "next": (lambda path: save_anyres(path, "llava_next"), "vispruner"),
    "onevision": (lambda path: save_anyres(path, "llava_onevision", vision="siglip"), "divprune"),
    "qwen2": (lambda path: save_qwen(path, "qwen2_vl"), "visionzip"),
    "qwen3": (lambda path: save_qwen(path, "qwen3_vl"), "fastv"),
    "internvl": (save_internvl, "dart"),
    "idefics3": (save_idefics3, "divprune"),
    "pali": (lambda path: save_gemma(path, tiny_paligemma()), "cdpruner"),
    "gemma3": (lambda path: save_gemma(path, tiny_gemma3()), "holov"),
}


#: Their visual tokens fill more than a short cache.
LONG = ("next", "onevision", "qwen2", "qwen3")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_bundle_is_the_same_as_by_the_long_way(
    name: str, settled: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, method = FAMILIES[name]
    length = 512 if name in LONG else 128
    save(tmp_path / "model")

    def bundle(folder: str) -> dict[str, Any]:
        out = tmp_path / folder
        request = Request(
            model=str(tmp_path / "model"),
            method=method,
            keep_tokens="6",
            output=out,
            max_length=length,
            verify="none",
        )
        export(request)
        return {path.name: drawn(path) for path in sorted(out.glob("*.onnx"))}

    fast = bundle("fast")
    assert settled.count(True) > len(settled) / 2
    long_way(monkeypatch)
    assert bundle("slow") == fast
