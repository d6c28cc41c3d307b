"""--then: what a method kept behind the tower is pruned once more inside the decoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vtp.calib.baselines.random_choice import why_not
from vtp.calib.keep.report import finer
from vtp.engines import UsageError, VtpError
from vtp.engines.tensorrt.library import INSTALL, build_engine, refused_nodes
from vtp.export import cli
from vtp.export.exporter import export
from vtp.export.hub.card import card
from vtp.export.layouts.transformers_js import served
from vtp.export.plan.then import parse_then
from vtp.export.plan.then import served as methods
from vtp.export.pruners import find_method
from vtp.export.request import Request
from vtp.export.verify.reference import reference_generate
from vtp.runtime import NO_PICTURE, Pipeline
from vtp.runtime.bundle.folder import MANIFEST, open_bundle
from vtp.runtime.bundle.memory import bundle_memory
from vtp.runtime.commands.build import profile_of
from vtp.runtime.hub.names import HubName
from vtp.runtime.scheduler import Scheduler

from ...models.tiny import pixels, tiny_llava
from ...models.tiny_gemma import save_gemma, tiny_gemma3
from ...models.tiny_gemma4 import save_gemma4
from ...models.tiny_lfm2 import save_lfm2
from ...models.tiny_qwen import save_qwen
from ...models.tiny_split import save_idefics3
from ...models.tiny_video import save_onevision
from ...once import Once
from ...oracles import numpy_merging
from ...oracles.joining_rows import check_slots
from ...oracles.tensorrt_10_3 import refused
from ..pruners.test_trtrtx import ENGINE, MISSING
from .test_reference import GRID, IDS, IMAGE, assert_close, embed, masked_logits

LAYER, LAYERS = 2, 4
WISHES: dict[str, Any] = {
    "method": "fastervlm",
    "keep_tokens": "6,12",
    "then": f"pyramiddrop:{LAYER}",
    "then_options": ["share=0.5"],
    "max_length": 128,
}


@pytest.fixture(scope="module")
def bundle(once: Once, model_folder: Callable[[str], Path]) -> Path:
    """Keeps 6 or 12 of 16 tokens, and half of them from layer 2 of 4 on; verified."""
    return once.bundle(model_folder("four"), **WISHES)


# -- the reference -------------------------------------------------------------------------------------------


def cut_prompt(model: Any, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt's embeddings with the visual tokens `keep` alone, and their places in it."""
    stay = torch.cat([(IDS[0] != 4).nonzero().flatten(), IMAGE[keep]]).sort().values
    return embed(model)[:, stay], torch.searchsorted(stay, IMAGE[keep])


def test_two_cuts_are_the_first_one_and_a_mask_from_the_layer_on() -> None:
    """transformers reads the first cut's prompt; from layer 2 on it does not see what the second one dropped,
    which is what its own attention in layer 2 says."""
    model = tiny_llava()
    model.set_attn_implementation("eager")
    first = find_method("vispruner")(GRID, 8)
    second = parse_then(f"pyramiddrop:{LAYER}", ["share=0.5"])
    assert second is not None
    once = reference_generate(model, first, IDS, pixels(), 1).keep_indices
    answer = reference_generate(model, [first, second.pruner(8, LAYERS)], IDS, pixels(), 20)
    prompt, places = cut_prompt(model, once)
    with torch.no_grad():
        out = model.model.language_model(inputs_embeds=prompt, output_attentions=True, use_cache=False)
        scores = out.attentions[LAYER][0, :, -1].mean(dim=0)[places]
        kept = sorted(scores.argsort(descending=True)[:4].tolist())
        assert answer.keep_indices.tolist() == once[kept].tolist()
        new = model.model.language_model.embed_tokens(torch.tensor([answer.token_ids]))
        dropped = places[[place for place in range(8) if place not in kept]]
        logits = masked_logits(model, torch.cat([prompt, new], dim=1), dropped)[prompt.shape[1] - 1 : -1]
    assert_close(answer.step_logits, list(logits))
    length = prompt.shape[1] + 19
    assert answer.cache_lengths == [length, length, length - 4, length - 4]


