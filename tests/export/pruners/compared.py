"""Cases and cues for the tests of methods, and what compares graph, module and loops on them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from vtp.export import pruners
from vtp.export.graphs.unfused import keep_transposes
from vtp.export.onnx.shortcuts import shortcuts
from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner
from vtp.export.tower_cues import SCORES

from ...oracles import numpy_merging, numpy_pruners_more, numpy_text, text_cues

METHODS = pruners.method_names()[1:]
WIDTH = 16  # of features and keys

REFERENCES = {**numpy_pruners_more.REFERENCES, **numpy_merging.REFERENCES, **numpy_text.REFERENCES}

# Below this gap between unequal numbers, engines' rounding may decide on arbitrary floats; -1: never.
MARGIN = {"adaptprune": 2e-6} | numpy_pruners_more.MARGINS | numpy_merging.MARGINS | numpy_text.MARGINS

# How far merged rows may be apart, relative and absolute: sums in float32, then the features' dtype.
CLOSE = {"float32": 1e-5, "float16": 2e-3}

# Every operator that a pruner's graph may hold: standard, of fixed output shape, no control flow.
ALLOWED = [
    "Abs",
    "Add",
    "And",
    "ArgMax",
    "ArgMin",
    "Cast",
    "Clip",
    "Concat",
    "Constant",
    "ConstantOfShape",
    "Div",
    "Equal",
    "Exp",
    "Expand",
    "Floor",
    "Gather",
    "GatherElements",
    "Greater",
    "Less",
    "MatMul",
    "Max",
    "Min",
    "Mul",
    "Neg",
    "Pad",
    "Pow",
    "Range",
    "ReduceL2",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceSum",
    "Relu",
    "Reshape",
    "Round",
    "Sigmoid",
    "ScatterElements",
    "Shape",
    "Slice",
    "Softmax",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "TopK",
    "Transpose",
    "Unsqueeze",
    "Where",
]


@dataclass(frozen=True)
class Case:
    """A pruner to export: grid, K, options, and the dtype of the model it prunes."""

    grid: tuple[int, int]
    keep: int
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    def __str__(self) -> str:
        options = "".join(f"-{key}={value}" for key, value in self.options.items())
        return f"{self.grid[0]}x{self.grid[1]}-{self.keep}{options}-{self.dtype}"


ANY = [Case((4, 4), 1), Case((5, 7), 11), Case((3, 5), 15), Case((4, 6), 9, dtype="float16")]
CASES = {
    "random": [*ANY, Case((6, 6), 10, {"seed": 7})],
    "vispruner": [
        *ANY,
        Case((6, 6), 16),  # runs in the published code
        Case((5, 5), 4),  # odd residual, K far below the eight that a round drops
        Case((7, 7), 10, {"r": 0.3}),
        Case((3, 4), 5, {"r": 1.0}),
        Case((3, 3), 2, {"r": 0.0}),
    ],
    "adaptprune": [
        *ANY,
        Case((12, 13), 40),  # more than one band of rows
        Case((1, 9), 4),
        Case((6, 5), 12, {"radius": 1.5, "sigma_space": 3.0, "sigma_feature": 0.5}),
    ],
    "fastervlm": ANY[:2],  # the selection of fastv
    "scope": [*ANY, Case((5, 6), 7, {"alpha": 2.0})],
    "holov": [*ANY, Case((5, 5), 20, {"crops": 8, "alpha": 2.0})],  # quotas above a crop's length
    "focal": [*ANY, Case((12, 13), 40), Case((1, 9), 4), Case((6, 5), 12, {"reach": 0.4})],
    "hiprune": [*ANY, Case((6, 5), 12, {"alpha": 0.9}), Case((4, 5), 3, {"alpha": 1.0})],
    "prunesid": [*ANY, Case((6, 6), 20, {"group": 3})],
    "change": [*ANY, Case((1, 9), 4)],
    "evs": [  # frames of these numbers of patches
        Case((4, 4), 4),
        Case((3, 5), 11),
        Case((3, 5), 15),
        Case((1, 9), 9),
        Case((5, 4), 9, dtype="float16"),
    ],
    "otprune": [*ANY, Case((5, 6), 12, {"gamma": 3.0})],
    "apet": [*ANY, Case((6, 7), 15, {"basis": 4}), Case((5, 5), 20, {"basis": 8}, dtype="float16")],
    "vscan": [
        *ANY,
        Case((6, 7), 20, {"window": 3}),
        Case((5, 5), 9, {"window": 2, "local": 1.0}, dtype="float16"),
    ],
    "dart": [*ANY, Case((3, 7), 9, {"pivots": 4})],
    "cdpruner": [*ANY, Case((5, 6), 12, {"relevance": "unlike"})],
    "sparsevlm": [*ANY, Case((4, 5), 8, {"heads": 5})],
    "visionzip": [
        *ANY,
        Case((6, 7), 20, {"contextual": 0.4, "heads": 4}),
        Case((5, 5), 8, {"contextual": 0.9}),
        Case((5, 5), 9, {"contextual": 0.25, "heads": 4}, dtype="float16"),
        Case((4, 5), 20, {"contextual": 0.5}),  # every token is kept, none joins a target
    ],
    "prumerge": [
        *ANY,
        Case((6, 7), 12, {"neighbours": 5}),
        Case((5, 5), 8, {"sampled": 0.75, "neighbours": 3}, dtype="float16"),
        Case((3, 5), 6, {"sampled": 1.0, "neighbours": 1}),
        Case((5, 3), 6, {"sampled": 0.0, "neighbours": 0}),
    ],
}
ALL = [pytest.param(name, case, id=f"{name}-{case}") for name in METHODS for case in CASES.get(name, ANY)]


class Module:
    """A pruner's module, held against its loops."""

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case = name, case
        self.module = pruners.find_method(name)(case.grid, case.keep, **case.options).eval()

    def answers(self, cues: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
        """keep_indices [B,K] and rows [B,K,C] of a method that merges, once for each way to compute them."""
        return [run_module(self.module, cues)]

    def check(self, cues: dict[str, np.ndarray], margin: float = 0.0) -> int:
        """Compare all on cues [B,...]; returns how many rows were decided by more than `margin`."""
        given = {key: cues[key] for key in self.module.needs}
        pictures = len(next(iter(given.values())))
        answers = self.answers(given)
        for kept, *rows in answers:
            assert len(rows) == self.module.merges
            assert kept.dtype == np.int64 and kept.shape == (pictures, self.case.keep)
        return sum(
            self.check_picture(
                [[item[row] for item in answer] for answer in answers],
                {key: value[row] for key, value in given.items()},
                margin,
            )
            for row in range(pictures)
        )

    def check_picture(
        self, answers: list[list[np.ndarray]], cues: dict[str, np.ndarray], margin: float
    ) -> bool:
        """The answers to one picture; whether the loops decided it by more than `margin`."""
        for kept, *_ in answers:
            one = kept.tolist()
            assert one == sorted(set(one)), "ascending and unique"
            assert one[0] >= 0 and one[-1] < self.module.count
        wanted, gap, *wanted_rows = self.reference(cues)
        if gap <= margin:
            return False
        near = CLOSE[self.case.dtype]
        for kept, *rows in answers:
            assert kept.tolist() == wanted
            for got, right in zip(rows, wanted_rows, strict=True):
                assert got.dtype == self.case.dtype
                np.testing.assert_allclose(got, right, rtol=near, atol=near)
        return True

    def reference(self, cues: dict[str, np.ndarray]) -> tuple[Any, ...]:
        """kept indices, margin and, of a method that merges, rows."""
        return REFERENCES[self.name](self.case.grid, self.case.keep, **cues, **self.case.options)


class Graph(Module):
    """The same exported with a free batch size: graph and module, both held against the loops."""

    def __init__(self, name: str, case: Case, folder: Path) -> None:
        super().__init__(name, case)
        self.path = folder / "pruner.onnx"
        export(self.module, case, self.path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.path, options, ["CPUExecutionProvider"])

    def answers(self, cues: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
        names = {item.name for item in self.session.get_inputs()}
        graph = self.session.run(None, {key: value for key, value in cues.items() if key in names})
        return [graph, *super().answers(cues)]


def run_module(module: Pruner, cues: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What `module` makes of the cues it needs: keep_indices and, if it merges, rows."""
    made = module(**{key: torch.from_numpy(cues[key]) for key in module.needs})
    return [item.numpy() for item in (made if isinstance(made, tuple) else (made,))]


def export(module: Pruner, case: Case, path: Path) -> None:
    """Write the graph of `module`, its batch axis free."""
    cues = lattice(case, 2, seed=0)
    names = list(module.needs)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pruner = module

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
            return self.pruner(**dict(zip(names, inputs, strict=True)))

    with warnings.catch_warnings(), shortcuts():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Named().eval(),
            tuple(torch.from_numpy(cues[name]) for name in names),
            dynamo=True,
            opset_version=23,
            input_names=names,
            output_names=["keep_indices", "kept_rows"][: 1 + module.merges],
            dynamic_shapes=(tuple(free_axes(name) for name in names),),
            custom_translation_table=ops.onnx_translations(),
            verbose=False,
        )
    keep_transposes(program.model)
    program.save(path)


def free_axes(cue: str) -> dict[int, Any]:
    """The axes of a cue that its graph leaves free: the batch, and the number of text tokens."""
    return dict.fromkeys((0, *text_cues.FREE.get(cue, ())), torch.export.Dim.DYNAMIC)


def lattice(case: Case, batch: int, seed: int, levels: int = 4, kinds: int = 5) -> dict[str, np.ndarray]:
    """Cues whose sums, norms and cosines are exact in float32, so that equality needs no tolerance.

    `levels` distinct scores and `kinds` distinct directions bring ties and duplicates. Features have
    norms that are powers of two and cosines that are quarters; keys are parallel or at right angles, so
    that AdaptPrune's exponentials are exactly 1 or 0.
    """
    rng = np.random.default_rng(seed)
    count = case.grid[0] * case.grid[1]
    scores = rng.integers(0, levels, (batch, count)) / 16
    codes = np.zeros((kinds, WIDTH))
    for code in codes:
        code[rng.choice(WIDTH, 4, replace=False)] = rng.choice([-1, 1], 4)
    scale = 2.0 ** rng.integers(-2, 3, (batch, count, 1))
    kind = rng.integers(0, kinds, (batch, count))
    features = codes[kind] * scale
    keys = np.eye(WIDTH)[kind % WIDTH] * scale
    # Four parts alike, of unit entries: whole, or averaged over one or four heads, norms are powers of two.
    vision_keys = np.tile(rng.choice([-1, 1], (kinds, WIDTH // 4))[kind], 4) * scale
    texts = text_cues.lattice(count, WIDTH, case.dtype, batch, seed, levels)
    pictures = rng.integers(-8, 9, (2, *picture_shape(case, batch))) / 8
    return typed(case, features, scores, keys, vision_keys) | texts | as_pictures(case, *pictures)


def continuous(case: Case, batch: int, seed: int) -> dict[str, np.ndarray]:
    """Cues without structure, with a few tokens that nearly equal others."""
    rng = np.random.default_rng(seed)
    count = case.grid[0] * case.grid[1]
    features = rng.standard_normal((batch, count, WIDTH))
    keys = rng.standard_normal((batch, 1, WIDTH)) + 0.3 * rng.standard_normal((batch, count, WIDTH))
    vision_keys = rng.standard_normal((batch, 1, WIDTH)) + rng.standard_normal((batch, count, WIDTH))
    for rows in (features, keys, vision_keys):
        twin = rows[:, 0] + 0.01 * rng.standard_normal((batch, WIDTH))
        rows[:, count // 2] = 1.5 * twin
    scores = rng.random((batch, count)) ** 3
    texts = text_cues.continuous(count, WIDTH, case.dtype, batch, seed)
    picture = rng.standard_normal(picture_shape(case, batch))
    other = picture + rng.random((batch, 1, *picture.shape[2:])) * rng.standard_normal(picture.shape)
    return typed(case, features, scores, keys, vision_keys) | texts | as_pictures(case, picture, other)


def picture_shape(case: Case, batch: int) -> tuple[int, ...]:
    """[B,3,H,W] with patches of 2 x 3 pixels, and a column that belongs to none if there is room for it."""
    rows, columns = case.grid
    return batch, 3, 2 * rows, 3 * columns + (columns > 1)


def as_pictures(case: Case, picture: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    return {"picture": picture.astype(case.dtype), "reference_picture": other.astype(case.dtype)}


def typed(
    case: Case, features: np.ndarray, scores: np.ndarray, keys: np.ndarray, vision_keys: np.ndarray
) -> dict[str, np.ndarray]:
    """Every cue by name: scores are float32 always, the rest in the model's dtype."""
    rows = dict.fromkeys(("image_features", "image_embeds", "hidden_states"), features.astype(case.dtype))
    rows |= {"keys": keys.astype(case.dtype), "vision_keys": vision_keys.astype(case.dtype)}
    turned = {name: np.roll(scores, place, axis=1) for place, name in enumerate(SCORES)}
    return {**rows, **{name: given.astype(np.float32) for name, given in turned.items()}}
