"""PaliGemma, PaliGemma 2 and Gemma 3: what tokens see, prompts, and bundles against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vtp.engines import UsageError, VtpError
from vtp.engines.graph.file import read_graph
from vtp.engines.ort.session import OrtEngine
from vtp.export.exporter import Request, export
from vtp.export.families.gemma.gemma3 import Gemma3
from vtp.export.families.gemma.lookahead import lookahead
from vtp.export.families.gemma.paligemma import PaliGemma
from vtp.export.graphs.attention import operators as attention
from vtp.export.graphs.attention.operators import Lengths, Rule
from vtp.export.verify.reference import reference_generate
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.bundle.memory import bundle_memory
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompter

from ...models.tiny_gemma import BOS, processor_of, save_gemma, tiny_gemma3, tiny_paligemma
from ...once import Once
from ...oracles.several_pictures import TALK, Turns, asked, by_transformers, check_answers, check_batch
from ..pruners.test_trtrtx import ENGINE, MISSING
from .compared import Made, bundles_of, check_answers_of_any_size, check_builds, follow, marked, noise

COUNT, MAX_LENGTH, WORDS = 16, 128, "what shape is it ?"
MODELS: dict[str, Callable[[], Any]] = {
    "pali": tiny_paligemma,
    "pali2": lambda: tiny_paligemma("gemma2", seed=1),
    "pali2_deep": lambda: tiny_paligemma("gemma2", layers=4, seed=2),
    "gemma3": lambda: tiny_gemma3(seed=3),
}
REFERENCES = {"pali": PaliGemma.reference, "pali2": PaliGemma.reference, "gemma3": Gemma3.reference}
HALF = {"dtype": "float16"}
TENSORRT = {"target": "tensorrt"}
MASKS = {"oldest_onnxruntime": "1.30"}  # attention takes masks
BUNDLES: dict[str, tuple[str, str, str | None, dict[str, Any]]] = {
    "pali-none": ("pali", "none", None, {}),
    "pali-vispruner": ("pali", "vispruner", "5,9", {}),
    "pali-divprune": ("pali", "divprune", "6", {}),
    "pali-adaptprune": ("pali", "adaptprune", "6", {}),
    "pali-original": ("pali", "vispruner", "5", {"method_options": ["positions=original"]}),
    "pali-visionzip": ("pali", "visionzip", "6", {}),
    "pali-half": ("pali", "fastv", "6", HALF),
    "pali2-none": ("pali2", "none", None, {}),
    "pali2-vispruner": ("pali2", "vispruner", "5,9,16", {}),  # with all tokens as well
    "pali2-fastv": ("pali2", "fastv", "6", {}),
    "pali2-sparsevlm": ("pali2_deep", "sparsevlm", "6", {}),
    "pali2-tensorrt": ("pali2", "adaptprune", "6", TENSORRT),
    "gemma3-none": ("gemma3", "none", None, {}),
    "gemma3-fastv": ("gemma3", "fastv", "6", {}),
    "gemma3-vispruner": ("gemma3", "vispruner", "5,9", {}),
    "gemma3-original": ("gemma3", "divprune", "6", {"method_options": ["positions=original"]}),
    "gemma3-holov": ("gemma3", "holov", "6", {}),
    "gemma3-adaptprune": ("gemma3", "adaptprune", "6", {}),
    "gemma3-sparsevlm": ("gemma3", "sparsevlm", "6", {}),
    "gemma3-half": ("gemma3", "vispruner", "6", HALF),
    "gemma3-tensorrt": ("gemma3", "fastv", "6", TENSORRT),
    "pali-masks-none": ("pali", "none", None, MASKS),
    "pali2-masks": ("pali2", "vispruner", "5,16", MASKS),
    "pali2-masks-fastv": ("pali2", "fastv", "6", MASKS),
    "gemma3-masks-none": ("gemma3", "none", None, MASKS),
    "gemma3-masks": ("gemma3", "vispruner", "5,9", MASKS),
    "gemma3-masks-fastv": ("gemma3", "fastv", "6", MASKS),
    "gemma3-masks-half": ("gemma3", "fastv", "6", {**HALF, **MASKS}),
}
QUICK = {"pali2-vispruner", "gemma3-none", "gemma3-fastv", "gemma3-masks-none"}
WHOLE = {"pali2-vispruner", "pali2-masks"}  # with all tokens as well
NAMES = marked(BUNDLES, QUICK)
UNPRUNED = [item for name, item in NAMES.items() if name.endswith("none") or name in WHOLE]
PRUNED = [item for name, item in NAMES.items() if not name.endswith("none")]


def save_named(path: Path, name: str) -> Any:
    return save_gemma(path, MODELS[name]())


@pytest.fixture(scope="module")
def folders(saved: Callable[..., Any]) -> Callable[[str], tuple[Path, Any]]:
    """Folder and model by name; written at the first call."""

    def get(name: str) -> tuple[Path, Any]:
        return saved(save_named, name)

    return get


@pytest.fixture(scope="module")
def bundle(once: Once, folders: Callable[[str], Any]) -> Callable[[str], Made]:
    """Those of Gemma 3 have room for a talk about three pictures."""
    table = {
        name: (
            kind,
            {
                "method": method,
                "keep_tokens": keep,
                "max_length": MAX_LENGTH if kind.startswith("pali") else 256,
                **wishes,
            },
        )
        for name, (kind, method, keep, wishes) in BUNDLES.items()
    }
    return bundles_of(table, once, folders)


# -- what tokens see -----------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=4),
    st.integers(1, 4),
    st.integers(1, 12),
    st.none() | st.integers(1, 12),
)
def test_what_a_prompt_sees(texts: list[int], visual: int, end: int, window: int | None) -> None:
    """Place by place: itself and those before it within the window, the rest of its picture, no padding."""
    starts, picture = list[int](), [-1] * texts[0]
    for number, after in enumerate(texts[1:]):
        starts.append(len(picture))
        picture += [number] * visual + [-1] * after
    total = len(picture)
    end = min(end, total)
    place, ahead = torch.arange(total).unsqueeze(0), lookahead(total, torch.tensor([starts]), visual)
    lengths = Lengths(torch.tensor([end - 1], dtype=torch.int32), torch.tensor(total, dtype=torch.int32))
    seen = lengths.seen(place, total + 3, Rule(1.0, window=window), ahead)[0]
    own = [*picture, -2, -2, -2]
    for query in range(end):
        for key in range(total + 3):
            allowed = key <= query or (own[query] >= 0 and own[query] == own[key])
            near = window is None or key > query - window
            assert bool(seen[query, key]) == (allowed and near and key < end), (query, key)
    assert seen.any(dim=1).all()


@pytest.mark.parametrize("name", ["gemma3-none", "gemma3-masks-none"])
def test_a_right_padded_batch_equals_its_rows(bundle: Callable[[str], Made], name: str) -> None:
    """Two prompts of unequal length, with pictures in other places, then a step: logits row by row."""
    engine = OrtEngine(open_bundle(bundle(name).folder).path("decoder.onnx"), threads=1)
    prompts = [(21, 2, 16), (14, 1, 4)]
    rows = [run_and_step(engine, [prompt], row) for row, prompt in enumerate(prompts)]
    both = run_and_step(engine, prompts, 0)
    for step in range(2):
        wanted = np.concatenate([row[step] for row in rows])
        np.testing.assert_allclose(both[step], wanted, atol=2e-5)


def test_masks_are_taken_where_the_oldest_onnxruntime_knows_them(bundle: Callable[[str], Made]) -> None:
    """One operator a layer, whose mask's size is told, and no reading on from a filled cache."""
    opened = open_bundle(bundle("gemma3-masks-none").folder)
    graph = read_graph(opened.path("decoder.onnx"))
    attending = [node for node in graph.nodes if node.op == "GroupQueryAttention"]
    assert [node.ints["causal"] for node in attending] == [0] * 4
    assert not [node for node in graph.nodes if node.op in ("ScatterElements", "Softmax")]
    assert graph.tensors[attending[0].inputs[-1]].shape == ("batch", 1, "sequence", "filled")
    assert bundle_memory(opened, "ort-cpu").stages[-1].unknown == 0
    with pytest.raises(UsageError, match=r"family gemma3, target ort.* reads a prompt in one piece"):
        Pipeline.load(opened.folder, prefix_caching=True)