def test_merging_inside_the_decoder_is_the_loops_on_its_hidden_states() -> None:
    """apet as a second cut: transformers' layers 2 and 3 go on from the rows that the loops make."""
    model = tiny_llava()
    first = find_method("uniform")(GRID, 9)
    second = parse_then(f"apet:{LAYER}", ["basis=2", "share=0.5"])
    assert second is not None
    pruner = second.pruner(9, LAYERS)
    once = reference_generate(model, first, IDS, pixels(), 1).keep_indices
    answer = reference_generate(model, [first, pruner], IDS, pixels(), 1)
    prompt, places = cut_prompt(model, once)
    text = model.model.language_model
    with torch.no_grad():
        out = text(inputs_embeds=prompt, output_hidden_states=True, use_cache=False)
        hidden = out.hidden_states[LAYER]
        kept, margin, rows = numpy_merging.apet((1, 9), 5, hidden[0, places].numpy(), basis=2)
        assert margin > 1e-5 and answer.keep_indices.tolist() == once[kept].tolist()
        stay = torch.ones(hidden.shape[1], dtype=torch.bool)
        stay[places] = False
        stay[places[kept]] = True
        hidden = hidden.index_copy(1, places[kept], torch.from_numpy(rows).float()[None])[:, stay]
        turns = text.rotary_emb(hidden, stay.nonzero().T)
        mask = torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        model.set_attn_implementation("eager")
        for layer in text.layers[LAYER:]:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=turns)
        logits = model.lm_head(text.norm(hidden[0, -1]))
    assert_close(answer.step_logits, [logits])


def test_the_reference_takes_one_picture() -> None:
    schedule = [find_method("uniform")(GRID, 4), parse_then("fastv:2").pruner(4, LAYERS)]  # type: ignore[union-attr]
    with pytest.raises(VtpError, match="site decoder:2 takes one picture per prompt, not 2"):
        reference_generate(tiny_llava(), schedule, IDS, [pixels(), pixels(seed=1)])


# -- bundles -------------------------------------------------------------------------------------------------


