"""What runs once a prompt: text and visual tokens become one sequence, which the decoder reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtp.export.graphs.decoder import PART_CUES
from vtp.export.graphs.restore import BiasingSplice, UnbiasedTokens
from vtp.export.onnx.emit import GraphInput, GraphSpec
from vtp.export.plan import examples
from vtp.export.plan.bundle_layout import BundleLayout, reads_rows
from vtp.export.plan.image import feature_pruners
from vtp.export.plan.names import (
    KEPT_SEQUENCE,
    PICTURES,
    ROWS,
    SEQUENCE,
    axes,
    part_name,
    part_role,
    part_source,
    pruner_name,
    stage,
)
from vtp.export.plan.schedule import Schedule, keep_of
from vtp.runtime.bundle.caches import KvInfo, StateTensors, present_of
from vtp.runtime.bundle.manifest import StageInfo


def prompt_stages(layout: BundleLayout) -> Iterator[GraphSpec | StageInfo]:
    """Graphs and stages: embed_tokens [-> text_cues [-> pruner]] -> splice -> decoder, or its parts with
    pruners between them."""
    yield from _embed_tokens(layout)
    if layout.reads_text:
        yield from _text_cues(layout)
        if layout.kind == "projector":
            yield from feature_pruners(layout, "prefill", "image_embeds", "kept_embeds")
    yield from _splice(layout)
    yield from _decoder(layout)


def caches(layout: BundleLayout) -> dict[str, KvInfo]:
    """The key-value cache of every part of the decoder, by graph."""
    return {part_name(number, layout.cuts): _cache(layout, number) for number in range(len(layout.parts))}


def _cache(layout: BundleLayout, number: int) -> KvInfo:
    decoder, dtype = layout.family.decoder, str(layout.dtype).removeprefix("torch.")
    layers = decoder.cached(*layout.parts[number])
    heads, head_dim = layout.kv_shape(layers[0] if layers else decoder.cached(0, len(decoder.layers))[0])
    return KvInfo(layers, heads, head_dim, layout.capacity(number), dtype, lengths="seqlens_k")


def states(layout: BundleLayout) -> dict[str, list[StateTensors]]:
    """What layers without attention carry in every part of the decoder, by graph."""
    return {
        part_name(number, layout.cuts): layout.family.decoder.states_of(first, end, layout.dtype)
        for number, (first, end) in enumerate(layout.parts)
    }


def _embed_tokens(layout: BundleLayout) -> Iterator[GraphSpec | StageInfo]:
    decoder, image = layout.family.decoder, layout.family.image_token_id
    table = decoder.model.embed_tokens
    absent = image if image >= table.num_embeddings else None
    embedding: nn.Module = decoder.embedding(absent)
    embedding = UnbiasedTokens(embedding) if layout.restore else embedding
    yield GraphSpec("embed_tokens", embedding, [examples.input_ids()], layout.embeds)
    yield stage("embed_tokens", "prefill", ["input_ids"], layout.embeds, role="embed")


def _text_cues(layout: BundleLayout) -> Iterator[GraphSpec | StageInfo]:
    inputs = [*examples.prompt_text(layout), examples.text_length(layout)]
    outputs = ["text_embeds", "text_mask", "text_rows"]
    own = {name: {0: PICTURES, 1: ROWS} for name in outputs[:2]} | {"text_rows": {1: ROWS}}
    yield GraphSpec("text_cues", layout.family.text_cues(), inputs, outputs, own)
    yield stage("text_cues", "prefill", [item.name for item in inputs], outputs)


def _splice(layout: BundleLayout) -> Iterator[GraphSpec | StageInfo]:
    splice: Any = layout.family.splice(layout.splice_positions)
    splice = BiasingSplice(splice, layout.count) if layout.restore else splice
    (embeds, start), (tokens, keep) = examples.prompt_text(layout), examples.visual_tokens(layout)
    inputs = [embeds, tokens, start]
    if splice.reads_keep and layout.on_features:
        inputs.append(keep)
    outputs = ["prompt_embeds", "position_ids", "next_position"]
    outputs += ["ahead"] if layout.has_lookahead else []
    outputs += ["prompt_bias"] if layout.restore else []
    own = {name: {1: SEQUENCE} for name in outputs if name != "next_position"}
    yield GraphSpec("splice", splice, inputs, outputs, own)
    reads = {item.name: item.name for item in inputs}
    if layout.kind == "projector":
        reads["image_embeds"] = "kept_embeds"
    yield stage("splice", "prefill", reads, outputs)


@dataclass(frozen=True)
class _Flow:
    """The pipeline's names of what goes into the next part of the decoder."""

    hidden: str = "prompt_embeds"
    positions: str = "position_ids"
    rows: str = "text_rows"
    ahead: str = "ahead"
    bias: str = "prompt_bias"
    kept: str = ""  # which of the image's tokens arrive; "": all of them


