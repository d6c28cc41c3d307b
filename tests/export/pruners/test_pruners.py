"""Every method: exported graph = torch module = numpy loops, index for index; and the registry.

Of methods that merge, the rows are compared as well.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from vtp.engines.errors import UsageError
from vtp.export import pruners
from vtp.export.graphs.unfused import keep_transposes
from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner

from ...oracles import numpy_merging, numpy_pruners_more, numpy_text, text_cues
from ...oracles.fusing import fused_in_float64
from ...oracles.numpy_pruners import vispruner

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


class Graph:
    """A pruner exported with a free batch size, beside its module."""

    def __init__(self, name: str, case: Case, folder: Path) -> None:
        self.name, self.case = name, case
        self.module = pruners.find_method(name)(case.grid, case.keep, **case.options).eval()
        self.path = folder / "pruner.onnx"
        export(self.module, case, self.path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.path, options, ["CPUExecutionProvider"])

    def check(self, cues: dict[str, np.ndarray], margin: float = 0.0) -> int:
        """Compare the three on cues [B,...]; returns how many rows were decided by more than `margin`."""
        given = {key: cues[key] for key in self.module.needs}
        names = {item.name for item in self.session.get_inputs()}
        graph, *rows = self.session.run(None, {key: value for key, value in given.items() if key in names})
        module, *module_rows = run_module(self.module, given)
        assert len(rows) == len(module_rows) == self.module.merges
        assert graph.dtype == module.dtype == np.int64
        assert graph.shape == module.shape == (len(next(iter(given.values()))), self.case.keep)
        decided = 0
        for row, (one, two) in enumerate(zip(graph.tolist(), module.tolist(), strict=True)):
            assert one == sorted(set(one)), "ascending and unique"
            assert one[0] >= 0 and one[-1] < self.module.count
            kept, gap, *wanted = self.reference({key: value[row] for key, value in given.items()})
            if gap > margin:
                decided += 1
                assert one == two == kept
                if wanted:
                    self.check_rows(rows[0][row], module_rows[0][row], *wanted)
        return decided

    def check_rows(self, graph: np.ndarray, module: np.ndarray, wanted: np.ndarray) -> None:
        """Merged rows [K,C] of one picture, in the features' dtype."""
        assert graph.dtype == module.dtype == self.case.dtype
        near = CLOSE[self.case.dtype]
        np.testing.assert_allclose(graph, wanted, rtol=near, atol=near)
        np.testing.assert_allclose(module, wanted, rtol=near, atol=near)

    def reference(self, cues: dict[str, np.ndarray]) -> tuple[Any, ...]:
        """kept indices, margin and, of a method that merges, rows."""
        return REFERENCES[self.name](self.case.grid, self.case.keep, **cues, **self.case.options)


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

    with warnings.catch_warnings():
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


@pytest.fixture(scope="module")
def graph_of(tmp_path_factory):
    """Export every case once."""
    folder = tmp_path_factory.mktemp("pruners")
    made: dict[str, Graph] = {}

    def get(name: str, case: Case) -> Graph:
        key = f"{name}-{case}"
        if key not in made:
            (folder / key).mkdir()
            made[key] = Graph(name, case, folder / key)
        return made[key]

    return get


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
    return typed(case, features, scores, keys, vision_keys) | texts


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
    return typed(case, features, scores, keys, vision_keys) | texts


def typed(
    case: Case, features: np.ndarray, scores: np.ndarray, keys: np.ndarray, vision_keys: np.ndarray
) -> dict[str, np.ndarray]:
    """Every cue by name: scores are float32 always, the rest in the model's dtype."""
    rows = dict.fromkeys(("image_features", "image_embeds", "hidden_states"), features.astype(case.dtype))
    rows |= {"keys": keys.astype(case.dtype), "vision_keys": vision_keys.astype(case.dtype)}
    return {**rows, "attention_scores": scores.astype(np.float32)}


# -- the three agree -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_numpy_reference(name):
    assert name in REFERENCES, "write its loops in numpy_pruners.py"


@pytest.mark.parametrize(("name", "case"), ALL)
def test_graph_module_and_loops_agree_on_ties_and_duplicates(graph_of, name, case):
    graph = graph_of(name, case)

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        seed=st.integers(0, 2**32 - 1),
        batch=st.integers(1, 3),
        levels=st.integers(1, 24),
        kinds=st.integers(1, WIDTH),
    )
    def check(seed: int, batch: int, levels: int, kinds: int) -> None:
        assert graph.check(lattice(case, batch, seed, levels, kinds), margin=-1) == batch

    check()