def test_the_manifest_tells_of_both_cuts(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    then = manifest.method.then
    assert then is not None and manifest.method.site == "vision" and manifest.visual.keep == [6, 12]
    assert (then.name, then.layer, then.keep) == ("pyramiddrop", LAYER, [3, 6])
    caches = {file: (kv.layers, kv.capacity) for file, graph in manifest.graphs.items() if (kv := graph.kv)}
    assert caches == {"decoder_head.onnx": ([0, 1], 128 - 4), "decoder.onnx": ([2, 3], 128 - 10)}
    found = {keep: case["equal"] for keep, case in manifest.parity["generation"].items()}
    assert found == {"6": 16, "12": 16}
    assert {
        "pruner_1_6.onnx",
        "pruner_2_6.onnx",
        "pruner_1_12.onnx",
        "pruner_2_12.onnx",
    } <= manifest.graphs.keys()


def test_answers_tell_of_both_cuts(bundle: Path, picture: Image.Image, cpu_engine: str) -> None:
    with Pipeline.load(bundle, cpu_engine, 1) as pipe:
        for keep in (6, 12):
            result = pipe.generate(picture, "what is it ?", keep_tokens=keep, max_new_tokens=4)
            assert result.visual_tokens == (16, keep) and len(result.kept) == keep
            then = result.then
            assert then is not None and (then["name"], then["layer"], then["tokens"]) == (
                "pyramiddrop",
                2,
                keep // 2,
            )
            assert len(then["kept"]) == keep // 2 and set(then["kept"]) < set(result.kept)
            assert result.to_json()["then"] == then
            assert {"pruner_1", "pruner_2", "decoder_head"} <= set(result.timings.stages)
        assert pipe.generate(NO_PICTURE, "what is it ?", max_new_tokens=2).then is None
        with pytest.raises(UsageError, match="one picture"):
            pipe.generate([picture, picture], "what is it ?")


def test_the_second_cut_reads_the_question(bundle: Path, picture: Image.Image) -> None:
    """The first one does not, so that the vision feature cache serves every question."""
    questions = ["what is it ?", "the red star on the left of two blue circles", "0123456789"]
    with Pipeline.load(bundle, "ort-cpu", 1, vision_feature_cache=1) as pipe:
        found = [pipe.generate(picture, one, keep_tokens=12, max_new_tokens=3) for one in questions]
    assert "pruner_1" in found[1].timings.reused_stages
    assert len({tuple(one.kept) for one in found}) == 1
    assert len({tuple(one.then["kept"]) for one in found if one.then}) > 1
    with Pipeline.load(bundle, "ort-cpu", 1) as pipe:
        fresh = [pipe.generate(picture, one, keep_tokens=12, max_new_tokens=3) for one in questions]
    assert [(one.token_ids, one.then) for one in fresh] == [(one.token_ids, one.then) for one in found]


def test_batches_and_shared_steps_say_what_is_said_alone(bundle: Path, picture: Image.Image) -> None:
    """Rows of unequal length, and prompts that come and go in the rows of both caches."""
    questions = ["what ?", "how many circle is the red star in this picture ?"]
    pictures = [picture, picture.rotate(90)]
    with Pipeline.load(bundle, "ort-cpu", 1) as pipe:
        asked = list(zip(pictures, questions, strict=True))
        alone = [pipe.generate(*pair, max_new_tokens=8) for pair in asked]
        together = pipe.generate_batch(pictures, questions, max_new_tokens=8)
    assert [(one.token_ids, one.then) for one in together] == [(one.token_ids, one.then) for one in alone]
    with Scheduler(Pipeline.load(bundle, "ort-cpu", 1), slots=2) as scheduler:
        tickets = [scheduler.submit(*pair, max_new_tokens=8) for pair in asked]
        said = [ticket.result() for ticket in tickets]
    assert [(one.token_ids, one.then) for one in said] == [(one.token_ids, one.then) for one in alone]
    check_slots(bundle, "ort-cpu", (28, 28))


def test_a_prompt_is_never_read_on_from_the_one_before(bundle: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--then pyramiddrop, which chooses inside the decoder.*without --then"
    ):
        Pipeline.load(bundle, "ort-cpu", 1, prefix_caching=True)


def test_memory_is_told_for_what_each_part_reads(bundle: Path) -> None:
    """With fewer tokens behind the tower and behind the cut, both parts of the decoder need less."""
    opened = open_bundle(bundle)
    some, most = (
        {stage.file: stage.activations for stage in bundle_memory(opened, "ort-cpu", keep).stages}
        for keep in (6, 12)
    )
    for file in ("decoder_head.onnx", "decoder.onnx"):
        assert some[file] < most[file]


def test_a_manifest_whose_counts_do_not_fit_is_refused(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "copy"))
    data = json.loads((folder / MANIFEST).read_text())
    for keep in ([3], [3, 13], [0, 6]):
        data["method"]["then"]["keep"] = keep
        (folder / MANIFEST).write_text(json.dumps(data))
        with pytest.raises(VtpError, match="then does not fit the keep-counts"):
            open_bundle(folder)


def test_what_is_said_beside_the_bundle(bundle: Path) -> None:
    """The model card, the line for a finer grid, and why no random choice is compared with."""
    opened = open_bundle(bundle)
    manifest = opened.manifest
    assert "3 or 6 go on from decoder layer 2 on, chosen by pyramiddrop" in card(manifest, HubName("me/it"))
    assert "--then pyramiddrop:2 --then-option share=0.5" in finer(manifest, [6, 12], 12)
    assert why_not(manifest, 6) == "pyramiddrop chooses inside the decoder among what fastervlm kept"
    assert "then pyramiddrop: 6 → 3, 12 → 6 before decoder layer 2" in cli._report(opened, bundle)
    assert cli._summary(opened)["then"] == {"name": "pyramiddrop", "layer": 2, "keep_tokens": [3, 6]}
    with pytest.raises(UsageError, match=r"runs the decoder as one graph, and --then pyramiddrop drops"):
        served.check_manifest(manifest, bundle)