def run_and_step(engine: OrtEngine, prompts: list[tuple[int, int, int]], first: int) -> list[np.ndarray]:
    """Logits of (length, image_start, visual) prompts in one batch, then of one more token."""
    longest, batch = max(length for length, _, _ in prompts), len(prompts)
    width = engine.inputs["inputs_embeds"].shape[2]
    caches = {
        name: engine.zeros((batch, *info.shape[1:2], MAX_LENGTH, *info.shape[3:]), "float32")
        for name, info in engine.inputs.items()
        if name.startswith("past_key_values.")
    }
    into = {name.replace("past_key_values", "present"): value for name, value in caches.items()}
    embeds, ahead = np.zeros((batch, longest, width), np.float32), np.zeros((batch, longest), np.int64)
    filled = np.array([length for length, _, _ in prompts])
    for row, (length, start, visual) in enumerate(prompts):
        rng = np.random.default_rng(first + row)
        embeds[row, :length] = rng.standard_normal((length, width))
        ahead[row, start : start + visual] = np.arange(visual)[::-1]
    logits = []
    for tokens in (longest, 1):
        feeds = {
            "inputs_embeds": embeds[:, :tokens],
            "position_ids": np.arange(tokens)
            + (filled[:, None] if tokens == 1 else np.zeros((batch, 1), int)),
            "seqlens_k": (filled - 1 + (tokens == 1)).astype(np.int32),
            "total_sequence_length": np.array(filled.max() + (tokens == 1), np.int32),
            "ahead": ahead[:, :tokens] if tokens > 1 else np.full((batch, 1), 99),
        }
        given = {name: engine.put(np.array(value, order="C")) for name, value in feeds.items()}
        logits.append(engine.run({**given, **caches}, into)["logits"].numpy())
    return logits


