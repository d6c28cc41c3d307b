"""What single methods promise beyond the agreement that test_pruners.py asks of all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vtp.engines.errors import UsageError
from vtp.export import pruners
from vtp.export.pruners import greedy, ops
from vtp.export.tower_cues import SCORES

from .compared import MARGIN, Case, Graph, continuous, lattice

SELECTING = ["fastervlm", "divprune", "scope", "holov", "dart", "hiprune", "otprune", "prunesid"]


def chosen(
    name: str, grid: tuple[int, int], keep: int, cues: dict[str, torch.Tensor], **options
) -> list[int]:
    module = pruners.find_method(name)(grid, keep, **options)
    return module(**{key: cues[key] for key in module.needs})[0].tolist()


def cues_of(rows: torch.Tensor, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same rows [N,C] under every name, for one picture."""
    names = ("image_features", "image_embeds", "hidden_states", "keys")
    return {**dict.fromkeys(names, rows.unsqueeze(0)), **dict.fromkeys(SCORES, scores.unsqueeze(0))}


@pytest.mark.parametrize(("name", "keep"), [("divprune", 32), ("holov", 64), ("dart", 64), ("scope", 3)])
def test_full_size_agrees(tmp_path, name, keep):
    case = Case((24, 24), keep)
    graph = Graph(name, case, tmp_path)
    assert graph.check(lattice(case, 1, seed=0, levels=200, kinds=12), margin=-1) == 1
    assert sum(graph.check(continuous(case, 1, seed), MARGIN.get(name, -1)) for seed in range(3)) >= 1


@pytest.mark.parametrize("count", [1, 255, 256, 300, 1100])
def test_products_of_all_pairs_are_multiplied_once(count):
    rows = torch.randn(2, count, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(ops.products(rows), torch.matmul(rows, rows.transpose(1, 2)))


@pytest.mark.parametrize("name", SELECTING)
def test_zeros_and_equal_tokens_give_k_places(name):
    for rows in (torch.zeros(20, 4), torch.ones(20, 4)):
        for scores in (torch.zeros(20), torch.ones(20)):
            kept = chosen(name, (4, 5), 7, cues_of(rows, scores))
            assert len(set(kept)) == 7 and kept == sorted(kept)


@pytest.mark.parametrize("name", ["divprune", "scope"])
def test_one_of_each_kind_before_any_twin(name):
    rows = torch.eye(6).repeat(3, 1) * torch.linspace(1, 2, 18).unsqueeze(1)
    assert chosen(name, (3, 6), 6, cues_of(rows, torch.ones(18))) == [0, 1, 2, 3, 4, 5]


def test_divprune_starts_with_the_loneliest_token():
    angles = torch.tensor([0.0, 0.1, 0.2, 2.0, 3.0, 3.1])
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert chosen("divprune", (1, 6), 1, cues_of(rows, torch.ones(6))) == [3]
    assert chosen("divprune", (1, 6), 2, cues_of(rows, torch.ones(6))) == [0, 3]


def test_farthest_never_picks_twice_among_duplicates():
    likeness = greedy.cosines(torch.ones(2, 9, 3))
    assert greedy.farthest(likeness, 9).sort(dim=1).values.tolist() == [list(range(9))] * 2


def test_scope_without_attention_covers_best():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert chosen("scope", (2, 2), 1, cues_of(rows, torch.tensor([0.1, 0.1, 0.1, 0.9])), alpha=0.0) == [0]
    assert chosen("scope", (2, 2), 1, cues_of(rows, torch.tensor([0.1, 0.1, 0.1, 0.9]))) == [3]
    assert chosen("scope", (2, 2), 2, cues_of(rows, torch.tensor([0.1, 0.1, 0.1, 0.9]))) == [0, 3]


def test_holov_deals_by_attention_and_fills_up_where_a_crop_is_full():
    scores = torch.tensor([0.0, 0.0, 0.0, 9.0, 9.0, 9.0, 1.0, 2.0, 3.0])
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((9, 4))).float()
    assert chosen("holov", (3, 3), 4, cues_of(rows, scores), crops=3) == [3, 4, 5, 8]
    assert chosen("holov", (3, 3), 5, cues_of(rows, scores), crops=3) == [3, 4, 5, 7, 8]
    assert chosen("holov", (3, 3), 3, cues_of(torch.zeros(9, 4), torch.ones(9)), crops=3) == [0, 3, 6]