SLOW_WISHES: list[dict[str, Any]] = [
    {"method": "vscan", "then": "pyramiddrop"},
    {"method": "apet", "then": "apet:1", "then_options": ["basis=2", "share=0.6"]},
    {"method": "cdpruner", "then": "dart:3", "then_options": ["pivots=2"]},
    {"method": "divprune", "then": "fastv:2", "method_options": ["positions=original"]},
    {"method": "visionzip", "then": "pyramiddrop:1", "dtype": "float16"},
    {"method": "vispruner", "then": "apet:2", "dtype": "float16", "then_options": ["basis=2"]},
    {"method": "vispruner", "then": "fastv:2", "target": "tensorrt"},
    {"method": "vispruner", "then": "apet:2", "target": "jetpack6", "then_options": ["basis=2"]},
    {"method": "fastervlm", "then": "pyramiddrop:2", "restore": True},
    {"method": "vispruner", "then": "pyramiddrop:2", "verify": "layers"},
    {"method": "vispruner", "then": "fastv:2", "tower": "tome:1"},
]


@pytest.mark.slow
@pytest.mark.parametrize("wishes", SLOW_WISHES, ids=lambda wishes: "-".join(map(str, wishes.values())))
def test_bundles_are_verified_against_torch(once, model_folder, wishes) -> None:
    """Every method that can be second, both positions, targets, half precision, and what goes beside it."""
    folder = once.bundle(model_folder("four"), keep_tokens="5,9", max_length=128, **wishes)
    for case in open_bundle(folder).manifest.parity["generation"].values():
        assert case["equal"] == case["tokens"] > 1


def save_gemma_3(path: Path) -> Any:
    return save_gemma(path, tiny_gemma3())


def save_qwen_3(path: Path) -> Any:
    return save_qwen(path, "qwen3_vl", seed=4, layers=4, depth=4)


def save_gemma_4(path: Path) -> Any:
    return save_gemma4(path, "small")


def save_deep_idefics(path: Path) -> Any:
    return save_idefics3(path, layers=4)