def _decoder(layout: BundleLayout) -> Iterator[GraphSpec | StageInfo]:
    """Parts of the decoder with pruners between them; without a decoder-site method there is one part."""
    flow = _Flow(kept="keep_indices" if layout.on_features else "")
    cues = [name for name in PART_CUES if name in layout.cut_needs]
    for number in range(len(layout.cuts)):
        yield from _part(layout, number, cues, flow)
        yield from _decoder_pruners(layout, number, cues, flow)
        kept = "hidden_states", "position_ids", "text_rows", "ahead", "key_bias"
        names = [*(f"kept_{name}" for name in kept), "keep_indices"]
        flow = _Flow(*(name + layout.tail(number) for name in names))
    yield from _part(layout, len(layout.cuts), [], flow)


def _part(
    layout: BundleLayout, number: int, cues: Sequence[str], flow: _Flow
) -> Iterator[GraphSpec | StageInfo]:
    """One part, and its run over a prompt."""
    (first, end), cuts = layout.parts[number], layout.cuts
    name, source = part_name(number, cuts), part_source(number, cuts)
    module = layout.family.decoder.part(first, end, cues, layout.normed_keys, layout.restore)
    inputs = examples.decoder_inputs(layout, source, first, end, module.reads_text)
    answer = ["logits"] if module.final else ["hidden_states", *cues]
    present = [to for item in inputs if (to := present_of(item.name))]
    yield GraphSpec(name, module, inputs, [*answer, *present])
    reads = {source: flow.hidden, "position_ids": flow.positions}
    if reads_rows(cues):
        reads["text_rows"] = flow.rows
    if layout.has_lookahead:
        reads["ahead"] = flow.ahead
    if layout.restore:
        reads["key_bias"] = flow.bias
    gives = {item: item + ("" if module.final else layout.tail(number)) for item in answer}
    yield stage(name, "prefill", reads, gives, role=part_role(number, cuts))


def _decoder_pruners(
    layout: BundleLayout, number: int, part_cues: Sequence[str], flow: _Flow
) -> Iterator[GraphSpec | StageInfo]:
    """The pruners after part `number`, which `flow` went into: one per keep-count."""
    names, place = _pruner_inputs(layout, number, part_cues), layout.after_part(number)
    end, reads = layout.tail(number), {"position_ids": flow.positions}
    reads.update({name: name + end for name in ["hidden_states", *part_cues]})
    reads.update({"previous_indices": flow.kept, "text_rows": flow.rows})
    outputs = ["keep_indices", "kept_hidden_states", "kept_position_ids"]
    outputs += ["kept_text_rows"] if "text_rows" in names else []
    outputs += ["kept_key_bias"] if layout.restore else []
    outputs += ["kept_ahead"] if layout.has_lookahead else []
    own = {name: {1: KEPT_SEQUENCE} for name in outputs if name not in ("keep_indices", "kept_text_rows")}
    for schedule in layout.schedules:
        file = layout.pruner_file(schedule, place)
        inputs = _decoder_pruner_inputs(layout, schedule, number, names)
        module = layout.family.decoder_pruner(schedule[place], names)
        module.restores = layout.count if layout.restore else None
        yield GraphSpec(file, module, inputs, outputs, own, rewrite=False)
        yield stage(
            pruner_name(place, len(schedule), None),
            "prefill",
            {item.name: reads.get(item.name, item.name) for item in inputs},
            {item: item + end for item in outputs},
            file=file,
            keep=keep_of(schedule),
            role="pruner",
        )


def _pruner_inputs(layout: BundleLayout, number: int, part_cues: Sequence[str]) -> list[str]:
    """What a decoder-site pruner takes after hidden_states, position_ids and image_start."""
    given = {*part_cues, "hidden_states", "position_ids", "image_start"}
    more = number + 1 < len(layout.cuts)
    return [
        *part_cues,
        *(name for name in layout.cut_needs if name not in given),
        *(["previous_indices"] if layout.after_part(number) else []),
        *(["text_rows"] if more and reads_rows(part_cues) else []),
    ]


def _decoder_pruner_inputs(
    layout: BundleLayout, schedule: Schedule, number: int, names: Sequence[str]
) -> list[GraphInput]:
    tensors = examples.decoder_cues(layout, layout.arriving(number, schedule), layout.cuts[number])
    scores = {"attention_scores": {1: SEQUENCE}}  # of the whole prompt here, of the picture elsewhere
    return [
        GraphInput(name, tensors[name], {**axes(name), **scores.get(name, {})})
        for name in ["hidden_states", "position_ids", "image_start", *names]
    ]
