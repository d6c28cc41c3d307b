"""What the methods that look at the question promise beyond what test_pruners.py asks of all methods."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vtp.engines.errors import UsageError
from vtp.export import pruners
from vtp.export.pruners import greedy

from ...oracles import numpy_text
from .compared import MARGIN, Case, Graph, continuous, lattice

STAGED = ["pyramiddrop", "sparsevlm"]


@pytest.mark.parametrize(("name", "keep"), [("cdpruner", 16), ("pyramiddrop", 72), ("sparsevlm", 60)])
def test_full_size_agrees(tmp_path, name, keep):
    case = Case((24, 24), keep)
    graph = Graph(name, case, tmp_path)
    assert graph.check(lattice(case, 1, seed=0, levels=200, kinds=12), margin=-1) == 1
    assert sum(graph.check(continuous(case, 1, seed), MARGIN.get(name, -1)) for seed in range(3)) >= 1


# -- several sites -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGED)
@pytest.mark.parametrize("layers", [4, 5, 6, 7, 13, 24, 28, 32, 40])
@pytest.mark.parametrize("count", [1, 2, 7, 64, 575, 576, 577, 2880])
def test_sites_ascend_and_counts_fall_to_k(name, layers, count):
    method = pruners.find_method(name)
    for keep in {1, count, count // 2 or 1, method.default_keep(count), max(1, count - 1)}:
        places, counts = zip(*method.sites(layers, count, keep, method.options), strict=True)
        assert places[0] >= 1 and places[-1] <= layers - 1
        assert list(places) == sorted(set(places))
        assert count >= counts[0] and list(counts) == sorted(counts, reverse=True) and counts[-1] == keep


@pytest.mark.parametrize("name", STAGED)
def test_a_shallow_decoder_is_refused_in_one_line(name):
    with pytest.raises(UsageError, match=r"at least 4 layers, not 3") as refused:
        pruners.find_method(name).sites(3, 16, 4, {})
    assert "\n" not in str(refused.value)


def test_pyramiddrop_halves_as_published_and_falls_evenly_otherwise():
    sites = pruners.find_method("pyramiddrop").sites
    assert sites(32, 576, 72, {}) == ((8, 288), (16, 144), (24, 72))
    assert sites(24, 583, 72, {}) == ((6, 291), (12, 145), (18, 72))
    assert sites(32, 1000, 1, {}) == ((8, 100), (16, 10), (24, 1))
    assert sites(32, 576, 576, {}) == ((8, 576), (16, 576), (24, 576))


def test_sparsevlm_keeps_the_published_counts_and_interpolates_between_them():
    sites = pruners.find_method("sparsevlm").sites
    for counts in [(300, 200, 118), (238, 108, 60), (246, 54, 28), (66, 34, 20)]:
        assert sites(32, 576, counts[2], {}) == tuple(zip((3, 7, 16), counts, strict=True))
        doubled = tuple(2 * count for count in counts)
        assert sites(32, 1152, doubled[2], {}) == tuple(zip((3, 7, 16), doubled, strict=True))
    assert sites(32, 576, 24, {}) == ((3, 156), (7, 44), (16, 24))  # half-way between the last two lists
    assert sites(24, 576, 89, {}) == ((2, 269), (5, 154), (12, 89))
    assert sites(32, 576, 1, {}) == ((3, 3), (7, 1), (16, 1))


@pytest.mark.parametrize("name", STAGED)
def test_a_later_site_takes_a_row_of_tokens(name):
    module = pruners.find_method(name)((1, 11), 4)
    cues = continuous(Case((1, 11), 4), 1, seed=0)
    kept = module(**{key: torch.from_numpy(cues[key]) for key in module.needs})
    assert kept.shape == (1, 4)


# -- cdpruner ------------------------------------------------------------------------------------------------


def cdpruner(keep: int, rows: torch.Tensor, texts: torch.Tensor, after: list[int], **options) -> list[int]:
    module = pruners.find_method("cdpruner")((1, len(rows)), keep, **options)
    mask = torch.tensor([after]).float()
    return module(image_embeds=rows[None], text_embeds=texts[None], text_mask=mask)[0].tolist()


def test_cdpruner_is_diverse_first_and_relevant_among_equals():
    rows = torch.eye(4)[[0, 0, 1, 1, 2, 2]]
    texts = torch.eye(4)[[1, 3]]
    # Only the second text is asked: nothing is like it, so that diversity alone decides.
    assert cdpruner(3, rows, texts, [0, 1]) == [0, 2, 4]
    # The first text is like token 2; a second of its kind adds nothing, and no other token is relevant.
    assert cdpruner(1, rows, texts, [1, 0]) == [2]
    assert cdpruner(3, rows, texts, [1, 0], relevance="unlike") == [0, 1, 4]


def test_cdpruner_reads_all_text_if_none_follows_and_does_without_any():
    rows, texts = torch.eye(4)[[0, 1, 2, 2]], torch.eye(4)[[2]]
    assert cdpruner(1, rows, texts, [0]) == cdpruner(1, rows, texts, [1]) == [2]
    assert cdpruner(3, rows, torch.zeros(1, 4), [1]) == [0, 1, 2]
    assert cdpruner(3, torch.zeros(4, 4), texts, [1]) == [0, 1, 2]


def test_volume_equals_the_determinant_of_every_choice():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 12, 6, generator=generator)
    likeness = greedy.cosines(rows)
    weights = torch.rand(1, 12, generator=generator, dtype=torch.float64)
    kernel = weights.sqrt()[0, :, None] * likeness[0].double() * weights.sqrt()[0]
    picks = greedy.volume(likeness, weights, 5)[0].tolist()
    for count in range(5):
        before = picks[:count]
        grown = {
            place: float(torch.linalg.det(kernel[[*before, place]][:, [*before, place]]))
            for place in range(12)
            if place not in before
        }
        assert picks[count] == max(grown, key=lambda place: grown[place])


@pytest.mark.parametrize("exact", [True, False])
def test_cdpruner_keeps_each_token_once_past_the_width_of_the_embeddings(exact):
    """What the picks span explains the rest: there, rounding must not be taken for something new."""
    module = pruners.find_method("cdpruner")((1, 120), 100)
    module.exact = exact
    rows = torch.rand(2, 120, 16, generator=torch.Generator().manual_seed(0))
    kept = module(rows, torch.rand(2, 3, 16), torch.ones(2, 3))
    assert all(len(set(row)) == 100 for row in kept.tolist())


def test_cdpruner_in_float32_chooses_as_in_float64():
    """For engines without float64."""
    cues = {key: torch.from_numpy(value) for key, value in continuous(Case((8, 8), 12), 2, seed=1).items()}
    module = pruners.find_method("cdpruner")((8, 8), 12)
    given = {key: cues[key] for key in module.needs}
    exact = module(**given)
    module.exact = False
    assert torch.equal(module(**given), exact)


# -- sparsevlm -----------------------------------------------------------------------------------------------


def sparsevlm(keep: int, cues: dict[str, torch.Tensor], **options) -> list[int]:
    count = cues["image_embeds"].shape[0]
    module = pruners.find_method("sparsevlm")((1, count), keep, **options)
    return module(**{key: value.unsqueeze(0) for key, value in cues.items()})[0].tolist()


def plain_cues(texts: int, count: int, heads: int = 2) -> dict[str, torch.Tensor]:
    return {
        "text_attention": torch.zeros(heads, texts, count),
        "text_gravity": torch.ones(texts, count),
        "image_embeds": torch.zeros(count, 4),
        "text_embeds": torch.zeros(texts, 4),
        "text_mask": torch.ones(texts),
    }


def test_sparsevlm_hears_only_raters():
    cues = plain_cues(texts=3, count=5)
    cues["image_embeds"][:, 0] = 1
    cues["text_embeds"][1, 0] = 3  # the picture is like this text
    cues["text_attention"][:, 1, 4] = 0.1
    cues["text_attention"][:, 2, 0] = 0.9
    assert sparsevlm(1, cues) == [4]
    cues["text_embeds"][:] = 0  # all alike: all rate
    assert sparsevlm(1, cues) == [0]
    cues["text_mask"][2] = 0  # in front of the picture
    assert sparsevlm(1, cues) == [4]


def test_sparsevlm_takes_the_place_out_of_attention_and_hears_the_loudest_heads():
    cues = plain_cues(texts=1, count=3, heads=4)
    cues["text_attention"][0, 0] = torch.tensor([0.2, 0.3, 0.1])
    assert sparsevlm(1, cues) == [1]
    cues["text_gravity"][0] = torch.tensor([0.5, 1.0, 1.0])
    assert sparsevlm(1, cues) == [0]
    cues["text_gravity"][0, 1] = 0.0  # counts as 1
    assert sparsevlm(1, cues) == [0]
    cues["text_attention"][1:, 0, 2] = 0.25  # three quiet heads
    assert sparsevlm(1, cues) == [0]
    assert sparsevlm(1, cues, heads=9) == [2]


@pytest.mark.parametrize(("heads", "priority"), [(32, 14), (16, 7), (28, 12), (14, 6), (2, 1), (1, 1)])
def test_sparsevlm_scales_the_number_of_its_heads(heads, priority):
    assert pruners.find_method("sparsevlm")((2, 2), 1).priority_heads(heads) == priority


@pytest.mark.parametrize("name", ["cdpruner", *STAGED])
def test_zeros_and_equal_tokens_keep_the_lowest_places(name):
    module = pruners.find_method(name)((3, 4), 5)
    for fill in (0.0, 1.0):
        cues = lattice(Case((3, 4), 5), 2, seed=0)
        given = {key: torch.full(cues[key].shape, fill) for key in module.needs}
        assert module(**given).tolist() == [list(range(5))] * 2


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cdpruner", {"relevance": "very"}, "choose like or unlike"),
        ("sparsevlm", {"heads": -1}, "heads -1 is negative"),
        ("pyramiddrop", {"ratio": 0.5}, "no option 'ratio'; its options: none"),
    ],
)
def test_unfit_options_are_refused(name, options, words):
    with pytest.raises(UsageError, match=words) as refused:
        pruners.find_method(name)((4, 4), 2, **options)
    assert "\n" not in str(refused.value)


def test_default_keep_counts_are_the_papers():
    counts = {name: pruners.find_method(name).default_keep(576) for name in ("cdpruner", *STAGED)}
    assert counts == {"cdpruner": 64, "pyramiddrop": 72, "sparsevlm": 118}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort", "jetpack6"])
@pytest.mark.parametrize("name", ["cdpruner", *STAGED])
def test_a_bundle_of_each_holds_against_torch(tmp_path, model_folder, name, target):
    from vtp.export.exporter import Request, export

    wish = Request(
        tmp_path / "bundle",
        model=str(model_folder("four")),
        method=name,
        keep_tokens="3,6",
        target=target,
        dtype="float32",
        verify="full",
    )
    done = export(wish)
    assert (done.folder / "manifest.json").is_file()


def test_sparsevlm_chooses_raters_by_the_whole_picture_at_every_site():
    """Fewer tokens arrive at a later site, but all of the picture's choose the raters."""
    rng = np.random.default_rng(5)
    image, text = rng.standard_normal((2, 30, 8)), rng.standard_normal((2, 5, 8))
    cues = {
        "text_attention": rng.random((2, 6, 5, 12)) ** 3,
        "text_gravity": rng.uniform(0.5, 1.5, (2, 5, 12)),
        "image_embeds": image,
        "text_embeds": text,
        "text_mask": np.ones((2, 5)),
    }
    cues = {name: cue.astype(np.float32) for name, cue in cues.items()}
    module = pruners.find_method("sparsevlm")((1, 12), 4)
    kept = module(**{name: torch.from_numpy(cue) for name, cue in cues.items()}).tolist()
    for row in range(2):
        wanted, _ = numpy_text.sparsevlm((1, 12), 4, **{name: cue[row] for name, cue in cues.items()})
        assert kept[row] == wanted
