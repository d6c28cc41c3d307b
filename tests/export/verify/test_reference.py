"""The torch reference: equal to transformers unpruned, and to masking or cutting by other means pruned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vtp.engines.errors import UsageError, VtpError
from vtp.export.families.reference import Reference
from vtp.export.pruners import find_method
from vtp.export.pruners.base import Pruner
from vtp.export.verify.reference import reference_generate

from ...models.tiny import pixels, prompt_ids, tiny_llava
from ...oracles import numpy_pruners

GRID, COUNT = (4, 4), 16
IDS = prompt_ids(COUNT)
IMAGE = (IDS[0] == 4).nonzero().flatten()
MODELS: list[dict[str, Any]] = [
    {},
    {"kv_heads": 4},
    {"decoder": "mistral", "kv_heads": 1, "head_dim": 16},
    {"decoder": "qwen2"},
    {"decoder": "qwen2", "tied": True, "vision": "siglip"},
    {"attention_bias": True, "rope_theta": 1e6},
]


def named(options: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items()) or "plain"


def make(method: str, keep: int, **options: Any) -> Pruner:
    return find_method(method)(GRID, keep, **options).eval()


def generate(model: Any, steps: int, **inputs: Any) -> tuple[list[int], list[Tensor]]:
    """transformers' own greedy generation: new tokens and their logits."""
    first = next(iter(inputs.values()))
    out = model.generate(
        **inputs,
        attention_mask=torch.ones(first.shape[:2], dtype=torch.int64),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, -steps:].tolist(), [logits[0] for logits in out.logits]


def assert_close(given: list[Tensor], wanted: list[Tensor], tolerance: float = 2e-4) -> None:
    assert len(given) == len(wanted)
    for one, two in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, two.float(), atol=tolerance, rtol=0)