@pytest.mark.parametrize(("name", "case"), ALL)
def test_graph_module_and_loops_agree_on_continuous_cues(graph_of, name, case):
    graph = graph_of(name, case)
    decided = sum(graph.check(continuous(case, 3, seed), MARGIN.get(name, -1)) for seed in range(20))
    assert decided >= (54 if name in MARGIN else 60), "most inputs must be decided clearly"


@pytest.mark.parametrize(("name", "case"), ALL)
def test_graph_holds_standard_operators_of_fixed_shape(graph_of, name, case):
    model = onnx.load(graph_of(name, case).path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node} <= set(ALLOWED)
    assert {node.domain for node in model.graph.node} <= {""} and not model.functions
    assert fused_in_float64(graph_of(name, case).path) == []
    assert [item.version for item in model.opset_import if item.domain == ""] == [23]
    outputs = {item.name: item.type.tensor_type.shape.dim for item in model.graph.output}
    assert list(outputs) == ["keep_indices", "kept_rows"][: 1 + pruners.find_method(name).merges]
    assert all(shape[1].dim_value == case.keep for shape in outputs.values())
    assert all(shape[2].dim_value == WIDTH for key, shape in outputs.items() if key == "kept_rows")


@pytest.mark.parametrize(("name", "keep"), [("vispruner", 64), ("adaptprune", 57)])
def test_full_size_agrees(tmp_path, name, keep):
    case = Case((24, 24), keep)
    graph = Graph(name, case, tmp_path)
    for seed in range(2):
        assert graph.check(lattice(case, 1, seed, levels=200, kinds=12), margin=-1) == 1
        assert graph.check(continuous(case, 1, seed), MARGIN.get(name, -1)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "keep"), [("vispruner", 64), ("adaptprune", 57)])
def test_full_size_agrees_on_two_hundred_inputs(tmp_path, name, keep):
    case = Case((24, 24), keep)
    graph = Graph(name, case, tmp_path)
    decided = sum(graph.check(continuous(case, 1, seed), MARGIN.get(name, -1)) for seed in range(220))
    assert decided >= 200


# -- what the methods promise --------------------------------------------------------------------------------


def test_default_keep_counts_are_the_papers():
    counts = {name: pruners.find_method(name).default_keep(576) for name in METHODS}
    assert counts | {"fastv": 288, "vispruner": 64, "adaptprune": 57, "random": 64, "uniform": 64} == counts
    assert all(pruners.find_method(name).default_keep(1) == 1 for name in METHODS)


def test_random_is_fixed_per_seed_and_nested():
    make = functools.partial(pruners.find_method("random"), (6, 6))
    rows = torch.zeros(3, 36, 1)
    small, large, other = make(5)(image_features=rows), make(9)(image_features=rows), make(9, seed=1)
    assert set(small[0].tolist()) < set(large[0].tolist())
    assert (large == large[0]).all()
    assert not torch.equal(other(image_features=rows), large)


@pytest.mark.parametrize("grid", [(24, 24), (5, 7), (1, 9), (9, 1), (2, 31), (16, 12)])
def test_uniform_covers_the_grid_for_every_keep_count(grid):
    from vtp.export.pruners.uniform import spread

    count = grid[0] * grid[1]
    for keep in range(1, count + 1):
        kept = spread(grid, keep)
        assert kept == sorted(set(kept)) and len(kept) == keep
        assert kept[0] >= 0 and kept[-1] < count
        assert kept == REFERENCES["uniform"](grid, keep)[0]
    assert spread(grid, count) == list(range(count))


