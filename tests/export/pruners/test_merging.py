"""What methods that merge promise beyond the agreement that test_pruners.py asks of all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtp.engines.errors import UsageError
from vtp.export import pruners
from vtp.export.pruners import merge
from vtp.export.pruners.apet import solve
from vtp.export.pruners.prumerge import centres
from vtp.export.pruners.visionzip import spaced
from vtp.export.pruners.vscan import windows
from vtp.export.tower_cues import SCORES

from ...oracles.numpy_merging import REFERENCES
from .compared import MARGIN, Case, Graph, continuous, lattice, run_module

MERGING = sorted(name for name in pruners.method_names()[1:] if pruners.find_method(name).merges)


def merged(
    name: str, grid: tuple[int, int], keep: int, cues: dict[str, torch.Tensor], **options
) -> tuple[list[int], torch.Tensor]:
    """Kept places and rows of one picture, whose cues come without a batch axis."""
    module = pruners.find_method(name)(grid, keep, **options)
    kept, rows = module(**{key: cues[key].unsqueeze(0) for key in module.needs})
    return kept[0].tolist(), rows[0]


def cues_of(count: int, width: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("image_features", "vision_keys", "image_embeds")
    rows = {name: torch.randn(count, width, generator=generator) for name in names}
    return {**rows, **{name: torch.rand(count, generator=generator) for name in SCORES}}


def test_every_method_that_merges_has_loops():
    assert sorted(REFERENCES) == MERGING


@pytest.mark.parametrize("name", MERGING)
def test_any_grid_any_keep_count_any_batch(name):
    """The module against the loops, without the cost of an export for every size."""

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(data=st.data(), height=st.integers(1, 6), width=st.integers(1, 7), batch=st.integers(1, 4))
    def check(data: st.DataObject, height: int, width: int, batch: int) -> None:
        keep = data.draw(st.integers(1, height * width))
        case = Case((height, width), keep)
        cues = lattice(case, batch, data.draw(st.integers(0, 999)), levels=5, kinds=4)
        module = pruners.find_method(name)(case.grid, keep)
        kept, rows = run_module(module, cues)
        for row in range(batch):
            wanted, _, values = REFERENCES[name](
                case.grid, keep, **{key: cues[key][row] for key in module.needs}
            )
            assert kept[row].tolist() == wanted
            np.testing.assert_allclose(rows[row], values, rtol=1e-5, atol=1e-5)

    check()


@pytest.mark.parametrize(("name", "keep"), [("visionzip", 64), ("prumerge", 64)])
def test_full_size_agrees(tmp_path, name, keep):
    case = Case((24, 24), keep)
    graph = Graph(name, case, tmp_path)
    assert graph.check(lattice(case, 1, seed=0, levels=200, kinds=12), margin=-1) == 1
    assert sum(graph.check(continuous(case, 1, seed), MARGIN[name]) for seed in range(3)) >= 1


@pytest.mark.parametrize("name", MERGING)
def test_zero_and_equal_keys_give_finite_rows(name):
    for keys in (torch.zeros(20, 6), torch.ones(20, 6)):
        cues = {**cues_of(20), "vision_keys": keys, "image_embeds": keys}
        cues |= {"image_features": keys} if name == "apet" else {}
        kept, rows = merged(name, (4, 5), 9, cues)
        assert len(set(kept)) == 9 and kept == sorted(kept)
        assert rows.isfinite().all()


@pytest.mark.parametrize("name", MERGING)
def test_rows_have_the_dtype_of_the_features(name):
    cues = {**cues_of(20), **dict.fromkeys(("image_features", "image_embeds"), torch.randn(20, 6).half())}
    assert merged(name, (4, 5), 9, cues)[1].dtype == torch.float16


# -- VisionZip -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "contextual"), [(1, 0), (6, 0), (7, 1), (32, 5), (64, 10), (128, 20), (192, 30)]
)
def test_visionzip_scales_the_published_split(keep, contextual):
    assert pruners.find_method("visionzip")((24, 24), keep).contextual == contextual


@pytest.mark.parametrize(
    ("count", "wanted", "places"), [(10, 3, [0, 3, 6]), (5, 5, [0, 1, 2, 3, 4]), (7, 0, [])]
)
def test_targets_are_evenly_spaced_among_the_tokens_left(count, wanted, places):
    assert spaced(count, wanted) == places


def test_visionzip_keeps_dominant_rows_and_adds_means_to_targets():
    features = torch.arange(12.0).reshape(6, 2)
    keys = torch.eye(2)[[0, 0, 1, 0, 1, 0]]
    scores = torch.tensor([0.1, 0.9, 0.1, 0.8, 0.1, 0.1])
    cues = {"image_features": features, "vision_keys": keys, "attention_scores": scores}
    # Left: 0 2 4 5; targets 0 and 4; 2 is like 4, 5 is like 0.
    kept, rows = merged("visionzip", (2, 3), 4, cues, contextual=0.5)
    assert kept == [0, 1, 3, 4]
    assert rows.tolist() == [(features[0] + features[5]).tolist(), [2, 3], [6, 7], [12, 14]]


def test_visionzip_averages_keys_over_heads():
    keys = torch.tensor([[3.0, 0, 0, 1], [0, 1, 0, 1], [1, 0, 0, 0], [1, 0, 0, 1]])
    module = pruners.find_method("visionzip")((2, 2), 2, heads=2)
    means = torch.nn.functional.normalize((keys[:, :2] + keys[:, 2:]) / 2, dim=1)
    torch.testing.assert_close(module.mean_keys(keys.unsqueeze(0))[0], means)


@pytest.mark.parametrize(
    ("width", "head"),
    [(384, 64), (768, 64), (1024, 64), (1152, 72), (1280, 80), (1408, 88), (1664, 104), (16, 16), (130, 65)],
)
def test_visionzip_reads_the_heads_of_known_towers_unless_told(width, head):
    module = pruners.find_method("visionzip")((1, 2), 1)
    assert module.mean_keys(torch.ones(1, 2, width)).shape == (1, 2, head)


def test_visionzip_refuses_heads_that_do_not_fit():
    with pytest.raises(UsageError, match="heads 5 does not divide the tower's width 96"):
        pruners.find_method("visionzip")((1, 2), 1, heads=5).mean_keys(torch.ones(1, 2, 96))


# -- PruMerge ------------------------------------------------------------------------------------------------


def test_prumerge_samples_the_published_places():
    assert centres(576, 72) == list(range(4, 575, 8))
    assert centres(576, 32) == list(range(9, 575, 18))
    assert centres(7, 7) == list(range(7)) and centres(7, 0) == []


def test_prumerge_fills_up_with_attended_tokens_where_a_sample_is_one():
    scores = torch.tensor([0.1, 0.9, 0.2, 0.3, 0.4, 0.8, 0.5, 0.0])
    cues = {**cues_of(8), "attention_scores": scores}
    # Attended 1 and 5; sampled 2 and 6.
    assert merged("prumerge", (2, 4), 4, cues)[0] == [1, 2, 5, 6]
    # Attended 5; sampled 1, 4 and 6.
    assert merged("prumerge", (2, 4), 4, cues, sampled=0.75)[0] == [1, 4, 5, 6]
    # Attended 1, 5 and 6; sampled 1, 4 and 6: 3, the next in attention, and 2 take the places left.
    assert merged("prumerge", (2, 4), 6, cues)[0] == [1, 2, 3, 4, 5, 6]


def test_prumerge_adds_what_neighbours_were_attended_to():
    features = torch.tensor([[1.0, 0], [0, 1], [2, 2], [4, 0]])
    keys = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    scores = torch.tensor([0.5, 0.25, 0.25, 0.75])
    cues = {"image_features": features, "vision_keys": keys, "attention_scores": scores}
    kept, rows = merged("prumerge", (2, 2), 2, cues, sampled=0.0, neighbours=1)
    assert kept == [0, 3]
    assert rows.tolist() == [[1, 0.25], [4.5, 0.5]]


def test_prumerge_keeps_a_quarter_by_default():
    assert pruners.find_method("prumerge").default_keep(576) == 144


# -- ApET and VScan ------------------------------------------------------------------------------------------


def test_apet_keeps_the_basis_and_what_it_cannot_make():
    features = torch.tensor([[1.0, 0, 0], [4, 0, 0], [2, 0, 0], [3, 0, 0], [3, 0, 2.5]])
    kept, rows = merged("apet", (1, 5), 3, {"image_features": features}, basis=2)
    # The basis: 0, and 4, farther from it than 1. The others lie along 0, and join none: 1 has the error of
    # 2 and 3 within rounding of the ridge, but is the longest.
    assert kept == [0, 1, 4]
    assert rows[[0, 2]].tolist() == features[[0, 4]].tolist()


def test_the_basis_goes_on_where_tokens_are_equal():
    kept, rows = merged("apet", (2, 3), 4, {"image_features": torch.ones(6, 2)}, basis=3)
    assert kept == [0, 1, 2, 3] and rows.isfinite().all()


def test_linear_equations_are_solved():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    matrix, right = half @ half.transpose(1, 2), torch.randn(2, 5, 9, generator=generator).double()
    torch.testing.assert_close(solve(matrix, right), torch.linalg.solve(matrix, right))


def test_vscan_gives_every_window_its_share_and_averages_the_rest():
    early, late = torch.zeros(16), torch.zeros(16)
    early[[0, 3, 12, 15]], late[[5, 6]] = 1.0, torch.tensor([2.0, 1.0])
    rows = torch.eye(6)[[0, 0, 1, 1, 0, 4, 5, 1, 2, 2, 3, 3, 2, 2, 3, 3]]
    cues = {"image_embeds": rows, "early_scores": early, "attention_scores": late}
    kept, made = merged("vscan", (4, 4), 6, cues, window=2, local=0.7)
    assert kept == [0, 3, 5, 6, 12, 15]
    torch.testing.assert_close(made, torch.eye(6)[[0, 1, 4, 5, 2, 3]])
    assert windows((3, 2), 2) == [[0, 1, 2, 3], [4, 5]]


# -- shared pieces -------------------------------------------------------------------------------------------


def test_places_left_and_raster_order():
    chosen = torch.tensor([[5, 0, 3], [1, 2, 4]])
    assert merge.places_left(chosen, 6).tolist() == [[1, 2, 4], [0, 3, 5]]
    places, rows = merge.in_raster_order(chosen, chosen.unsqueeze(2).float())
    assert places.tolist() == rows[:, :, 0].tolist() == [[0, 3, 5], [1, 2, 4]]


def test_of_equal_centres_the_first_takes_the_row():
    rows = torch.eye(2)[[0, 1]].unsqueeze(0)
    assert merge.likest(rows, torch.eye(2)[[1, 0, 0, 1]].unsqueeze(0))[0].tolist() == [
        [0, 1],
        [1, 0],
        [0, 0],
        [0, 0],
    ]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("visionzip", {"contextual": 1.0}, "contextual 1.0 is outside 0 to below 1"),
        ("visionzip", {"heads": -1}, "heads -1 is negative"),
        ("apet", {"basis": 0}, "basis 0 is below 1"),
        ("vscan", {"window": 0}, "window 0 is below 1"),
        ("vscan", {"local": 1.5}, "local 1.5 is outside 0 to 1"),
        ("prumerge", {"sampled": 1.5}, "sampled 1.5 is outside 0 to 1"),
        ("prumerge", {"neighbours": -1}, "neighbours -1 is negative"),
    ],
)
def test_unfit_options_are_refused(name, options, words):
    with pytest.raises(UsageError, match=words) as refused:
        pruners.find_method(name)((4, 4), 2, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("model", ["gqa", "siglip"])
def test_a_bundle_of_each_holds_against_torch(tmp_path, model_folder, model, name):
    from vtp.export.exporter import Request, export

    source = str(model_folder(model))
    done = export(Request(tmp_path / "bundle", model=source, method=name, keep_tokens="3,9", verify="full"))
    assert (done.folder / "manifest.json").is_file()