def embed(model: Any) -> Tensor:
    """The full prompt's embeddings, through transformers' own merging."""
    caught: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _module, _inputs, given: caught.append(given["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=IDS, pixel_values=pixels())
    hook.remove()
    return caught[0]


# -- unpruned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", MODELS, ids=named)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_unpruned_equals_generate(options, implementation):
    model = tiny_llava(**options)
    model.set_attn_implementation(implementation)
    tokens, logits = generate(model, 24, input_ids=IDS, pixel_values=pixels())
    answer = reference_generate(model, None, IDS, pixels(), 24)
    assert answer.token_ids == tokens
    assert_close(answer.step_logits, logits)
    assert torch.equal(answer.first_logits, answer.step_logits[0])
    assert answer.keep_indices.tolist() == list(range(COUNT))
    assert model.config.text_config._attn_implementation == implementation
    assert model.config.vision_config._attn_implementation == implementation


def test_unpruned_equals_generate_in_float16():
    model = tiny_llava(dtype=torch.float16)
    model.set_attn_implementation("eager")
    tokens, logits = generate(model, 16, input_ids=IDS, pixel_values=pixels().half())
    answer = reference_generate(model, None, IDS, pixels(), 16)
    assert answer.token_ids == tokens
    assert_close(answer.step_logits, logits)


def test_eos_ends_the_answer():
    model = tiny_llava()
    tokens = reference_generate(model, None, IDS, pixels(), 12).token_ids
    stop = tokens[5]
    answer = reference_generate(model, None, IDS, pixels(), 12, eos_ids=(999, stop))
    assert answer.token_ids == tokens[: tokens.index(stop) + 1]
    assert len(answer.step_logits) == len(answer.token_ids)


# -- pruned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["uniform", "vispruner", "fastv", "adaptprune"])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_keeping_all_changes_nothing(method, positions):
    model = tiny_llava()
    whole = reference_generate(model, None, IDS, pixels(), 12)
    answer = reference_generate(model, make(method, COUNT), IDS, pixels(), 12, positions=positions)
    assert answer.token_ids == whole.token_ids
    assert_close(answer.step_logits, whole.step_logits, 1e-5)


def kept_places(answer: Any) -> Tensor:
    """Places of the prompt that survive, in order."""
    return torch.cat([(IDS[0] != 4).nonzero().flatten(), IMAGE[answer.keep_indices]]).sort().values


@pytest.mark.parametrize("options", MODELS, ids=named)
def test_vision_site_equals_generate_on_the_cut_prompt(options):
    model = tiny_llava(**options)
    answer = reference_generate(model, make("vispruner", 6), IDS, pixels(), 16)
    cut = embed(model)[:, kept_places(answer)]
    tokens, logits = generate(model, 16, inputs_embeds=cut)
    assert answer.token_ids == tokens
    assert_close(answer.step_logits, logits)
    assert answer.cache_lengths == [cut.shape[1] + 15] * 4


@pytest.mark.parametrize("options", MODELS, ids=named)
def test_vision_site_with_original_positions_equals_recomputing(options):
    """Every step anew from the whole cut sequence, without a cache."""
    model = tiny_llava(**options)
    answer = reference_generate(model, make("uniform", 5), IDS, pixels(), 12, positions="original")
    new = torch.tensor([answer.token_ids])
    with torch.no_grad():
        rest = model.model.language_model.embed_tokens(new)
        places = torch.cat([kept_places(answer), torch.arange(new.shape[1]) + IDS.shape[1]])
        hidden = model.model.language_model(
            inputs_embeds=torch.cat([embed(model)[:, kept_places(answer)], rest], dim=1),
            position_ids=places.unsqueeze(0),
            attention_mask=torch.ones(1, len(places), dtype=torch.int64),
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden)[0, -new.shape[1] - 1 : -1]
    assert_close(answer.step_logits, list(logits))


@pytest.mark.parametrize("options", MODELS, ids=named)
@pytest.mark.parametrize("method", ["fastv", "adaptprune"])
def test_decoder_site_equals_masking_the_whole_sequence(options, method):
    """Dropping tokens in front of layer 2 is hiding them from layer 2 on, at unchanged positions."""
    model = tiny_llava(**options)
    answer = reference_generate(model, make(method, 5), IDS, pixels(), 70)
    new = torch.tensor([answer.token_ids])
    hidden = torch.ones(COUNT, dtype=torch.bool)
    hidden[answer.keep_indices] = False
    with torch.no_grad():
        whole = torch.cat([embed(model), model.model.language_model.embed_tokens(new)], dim=1)
        logits = masked_logits(model, whole, IMAGE[hidden])[-new.shape[1] - 1 : -1]
    assert_close(answer.step_logits, list(logits))
    full = IDS.shape[1] + 69
    assert answer.cache_lengths == [full, full, full - 11, full - 11]


def masked_logits(model: Any, embeds: Tensor, dropped: Tensor) -> Tensor:
    """Logits [T,V] of a sequence whose layers from 2 on cannot see the places `dropped`."""
    size = embeds.shape[1]
    mask = torch.full((size, size), -torch.inf).triu(1)
    mask[:, dropped] = -torch.inf
    mask[dropped, dropped] = 0  # a dropped row still needs one column; nobody reads it

    def narrow(_module: Any, inputs: tuple[Any, ...], given: dict[str, Any]) -> Any:
        return inputs, {**given, "attention_mask": mask[None, None]}

    model.set_attn_implementation("eager")
    layers = model.model.language_model.layers
    hooks = [layer.register_forward_pre_hook(narrow, with_kwargs=True) for layer in layers[2:]]
    out = model.model.language_model(inputs_embeds=embeds, use_cache=False)
    for hook in hooks:
        hook.remove()
    return model.lm_head(out.last_hidden_state)[0]


# -- the cues ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", MODELS, ids=named)
def test_decoder_cues_are_the_last_row_and_the_next_layers_keys(options):
    model = tiny_llava(**options)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=IDS, pixel_values=pixels(), output_attentions=True, output_hidden_states=True)
        scores = out.attentions[1][0, :, -1].mean(0)[IMAGE].numpy()
        layer = model.model.language_model.layers[2]
        plain = layer.self_attn.k_proj(out.hidden_states[2])[0, IMAGE].numpy()
        normed = layer.self_attn.k_proj(layer.input_layernorm(out.hidden_states[2]))[0, IMAGE].numpy()
    wide = {"sigma_space": 4.0, "sigma_feature": 1.0}  # so that the keys decide
    answers = [
        (make("fastv", 6), numpy_pruners.fastv(GRID, 6, scores)),
        (make("adaptprune", 6, **wide), numpy_pruners.adaptprune(GRID, 6, scores, plain, **wide)),
        (
            make("adaptprune", 6, keys="normed", **wide),
            numpy_pruners.adaptprune(GRID, 6, scores, normed, **wide),
        ),
    ]
    for pruner, (kept, margin) in answers:
        assert margin > 1e-5
        assert reference_generate(model, pruner, IDS, pixels(), 1).keep_indices.tolist() == kept


def test_the_option_keys_changes_what_is_kept():
    wide = {"sigma_space": 4.0, "sigma_feature": 1.0}
    kept = set()
    for keys in ("plain", "normed"):
        for seed in range(4):
            answer = reference_generate(
                tiny_llava(seed=seed), make("adaptprune", 6, keys=keys, **wide), IDS, pixels(), 1
            )
            kept.add((seed, tuple(answer.keep_indices.tolist())))
    assert len(kept) > 4


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_vision_cues_come_from_the_layer_that_makes_the_features(vision, layer):
    model = tiny_llava(vision=vision)
    model.config.vision_feature_layer = layer
    model.set_attn_implementation("eager")
    with torch.no_grad():
        cues = Reference(model).vision(pixels(), {"attention_scores"})
        tower = model.model.vision_tower
        out = tower(pixels(), output_attentions=True, output_hidden_states=True)
        weights = out.attentions[{-2: 1, -1: 2, 1: 0}[layer]][0].mean(0)
    features, scores = cues["image_features"], cues["attention_scores"]
    assert torch.equal(
        features, out.hidden_states[layer][:, 1:] if vision == "clip" else out.hidden_states[layer]
    )
    wanted = weights[0, 1:] if vision == "clip" else weights.mean(0)
    assert torch.equal(scores[0], wanted)
    kept, _ = numpy_pruners.vispruner(GRID, 6, features[0].numpy(), wanted.numpy())
    answer = reference_generate(model, make("vispruner", 6), IDS, pixels(), 1)
    assert answer.keep_indices.tolist() == kept


@pytest.mark.parametrize("method", ["random", "uniform", "fastv", "vispruner", "adaptprune"])
def test_float16_models_answer(method):
    model = tiny_llava(dtype=torch.float16)
    answer = reference_generate(model, make(method, 5), IDS, pixels(), 8)
    assert len(answer.token_ids) == 8 and len(answer.keep_indices) == 5
    assert all(
        torch.isfinite(logits).all() and logits.dtype == torch.float32 for logits in answer.step_logits
    )


def test_cues_may_be_projected_embeddings():
    class Loud(Pruner):
        name, site, needs = "loud", "projector", ("image_embeds",)

        def forward(self, image_embeds: Tensor) -> Tensor:  # type: ignore[override]
            return image_embeds.norm(dim=2).topk(self.keep).indices.sort().values

    model = tiny_llava()
    answer = reference_generate(model, Loud(GRID, 3), IDS, pixels(), 2)
    loudness = embed(model)[0, IMAGE].norm(dim=1).numpy()
    assert answer.keep_indices.tolist() == sorted(np.argsort(-loudness)[:3].tolist())


# -- refusals ------------------------------------------------------------------------------------------------


def test_refusals():
    model = tiny_llava()
    with pytest.raises(UsageError, match="choose compact or original"):
        reference_generate(model, None, IDS, pixels(), positions="dense")
    with pytest.raises(VtpError, match="decoder:2 takes one picture per prompt, not 2"):
        reference_generate(model, make("fastv", 2), IDS, [pixels(), pixels(seed=1)])
    with pytest.raises(VtpError, match="made for 4 visual tokens"):
        reference_generate(model, find_method("uniform")((2, 2), 2), IDS, pixels())
    with pytest.raises(VtpError, match="9 placeholders for 16 tokens"):
        reference_generate(model, None, prompt_ids(9), pixels())
    with pytest.raises(VtpError, match="more than 2 layers"):
        reference_generate(tiny_llava(layers=2), make("fastv", 2), IDS, pixels())
    model.config.vision_feature_layer = [-2, -1]
    with pytest.raises(VtpError, match="only a single layer"):
        reference_generate(model, None, IDS, pixels())


def test_scores_are_refused_where_the_features_hold_the_cls_token():
    model = tiny_llava()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(VtpError, match="without CLS"):
        reference_generate(model, make("vispruner", 2), IDS, pixels())