APET = {"then": "apet:1", "then_options": ["basis=1"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save", "wishes"),
    [
        (save_deep_idefics, {"image_size": (56, 56), "then": "pyramiddrop:1"}),
        (save_deep_idefics, {"image_size": (56, 56), **APET}),
        (save_deep_idefics, {"image_size": (28, 56), "share": "tile", "then": "fastv:2"}),
        (save_qwen_3, {"image_size": (32, 48), "then": "pyramiddrop:1"}),
        (save_qwen_3, {"image_size": (32, 48), **APET}),
        (save_gemma_3, {"then": "fastv:2"}),
        (save_gemma_4, {"keep_tokens": "20", **APET}),
        (save_lfm2, {"image_size": (32, 48), **APET}),
        (save_onevision, {"frames": 3, "method": "evs", "keep_tokens": "9", "then": "pyramiddrop:1"}),
    ],
)
def test_families_are_verified_against_torch(tmp_path, save, wishes) -> None:
    """Marks between tiles, positions along axes, features added in the decoder, masks that look ahead, layers
    with inputs of their own or without attention, clips."""
    save(tmp_path / "model")
    asked = {"method": "vispruner", "keep_tokens": "5", **wishes}
    bundle = export(Request(tmp_path / "bundle", model=str(tmp_path / "model"), **asked))
    for case in bundle.manifest.parity["generation"].values():
        assert case["equal"] == case["tokens"] > 1


@pytest.mark.slow
def test_jetpack6_writes_what_tensorrt_10_3_takes(once, model_folder) -> None:
    wishes = {**WISHES, "keep_tokens": "6", "then": "apet:2", "then_options": ["basis=2"]}
    paths = list(once.bundle(model_folder("four"), **wishes, target="jetpack6").glob("*.onnx"))
    assert len(paths) == 8 and [line for path in paths for line in refused(path)] == []


@pytest.mark.slow
@pytest.mark.trtrtx
@pytest.mark.skipif(MISSING, reason=f"tensorrt_rtx is not installed: {INSTALL[ENGINE]}")
def test_every_graph_builds_with_tensorrt(once, model_folder) -> None:
    wishes = {**WISHES, "keep_tokens": "6", "then": "apet:2", "then_options": ["basis=2"]}
    opened = open_bundle(once.bundle(model_folder("four"), **wishes, target="tensorrt"))
    for file, graph in opened.manifest.graphs.items():
        assert refused_nodes(opened.path(file), ENGINE) == []
        assert build_engine(opened.path(file), ENGINE, profile_of(graph)).plan.nbytes, file


# -- what is asked -------------------------------------------------------------------------------------------


def test_shares_are_rounded_and_keep_at_least_one() -> None:
    third = parse_then("pyramiddrop")
    assert third is not None and [third.keep(count) for count in (96, 64, 2, 1)] == [32, 21, 1, 1]
    published = parse_then("pyramiddrop:16", ["share=0.333"])
    assert published is not None and published.keep(96) == 32
    assert third.pruner(96, 32).site == "decoder:16" and third.pruner(96, 28).site == "decoder:14"
    assert third.pruner(6, 3).site == "decoder:1"


def test_the_methods_that_can_be_second_are_those_that_help_names() -> None:
    names = methods()
    assert names == ["apet", "dart", "fastv", "pyramiddrop"]
    shown = " ".join(cli.build_parser().format_help().split())
    assert "apet, dart, fastv or pyramiddrop" in shown


@pytest.mark.parametrize(
    ("wishes", "problem"),
    [
        (
            {"then": "vispruner"},
            "cannot prune a second time inside the decoder; choose one of apet, dart, fastv",
        ),
        ({"then": "sparsevlm"}, "cannot prune a second time"),
        ({"then": "adaptprune:2"}, "cannot prune a second time"),
        ({"then": "none"}, "cannot prune a second time"),
        ({"then": "fastv:two"}, "--then fastv: layer is 'two'; give a whole number"),
        ({"then": "fastv:"}, "--then fastv: layer is ''; give a whole number"),
        ({"then": "fastvv"}, "unknown method 'fastvv'; did you mean 'fastv'"),
        ({"then": "fastv:2", "then_options": ["share=0"]}, "share is 0; give a fraction above 0, 1 at most"),
        ({"then": "fastv:2", "then_options": ["share=1.5"]}, "share is 1.5"),
        ({"then": "fastv", "then_options": ["layer=-1"]}, "layer is -1; give 1 or more, or 0"),
        ({"then": "fastv:2", "then_options": ["layer=3"]}, "layer is given twice"),
        ({"then": "fastv:2", "then_options": ["pivots=3"]}, "--then fastv has no option 'pivots'"),
        ({"then_options": ["share=0.5"]}, "is an option of --then; give --then METHOD"),
        ({"method": "none", "then": "fastv"}, "method none keeps all visual tokens"),
        (
            {"method": "fastv", "then": "pyramiddrop"},
            r"method fastv prunes inside the decoder itself \(decoder:2\)",
        ),
        ({"then": "apet", "restore": True}, "method apet merges them"),
    ],
)
def test_requests_that_cannot_be(tmp_path: Path, wishes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        Request(tmp_path / "out", **{"method": "vispruner", **wishes}).check()
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("then", "problem"),
    [
        ("fastv:4", "layer is 4, and this model's decoder has 4 layers; give 1 to 3"),
        ("dart:2", "method dart: pivots 8 is outside 1 to 5, the visual tokens"),
    ],
)
def test_what_a_model_has_not_is_refused_and_nothing_is_written(
    tmp_path: Path, model_folder: Callable[[str], Path], then: str, problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        export(Request(tmp_path / "out", str(model_folder("four")), "vispruner", "5", then=then))
    assert not list(tmp_path.iterdir())


def test_a_layer_without_attention_is_refused_with_those_that_have_some(tmp_path: Path) -> None:
    save_lfm2(tmp_path / "model")
    request = Request(
        tmp_path / "out", str(tmp_path / "model"), "vispruner", "5", then="pyramiddrop:2", image_size=(32, 48)
    )
    with pytest.raises(UsageError, match=r"which has no attention in this model \(layers .* have\)"):
        export(request)


@pytest.mark.parametrize("keep", [1, 7, 20])
def test_apet_inside_chooses_and_merges_as_its_loops_do(keep: int) -> None:
    rng = np.random.default_rng(keep)
    states = rng.normal(size=(2, 20, 12)).astype(np.float32) + 3
    then = parse_then("apet", [f"share={keep / 20}", "basis=4"])
    assert then is not None
    kept, rows = then.pruner(20, 4)(hidden_states=torch.from_numpy(states))
    for one in range(2):
        wanted, margin, values = numpy_merging.apet((1, 20), keep, states[one], basis=4)
        assert margin > 1e-7 and kept[one].tolist() == wanted
        np.testing.assert_allclose(rows[one], values, rtol=1e-5, atol=1e-5)