def test_uniform_is_well_spread():
    from vtp.export.pruners.uniform import spread

    for keep in (16, 32, 57, 64, 128, 192):
        kept = np.array([(place // 24, place % 24) for place in spread((24, 24), keep)])
        every = np.array([(y, x) for y in range(24) for x in range(24)])
        nearest = np.sqrt(((every[:, None] - kept[None]) ** 2).sum(-1)).min(1)
        assert nearest.max() <= 24 / np.sqrt(keep) + 0.5, (
            "no place is further than a cell away from a kept one"
        )


@pytest.mark.parametrize(("grid", "keep"), [((4, 5), 16), ((6, 6), 16), ((6, 6), 24), ((8, 8), 32)])
def test_vispruner_selects_the_published_set_where_that_runs(grid, keep):
    module = pruners.find_method("vispruner")(grid, keep)
    for seed in range(60):
        cues = lattice(Case(grid, keep), 1, seed, levels=30, kinds=12)
        given = {key: torch.from_numpy(cues[key]) for key in module.needs}
        wanted, _ = vispruner(grid, keep, *(cues[key][0] for key in module.needs), published=True)
        assert module(**given)[0].tolist() == wanted


def test_vispruner_works_where_the_published_code_raises():
    for grid, keep in [((5, 5), 10), ((4, 4), 1), ((3, 3), 4)]:
        cues = lattice(Case(grid, keep), 1, 0)
        module = pruners.find_method("vispruner")(grid, keep)
        with pytest.raises(ValueError, match="stops here"):
            vispruner(grid, keep, *(cues[key][0] for key in module.needs), published=True)
        assert module(**{key: torch.from_numpy(cues[key]) for key in module.needs}).shape == (1, keep)


@pytest.mark.parametrize("score", [0.0, 1e-45, 1e-38, 1.0])
def test_adaptprune_never_picks_twice(graph_of, score):
    case = Case((4, 6), 24)
    graph = graph_of("adaptprune", case)
    rows = np.ones((2, 24, WIDTH), np.float32)
    rows[1] = 0
    scores = np.full((2, 24), score, np.float32)
    graph.check({"attention_scores": scores, "keys": rows}, margin=np.inf)


def test_adaptprune_takes_the_lowest_places_when_nothing_speaks():
    module = pruners.find_method("adaptprune")((4, 6), 7)
    kept = module(attention_scores=torch.zeros(1, 24), keys=torch.zeros(1, 24, WIDTH))
    assert kept.tolist() == [list(range(7))]


def test_adaptprune_bands_equal_the_full_product():
    module = pruners.find_method("adaptprune")((17, 13), 5)
    keys = torch.randn(2, 221, WIDTH, generator=torch.Generator().manual_seed(0))
    full = torch.matmul(keys, keys.transpose(1, 2))
    near = module.nearness() > 0
    assert near.sum() < 221 * 221 / 2
    torch.testing.assert_close(module.products(keys)[:, near], full[:, near])


def test_batch_rows_are_independent(graph_of):
    for name in METHODS:
        case = ANY[1]
        graph = graph_of(name, case)
        cues = continuous(case, 3, seed=5)
        together = run_module(graph.module, cues)
        alone = [
            run_module(graph.module, {key: value[row : row + 1] for key, value in cues.items()})
            for row in range(3)
        ]
        kept, *rows = (np.concatenate(parts) for parts in zip(*alone, strict=True))
        assert np.array_equal(together[0], kept)
        for one, two in zip(together[1:], rows, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


# -- keep-counts and options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, -1, 17])
def test_keep_count_out_of_range_is_refused(keep):
    with pytest.raises(UsageError, match=r"keep-tokens .* choose 1 to 16"):
        pruners.find_method("fastv")((4, 4), keep)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vispruner", {"r": 1.5}, "outside 0 to 1"),
        ("vispruner", {"share": 1}, "no option 'share'; its options: r"),
        ("fastv", {"r": 1}, "no option 'r'; its options: none"),
        ("random", {"seed": -1}, "negative"),
        ("adaptprune", {"sigma_space": 0.0}, "sigma_space 0.0 is outside"),
        ("adaptprune", {"sigma_space": 1e9}, "sigma_space"),
        ("adaptprune", {"keys": "rotated"}, "choose plain or normed"),
    ],
)
def test_unfit_options_are_refused(name, options, words):
    with pytest.raises(UsageError, match=words) as refused:
        pruners.find_method(name)((4, 4), 2, **options)
    assert "\n" not in str(refused.value)


def test_option_strings_take_the_type_of_the_default():
    adaptprune = pruners.find_method("adaptprune")
    texts = ["radius=3", "keys = normed", "sigma_space=2.5"]
    assert pruners.parse_options(adaptprune, texts) == {"radius": 3.0, "keys": "normed", "sigma_space": 2.5}
    assert pruners.parse_options(pruners.find_method("random"), ["seed=12"]) == {"seed": 12}
    flag = type("Flag", (Pruner,), {"name": "flag", "options": {"on": False}})
    assert pruners.parse_options(flag, ["on=Yes"]) == {"on": True}


@pytest.mark.parametrize(
    ("name", "texts", "words"),
    [
        ("random", ["seed"], "not of the form name=value"),
        ("random", ["seed=1.5"], "seed takes a whole number"),
        ("random", ["seed=1", "seed=2"], "given twice"),
        ("adaptprune", ["radius=nan"], "radius takes a finite number"),
        ("adaptprune", ["radios=3"], "did you mean 'radius'"),
        ("fastv", ["r=1"], "its options: none"),
    ],
)
def test_bad_option_strings_are_refused_in_one_line(name, texts, words):
    with pytest.raises(UsageError, match=words) as refused:
        pruners.parse_options(pruners.find_method(name), texts)
    assert "\n" not in str(refused.value)


# -- the registry --------------------------------------------------------------------------------------------


def test_registry_lists_files_and_none():
    folder = Path(pruners.__file__).parent
    files = {file.stem for file in folder.glob("*.py")} - {
        "__init__",
        "base",
        "greedy",
        "merge",
        "ops",
        "registry",
        "site",
    }
    assert pruners.method_names() == ["none", *sorted(files)]
    assert {"random", "uniform", "fastv", "vispruner", "adaptprune"} <= files


@pytest.mark.parametrize("name", METHODS)
def test_every_method_declares_itself(name):
    method = pruners.find_method(name)
    assert method.name == name and pruners.check_method(method, name) is method
    assert method.__doc__ and pruners.resolve_method(name) is method
    pruners.parse_site(method.site)


def test_listing_imports_no_method():
    import subprocess
    import sys

    code = "import sys; from vtp.export import pruners; pruners.method_names(); " + (
        "sys.exit(any(f'vtp.export.pruners.{name}' in sys.modules for name in pruners.method_names()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_none_is_a_name_without_a_class():
    assert pruners.resolve_method("none") is None
    with pytest.raises(UsageError, match="no pruner"):
        pruners.find_method("none")


def test_unknown_method_suggests_the_nearest_and_lists_all():
    with pytest.raises(
        UsageError, match=r"unknown method 'visprunner'; did you mean 'vispruner'\?.*adaptprune"
    ):
        pruners.resolve_method("visprunner")
    with pytest.raises(UsageError, match="methods: none, adaptprune"):
        pruners.find_method("base")


@pytest.mark.parametrize("site", ["vision", "projector", "decoder", "decoder:1", "decoder:12"])
def test_sites_parse(site):
    kind, layer = pruners.parse_site(site)
    assert site == (kind if layer is None else f"{kind}:{layer}") == str(pruners.Site.parse(site))


@pytest.mark.parametrize(
    "site", ["", "tower", "decoder:", "decoder:0", "decoder:-1", "decoder:²", "vision:1"]
)
def test_other_sites_are_refused(site):
    with pytest.raises(UsageError, match="is not vision, projector, decoder:L with"):
        pruners.parse_site(site)


def test_a_site_of_several_layers_is_no_declaration():
    assert pruners.Site.parse("decoder:1,3") == pruners.Site("decoder", (1, 3))
    with pytest.raises(UsageError, match="is not vision"):
        pruners.Site.parse("decoder:3,1")
    with pytest.raises(UsageError, match=r"names several layers; declare site decoder .* sites\(\)"):
        pruners.parse_site("decoder:1,3")


MINE = """
from vtp.export.pruners.base import Pruner
from vtp.export.pruners import ops

class Mine(Pruner):
    name = "mine"
    site = "vision"
    needs = ("attention_scores",)

    def forward(self, attention_scores):
        return ops.raster(ops.top_k(attention_scores, self.keep))

class Text: pass
"""


def test_outside_method_loads(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    method = pruners.resolve_method(f"{file}:Mine")
    assert method is not None
    kept = method((2, 2), 2)(attention_scores=torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    assert kept.tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (("", ""), "Other", "has no class 'Other'; its pruners: Mine"),
        (("", ""), "Text", "not a subclass"),
        (('name = "mine"', 'name = "My Method"'), "Mine", "lower-case word"),
        (('name = "mine"', 'name = "none"'), "Mine", "lower-case word"),
        (('name = "mine"', ""), "Mine", "name is None"),
        (('site = "vision"', 'site = "decoder:0"'), "Mine", "L = 1 or more"),
        (('site = "vision"', ""), "Mine", "site ''"),
        (('("attention_scores",)', '("keys",)'), "Mine", "image_features, attention_scores"),
        (('("attention_scores",)', '"attention_scores"'), "Mine", "give a tuple"),
        (('("attention_scores",)', '("attention_scores", "attention_scores")'), "Mine", "twice"),
        (("def forward", "def forwards"), "Mine", "forward is missing"),
        (
            ('site = "vision"', 'site = "vision"; options = {"a": None}'),
            "Mine",
            "option a has",
        ),
        (('name = "mine"', "name ="), "Mine", "fails when run: SyntaxError"),
        (("class Text", "1 / 0\nclass Text"), "Mine", "fails when run: ZeroDivisionError"),
    ],
)
def test_outside_method_that_cannot_work_is_refused_in_one_line(tmp_path, change, name, words):
    file = tmp_path / "mine.py"
    file.write_text(MINE.replace(*change) if change[0] else MINE)
    with pytest.raises(UsageError, match=words) as refused:
        pruners.load_outside(f"{file}:{name}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("spec", ["mine.py", "mine.py:", "mine:Mine", "mine.py:Mi ne"])
def test_outside_spec_of_another_form_is_refused(spec):
    with pytest.raises(UsageError, match=r"not of the form FILE\.py:CLASS"):
        pruners.load_outside(spec)


def test_outside_file_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="does not exist"):
        pruners.resolve_method("./nowhere.py:Mine")