def test_scores_of_a_large_tower_are_read_head_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(2, 2, 3, 20, 8, generator=torch.Generator().manual_seed(0))
    whole = attention.attention_received(query, key, 0.3)
    monkeypatch.setattr(attention, "_MOST_SCORES", 3 * 20 * 20 - 1)
    calls: list[int] = []
    received = attention._received
    monkeypatch.setattr(attention, "_received", lambda q, k, s: calls.append(q.shape[1]) or received(q, k, s))
    torch.testing.assert_close(attention.attention_received(query, key, 0.3), whole)
    assert calls == [1, 1, 1]


# -- generation ----------------------------------------------------------------------------------------------


def processed(model: Any, pictures: list[Image.Image], turns: Turns) -> dict[str, Any]:
    """What transformers' own processor makes of pictures and a talk (of a single turn for PaliGemma)."""
    processor = processor_of(model)
    if model.config.model_type == "gemma3":
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
    else:
        text = "<image>" * len(pictures) + turns[0]["content"][-1]["text"]
    given = processor(images=[pictures], text=[text], return_tensors="pt")
    assert "token_type_ids" in given
    return {name: value for name, value in given.items() if name not in ("labels", "num_crops")}


@pytest.mark.parametrize("name", UNPRUNED)
def test_unpruned_equals_transformers(bundle: Callable[[str], Made], name: str) -> None:
    """From the picture and the words on: 24 tokens and their logits, of the bundle and of the reference."""
    made = bundle(name)
    given = processed(made.model, [noise(40, 70, seed=3)], asked(WORDS, 1))
    said, logits = by_transformers(made.model, given, 24)
    opened = open_bundle(made.folder)
    prompter = Prompter(opened.manifest.text, opened.path("tokenizer.json"))
    prompt = prompter.encode(prompter.messages_for(WORDS))
    image = opened.manifest.text.image_token_id
    place = prompt.image_start
    assert [*prompt.ids[:place], *[image] * COUNT, *prompt.ids[place + 1 :]] == given["input_ids"][0].tolist()

    pixels = preprocess(noise(40, 70, seed=3), opened.manifest.image)
    assert np.array_equal(pixels, given["pixel_values"].numpy())
    tokens, _ = follow(made.folder, pixels, prompt.ids, place, logits)
    assert tokens == said

    reference = reference_generate(
        made.model, None, given["input_ids"], given["pixel_values"], 24, reference=REFERENCES[made.kind]
    )
    assert reference.token_ids == tokens
    for ours, theirs in zip(reference.step_logits, logits, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-4


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_equals_the_torch_reference(bundle: Callable[[str], Made], name: str) -> None:
    """The export's own check ran; here is what it found, and that every picture can be answered."""
    check_answers_of_any_size(bundle(name), WORDS, COUNT)


@pytest.mark.parametrize(
    "name",
    [
        NAMES[name]
        for name, (_, method, _, wishes) in BUNDLES.items()
        if method not in ("fastv", "adaptprune", "sparsevlm") and "half" not in name and wishes != TENSORRT
    ],
)
def test_several_pictures(bundle: Callable[[str], Made], name: str) -> None:
    """Each sees itself (Gemma 3), or all are read together (PaliGemma); transformers' way, and torch's."""
    made = bundle(name)

    def processing(pictures: list[Image.Image], turns: Turns) -> dict[str, Any]:
        return processed(made.model, pictures, turns)

    talks = [asked(WORDS, 2), TALK if made.kind == "gemma3" else asked(WORDS, 3)]
    check_answers(made.folder, made.model, processing, (40, 70), talks)


@pytest.mark.parametrize(
    "name",
    [NAMES[f"{kind}-vispruner"] for kind in ("pali2", "pali", "gemma3")]
    + [NAMES["pali2-masks"], NAMES["gemma3-masks"]],
)
def test_batches_of_several_pictures(bundle: Callable[[str], Made], name: str) -> None:
    check_batch(bundle(name).folder, (40, 70))


@pytest.mark.slow
@pytest.mark.trtrtx
@pytest.mark.skipif(MISSING, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize("name", ["pali2-tensorrt", "gemma3-tensorrt"])
def test_every_graph_builds_with_tensorrt_rtx(bundle: Callable[[str], Made], name: str) -> None:
    check_builds(bundle(name).folder, ENGINE)


def test_paligemma_takes_one_question(bundle: Callable[[str], Made]) -> None:
    opened = open_bundle(bundle("pali2-vispruner").folder)
    prompter = Prompter(opened.manifest.text, opened.path("tokenizer.json"))
    turns = prompter.messages_for("what ?")
    assert prompter.encode(turns).text == "<image><bos>what ?\n"
    image = {"type": "image"}
    parts = [{"type": "text", "text": "is "}, image, {"type": "text", "text": "it ?"}, image]
    between = prompter.encode([{"role": "user", "content": parts}], 2)
    assert between.text == "<image><image><bos>is it ?\n" and between.image_starts == (0, 1)
    assert between.ids.count(BOS) == 1  # BOS comes once
    later = [*turns, {"role": "assistant", "content": "that"}, {"role": "user", "content": "and ?"}]
    with pytest.raises(UsageError, match="it takes one question, and no conversation"):
        prompter.encode(later)


def test_a_second_turn_of_gemma3(bundle: Callable[[str], Made]) -> None:
    """Line ends around the picture join those of the template, as in transformers' processor."""
    made = bundle("gemma3-none")
    opened = open_bundle(made.folder)
    prompter = Prompter(opened.manifest.text, opened.path("tokenizer.json"))
    turns = prompter.messages_for("what ?")
    turns += [{"role": "assistant", "content": "that"}, {"role": "user", "content": "and ?"}]
    processor = processor_of(made.model)
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    wanted = processor(images=noise(9, 9), text=text, return_tensors="pt")["input_ids"][0].tolist()
    prompt = prompter.encode(turns)
    image = opened.manifest.text.image_token_id
    place = prompt.image_start
    assert [*prompt.ids[:place], *[image] * COUNT, *prompt.ids[place + 1 :]] == wanted
    with pytest.raises(UsageError, match="holds '<start_of_image>', a control token"):
        prompter.encode(prompter.messages_for("a <start_of_image> ?"))


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (
            PaliGemma,
            {"text_config": {"model_type": "llama"}},
            "decoder is 'llama'; supported .* gemma, gemma2",
        ),
        (PaliGemma, {"vision_config": {"model_type": "clip_vision_model"}}, "vision tower is 'clip_vision"),
        (Gemma3, {"text_config": {"model_type": "gemma2"}}, "decoder is 'gemma2'; supported .* gemma3_text"),
        (Gemma3, {"text_config": {"use_bidirectional_attention": True}}, "sets use_bidirectional_attention"),
    ],
)
def test_a_config_that_is_refused(family: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(VtpError, match=message):
        family.check(config)


def test_a_prompt_may_not_outgrow_paligemmas_window(folders: Callable[[str], Any], tmp_path: Path) -> None:
    folder, _ = folders("pali2")
    with pytest.raises(UsageError, match="max-length 129 is outside 18 to 128"):
        export(Request(tmp_path / "out", str(folder), "none", max_length=129))
