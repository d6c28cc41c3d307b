"""Every method: exported graph = torch module = numpy loops, index for index.

Rows of methods that merge are compared as well. tests/conftest.py says which graphs are of the long tail.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtp.export import pruners

from ...oracles.fusing import fused_in_float64
from ...oracles.numpy_pruners import vispruner
from .compared import (
    ALL,
    ALLOWED,
    ANY,
    MARGIN,
    METHODS,
    REFERENCES,
    WIDTH,
    Case,
    Graph,
    Module,
    continuous,
    lattice,
    run_module,
)


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


# -- the three agree -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_numpy_reference(name):
    assert name in REFERENCES, (
        f"method {name} has no loops to be held against: write them in tests/oracles/numpy_pruners_more.py "
        "(numpy_merging.py if it merges rows, numpy_text.py if it reads the prompt), enter them in "
        "REFERENCES there, and in MARGINS if engines round its numbers differently. CONTRIBUTING.md, Add a "
        "pruner, step 2, says what they return and how to run one's own tests alone"
    )


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
def test_module_and_loops_agree(name, case):
    """Every case, without a graph; the graphs of some are compared in the long tail only."""
    module = Module(name, case)
    for seed in range(5):
        assert module.check(lattice(case, 2, seed, levels=1 + 4 * seed, kinds=1 + 3 * seed), margin=-1) == 2
    decided = sum(module.check(continuous(case, 3, seed), MARGIN.get(name, -1)) for seed in range(5))
    assert decided >= 13


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


def test_batch_rows_are_independent():
    for name in METHODS:
        case = ANY[1]
        module = Module(name, case).module
        cues = continuous(case, 3, seed=5)
        together = run_module(module, cues)
        alone = [
            run_module(module, {key: value[row : row + 1] for key, value in cues.items()}) for row in range(3)
        ]
        kept, *rows = (np.concatenate(parts) for parts in zip(*alone, strict=True))
        assert np.array_equal(together[0], kept)
        for one, two in zip(together[1:], rows, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