def test_hiprune_keeps_the_cross_around_an_anchor():
    middle, last = torch.zeros(25), torch.linspace(0, 1, 25)
    middle[[7, 24]] = torch.tensor([2.0, 1.0])
    cues = {"middle_received": middle.unsqueeze(0), "received_scores": last.unsqueeze(0)}
    assert chosen("hiprune", (5, 5), 6, cues, alpha=0.8) == [2, 6, 7, 8, 12, 24]
    assert chosen("hiprune", (5, 5), 10, cues, alpha=1.0) == [2, 6, 7, 8, 12, 19, 21, 22, 23, 24]
    assert chosen("hiprune", (5, 5), 2, cues) == [23, 24]


def test_otprune_keeps_one_of_each_kind_and_the_longest_first():
    rows = torch.eye(4)[[0, 0, 1, 1, 2, 3]] * torch.tensor([1.0, 3, 1, 2, 1, 1]).unsqueeze(1)
    assert chosen("otprune", (1, 6), 4, cues_of(rows, torch.ones(6))) == [1, 3, 4, 5]


def test_otprune_of_narrow_embeddings_is_the_published_one_of_wide_ones_that_lie_alike():
    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    wide, scores = rows.repeat(1, 4096 // 16), torch.ones(40)
    published = chosen("otprune", (5, 8), 9, cues_of(wide, scores), gamma=0.01)
    assert chosen("otprune", (5, 8), 9, cues_of(rows, scores)) == published
    assert chosen("otprune", (5, 8), 9, cues_of(wide, scores)) == published
    assert chosen("otprune", (5, 8), 9, cues_of(rows, scores), gamma=0.01) != published


@pytest.mark.parametrize(("keep", "crops"), [(64, 16), (192, 5), (128, 8), (32, 32), (576, 1), (1, 576)])
def test_holov_takes_fewer_crops_the_more_it_keeps(keep, crops):
    assert pruners.find_method("holov")((24, 24), keep).crops == crops


def test_dart_deals_the_rest_to_its_pivots_in_the_order_of_their_norms():
    states = torch.eye(4)[[0, 1, 0, 1, 2, 3, 0, 1]]
    keys = torch.tensor([1.0, 3.0, 2.0, 0.5, 0.4, 0.3, 0.2, 0.1]).unsqueeze(1)
    cues = {"keys": keys.unsqueeze(0), "hidden_states": states.unsqueeze(0)}
    # 1, then 2 are pivots; 1 takes the lowest places unlike it, 0 and 4; 2 takes one unlike it, 3.
    assert chosen("dart", (2, 4), 5, cues, pivots=2) == [0, 1, 2, 3, 4]
    assert chosen("dart", (2, 4), 2, cues, pivots=8) == [1, 2]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("scope", {"alpha": -1.0}, "alpha -1.0 is outside 0 to 8"),
        ("holov", {"crops": 17}, "crops 17 is outside"),
        ("holov", {"alpha": -0.1}, "alpha -0.1 is outside"),
        ("hiprune", {"alpha": 1.5}, "alpha 1.5 is outside 0 to 1"),
        ("otprune", {"gamma": -1.0}, "gamma -1.0 is outside 0 to 1000"),
        ("prunesid", {"group": 0}, "group 0 is below 1"),
        ("dart", {"pivots": 0}, "pivots 0 is outside 1 to 16"),
        ("dart", {"keys": "rotated"}, "choose normed or plain"),
        ("divprune", {"r": 1}, "no option 'r'; its options: none"),
    ],
)
def test_unfit_options_are_refused(name, options, words):
    with pytest.raises(UsageError, match=words) as refused:
        pruners.find_method(name)((4, 4), 2, **options)
    assert "\n" not in str(refused.value)


def test_evs_keeps_still_frames_in_the_order_of_the_clip():
    """What did not change at all is equal to the last bit, so that ties decide and not rounding."""
    frame = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    still = cues_of(frame.repeat(4, 1), torch.ones(28))
    assert chosen("evs", (4, 7), 12, still) == list(range(12))
    moved = frame.repeat(4, 1)
    moved[23] = -moved[23]  # the last frame's third patch
    assert chosen("evs", (4, 7), 9, cues_of(moved, torch.ones(28))) == [*range(8), 23]


def test_evs_refuses_less_than_the_first_frame():
    with pytest.raises(
        UsageError, match=r"keep-tokens 6 is below the 7 patches of the first frame, which .* 7 to 28"
    ):
        pruners.find_method("evs")((4, 7), 6)
    assert pruners.picture_methods() == [name for name in pruners.method_names() if name != "evs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SELECTING)
def test_a_bundle_of_each_holds_against_torch(tmp_path, model_folder, name):
    from vtp.export.exporter import Request, export

    source = str(model_folder("gqa"))
    done = export(Request(tmp_path / "bundle", model=source, method=name, keep_tokens="3,6", verify="full"))
    assert (done.folder / "manifest.json").is_file()
