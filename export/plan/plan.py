"""From a family and a method to graphs and an ordered list of stages: what a bundle will hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vtp.export.families.base import Family
from vtp.export.graphs.modules import PART_CUES, TEXT_CUES, DecoderPart, EmbedTokens, FeaturePruner
from vtp.export.onnx.emit import GraphInput, GraphSpec
from vtp.export.plan.schedule import Chain, layers_of
from vtp.export.pruners import parse_site
from vtp.runtime.bundle.manifest import KvInfo, StageInfo

BATCH, SEQUENCE, TEXT, ROWS, VISUAL, CAPACITY = (
    "batch",
    "sequence",
    "text",
    "text_rows",
    "visual",
    "capacity",
)
IMAGES, PICTURES = "images", "pictures"  # of one prompt; of all prompts of a batch
_B, _I, _T, _R = 2, 2, 5, 4  # example sizes while tracing: above 1, so that no axis is frozen


@dataclass(frozen=True)
class Plan:
    """Graphs to emit (in the order in which weights are laid down), stages in order, caches by graph name."""

    graphs: list[GraphSpec]
    stages: list[StageInfo]
    caches: dict[str, KvInfo]


def make_plan(
    family: Family, chains: Sequence[Chain], positions: str, dtype: torch.dtype, max_length: int
) -> Plan:
    """Lay out a bundle. `chains` holds one chain per keep-count of one method, or is empty for `none`."""
    return _Planner(family, list(chains), positions, dtype, max_length).plan()


@dataclass(frozen=True)
class _Flow:
    """The pipeline's names of what goes into the next part of the decoder."""

    hidden: str = "prompt_embeds"
    positions: str = "position_ids"
    rows: str = "text_rows"
    ahead: str = "ahead"
    kept: str = ""  # which of the image's tokens arrive; all of them before the first cut


class _Planner:
    def __init__(
        self, family: Family, chains: list[Chain], positions: str, dtype: torch.dtype, max_length: int
    ) -> None:
        self.family = family
        self.chains = chains
        self.dtype = dtype
        self.max_length = max_length
        self.count = family.grid[0] * family.grid[1]
        self.patches = family.patch_grid[0] * family.patch_grid[1]
        first = chains[0][0] if chains else None
        self.site = parse_site(first.site)[0] if first else "none"
        self.needs = first.needs if first else ()
        self.normed_keys = first is not None and first.settings.get("keys") == "normed"
        self.cuts = layers_of(chains[0]) if chains else []
        self.reads_text = any(name.startswith("text_") for name in self.needs)
        self.looks_ahead = family.decoder.sight == "image"
        # Before a decoder-site pruner, or without any, nothing is missing yet: places and positions agree.
        self.positions = positions if chains and not self.cuts else "compact"
        self.graphs: list[GraphSpec] = []
        self.stages: list[StageInfo] = []
        self.caches: dict[str, KvInfo] = {}

    def plan(self) -> Plan:
        self._image_stages()
        self._prompt_stages()
        self._step_stages()
        return Plan(self.graphs, self.stages, self.caches)

    # -- once a picture ------------------------------------------------------------------------------------

    def _image_stages(self) -> None:
        vision_cues = {"vision": ("attention_scores", "vision_keys"), "projector": ("attention_scores",)}
        cues = [name for name in vision_cues.get(self.site, ()) if name in self.needs]
        outputs = ["image_features", *cues]
        chosen = self.site in ("vision", "projector")
        encoder = self.family.vision_encoder(cues) if chosen else self.family.whole_encoder()
        self._add(GraphSpec("vision_encoder", encoder, [self._pixels_input()], outputs))
        self._stage("vision_encoder", "image", ["pixel_values"], outputs, role="encoder")
        if self.site == "vision":
            self._feature_pruners("image", "image_features", "kept_features")
        projector = self.family.projector(whole=not chosen)
        self._add(GraphSpec("projector", projector, [self._features_input()], ["image_embeds"]))
        source = "kept_features" if self.site == "vision" else "image_features"
        self._stage("projector", "image", {"image_features": source}, ["image_embeds"])
        if self.site == "projector" and not self.reads_text:
            self._feature_pruners("image", "image_embeds", "kept_embeds")

    def _feature_pruners(self, when: str, rows: str, kept: str) -> None:
        cues = [rows, *(name for name in self.needs if name != rows)]
        shapes = {
            "image_features": self._float(_B, self.patches, self._features),
            "vision_keys": self._float(_B, self.patches, self.family.feature_width),
            "image_embeds": self._float(_B, self.patches, self.family.decoder.wide(0)),
            "attention_scores": torch.rand(_B, self.patches),
            **self._text_examples(),
        }
        for chain in self.chains:
            pruner, name = chain[0], self._pruner_name(chain, 0)
            inputs = [GraphInput(cue, shapes[cue], _axes(cue)) for cue in cues]
            module = FeaturePruner(pruner, cues, self.family.places(), self.family.widths)
            self._add(GraphSpec(name, module, inputs, ["keep_indices", kept], rewrite=False))
            self._stage("pruner", when, cues, ["keep_indices", kept], file=name, keep=pruner.keep)

    # -- once a prompt -------------------------------------------------------------------------------------

    def _prompt_stages(self) -> None:
        self._embed_graph()
        self._stage("embed_tokens", "prefill", ["input_ids"], ["inputs_embeds"], role="embed")
        if self.reads_text:
            self._text_cues()
        if self.site == "projector" and self.reads_text:
            self._feature_pruners("prefill", "image_embeds", "kept_embeds")
        self._splice()
        self._decoder_stages()

    def _embed_graph(self) -> None:
        ids = GraphInput("input_ids", torch.zeros(_B, _T, dtype=torch.int64), {0: BATCH, 1: TEXT})
        decoder = self.family.decoder
        table, image = decoder.model.embed_tokens, self.family.image_token_id
        absent = image if image >= table.num_embeddings else None
        embedding = EmbedTokens(table, decoder.wide(0) - decoder.width, absent)
        self._add(GraphSpec("embed_tokens", embedding, [ids], ["inputs_embeds"]))

    def _text_cues(self) -> None:
        length = GraphInput("text_length", torch.full((_B,), self._text(), dtype=torch.int64), {0: BATCH})
        inputs = [self._embeds_input(), self._start_input(), length]
        outputs = ["text_embeds", "text_mask", "text_rows"]
        axes = {name: {0: PICTURES, 1: ROWS} for name in outputs[:2]} | {"text_rows": {1: ROWS}}
        self._add(GraphSpec("text_cues", self.family.text_cues(), inputs, outputs, axes))
        self._stage("text_cues", "prefill", [item.name for item in inputs], outputs)

    def _splice(self) -> None:
        width, visual = self.family.decoder.wide(0), max(2, min((c[-1].keep for c in self.chains), default=2))
        pictures = _B * self._images()
        several = {0: PICTURES if self.family.several else BATCH, 1: VISUAL}
        inputs = [
            self._embeds_input(),
            GraphInput("image_embeds", self._float(pictures, visual, width), several),
            self._start_input(),
        ]
        splice = self.family.splice(self.positions)
        if splice.reads_keep and self.site in ("vision", "projector"):
            keep = torch.zeros(pictures, visual, dtype=torch.int64)
            inputs.append(GraphInput("keep_indices", keep, several))
        outputs = ["prompt_embeds", "position_ids", "next_position"]
        outputs += ["ahead"] if self.looks_ahead else []
        sequence = {name: {1: SEQUENCE} for name in ("prompt_embeds", "position_ids", "ahead")}
        self._add(GraphSpec("splice", splice, inputs, outputs, sequence))
        reads = {item.name: item.name for item in inputs}
        if self.site == "projector":
            reads["image_embeds"] = "kept_embeds"
        self._stage("splice", "prefill", reads, outputs)

    def _decoder_stages(self) -> None:
        """Parts of the decoder with pruners between them; without a decoder-site method there is one part."""
        flow, cues = _Flow(), [name for name in PART_CUES if name in self.needs]
        for number, (first, end) in enumerate(self._parts()):
            name, last = self._part_name(number), number == len(self.cuts)
            given = [] if last else cues
            self._decoder_graph(number, first, end, given)
            reads = {self._part_source(number): flow.hidden, "position_ids": flow.positions}
            if _reads_rows(given):
                reads["text_rows"] = flow.rows
            if self.looks_ahead:
                reads["ahead"] = flow.ahead
            if last:
                self._stage(name, "prefill", reads, ["logits"], role=self._part_role(number))
                return
            tail = self._tail(number)
            gives = {item: item + tail for item in ["hidden_states", *given]}
            self._stage(name, "prefill", reads, gives, role=self._part_role(number))
            self._decoder_pruners(number, given, flow)
            kept = "kept_hidden_states", "kept_position_ids", "kept_text_rows", "kept_ahead", "keep_indices"
            flow = _Flow(*(item + tail for item in kept))

    def _decoder_graph(self, number: int, first: int, end: int, cues: list[str]) -> None:
        decoder, name = self.family.decoder, self._part_name(number)
        module = DecoderPart(decoder, first, end, cues, self.normed_keys)
        rows = {0: BATCH, 1: SEQUENCE}
        text = [GraphInput("text_rows", self._text_examples()["text_rows"], {0: BATCH, 1: ROWS})]
        ahead = GraphInput("ahead", torch.zeros(_B, _T, dtype=torch.int64), rows)
        inputs = [
            GraphInput(self._part_source(number), self._float(_B, _T, decoder.wide(first)), rows),
            GraphInput("position_ids", self._numbers(_T), rows),
            GraphInput("seqlens_k", torch.full((_B,), _T - 1, dtype=torch.int32), {0: BATCH}),
            GraphInput("total_sequence_length", torch.tensor(_T, dtype=torch.int32)),
            *([ahead] if self.looks_ahead else []),
            *(text if module.reads_text else []),
            *self._past(first, end),
        ]
        answer = ["logits"] if module.final else ["hidden_states", *cues]
        present = [f"present.{layer}.{part}" for layer in range(first, end) for part in ("key", "value")]
        self._add(GraphSpec(name, module, inputs, [*answer, *present]))
        self.caches[name] = KvInfo(
            layers=list(range(first, end)),
            heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            capacity=self._capacity(number),
            dtype=str(self.dtype).removeprefix("torch."),
            lengths="seqlens_k",
        )

    def _past(self, first: int, end: int) -> list[GraphInput]:
        decoder = self.family.decoder
        buffer = torch.zeros(_B, decoder.kv_heads, 8, decoder.head_dim, dtype=self.dtype)
        return [
            GraphInput(f"past_key_values.{layer}.{part}", buffer, {0: BATCH, 2: CAPACITY})
            for layer in range(first, end)
            for part in ("key", "value")
        ]

    def _capacity(self, number: int) -> int:
        """A head sees all N visual tokens; what comes after pruning holds at most what the largest keeps."""
        if not self.chains or (self.cuts and number == 0):
            return self.max_length
        site = number - 1 if self.cuts else 0
        return self.max_length - self.count + max(chain[site].keep for chain in self.chains)

    def _decoder_pruners(self, number: int, part_cues: list[str], flow: _Flow) -> None:
        """The pruners after part `number`, which `flow` went into: one per keep-count."""
        tail, more = self._tail(number), number + 1 < len(self.cuts)
        own = {"hidden_states", "position_ids", "image_start"}
        names = [*part_cues, *(name for name in self.needs if name not in {*part_cues, *own})]
        reads = {name: name + tail for name in ["hidden_states", *part_cues]}
        reads.update(position_ids=flow.positions, image_start="image_start")
        if flow.kept:
            names, reads = [*names, "previous_indices"], {**reads, "previous_indices": flow.kept}
        if more and _reads_rows(part_cues):
            names, reads = [*names, "text_rows"], {**reads, "text_rows": flow.rows}
        outputs = ["keep_indices", "kept_hidden_states", "kept_position_ids"]
        outputs += ["kept_text_rows"] if "text_rows" in names else []
        outputs += ["kept_ahead"] if self.looks_ahead else []
        per_token = ("kept_hidden_states", "kept_position_ids", "kept_ahead")
        axes = {name: {1: "kept_sequence"} for name in per_token if name in outputs}
        for chain in self.chains:
            pruner, name = chain[number], self._pruner_name(chain, number)
            examples = self._prompt_examples(pruner.count, self.cuts[number])
            scores = {"attention_scores": {1: SEQUENCE}}  # of the whole prompt here, of the picture elsewhere
            inputs = [
                GraphInput(item, examples[item], {**_axes(item), **scores.get(item, {})})
                for item in ["hidden_states", "position_ids", "image_start", *names]
            ]
            module = self.family.decoder_pruner(pruner, names)
            self._add(GraphSpec(name, module, inputs, outputs, axes, rewrite=False))
            self._stage(
                f"pruner_{number + 1}" if len(self.cuts) > 1 else "pruner",
                "prefill",
                {item.name: reads.get(item.name, item.name) for item in inputs},
                {item: item + tail for item in outputs},
                file=name,
                keep=chain[-1].keep,
                role="pruner",
            )

    # -- once a token --------------------------------------------------------------------------------------

    def _step_stages(self) -> None:
        self._stage("embed_tokens", "step", ["input_ids"], ["inputs_embeds"], role="embed")
        hidden = "inputs_embeds"
        for number in range(len(self.cuts) + 1):
            last, tail = number == len(self.cuts), self._tail(number)
            reads = {self._part_source(number): hidden, "position_ids": "position_ids"}
            if not last and _reads_rows(self.needs):
                # Nobody reads the cues of a step: any indices will do, and these are at hand.
                reads["text_rows"] = "input_ids"
            if self.looks_ahead:
                reads["ahead"] = "input_ids"  # a single token is the row's end, and sees no further
            gives = {"logits": "logits"} if last else {"hidden_states": "hidden_states" + tail}
            self._stage(self._part_name(number), "step", reads, gives, role=self._part_role(number))
            hidden = "hidden_states" + tail

    # -- small things --------------------------------------------------------------------------------------

    def _parts(self) -> list[tuple[int, int]]:
        """(first, end) layer of every part of the decoder."""
        return list(pairwise([0, *self.cuts, len(self.family.decoder.layers)]))

    def _part_name(self, number: int) -> str:
        if number == len(self.cuts):
            return "decoder"
        return "decoder_head" if number == 0 else f"decoder_{number}"

    def _part_role(self, number: int) -> str:
        return "decoder" if number == len(self.cuts) else "decoder_head"

    def _part_source(self, number: int) -> str:
        """The input's name: a middle part gives hidden_states itself, and no graph has a name twice."""
        if number == 0:
            return "inputs_embeds"
        return "hidden_states" if number == len(self.cuts) else "kept_hidden_states"

    def _tail(self, number: int) -> str:
        """What is added to the pipeline's names around a site: nothing at the last one (or the only one)."""
        return "" if number + 1 >= len(self.cuts) else f".{number + 1}"

    def _pruner_name(self, chain: Chain, number: int) -> str:
        site = f"_{number + 1}" if len(chain) > 1 else ""
        return f"pruner{site}" if len(self.chains) == 1 else f"pruner{site}_{chain[-1].keep}"

    def _pixels_input(self) -> GraphInput:
        """A batch of pictures; of a picture in several views or in patches, these alone."""
        if self.family.patches:
            return GraphInput("pixel_values", self._float(*self.family.patches))
        views, size = self.family.views, self.family.image_size
        batch: dict[int, str] = {0: BATCH} if views == 1 else {}
        return GraphInput("pixel_values", self._float(_B if views == 1 else views, 3, *size), batch)

    def _features_input(self) -> GraphInput:
        """A batch of patches, some or all; where the projector makes fewer of them, those of one clip."""
        if self.family.pooled:
            return GraphInput("image_features", self._float(1, self.family.pooled, self._features))
        features = self._float(_B, self.patches, self._features)
        return GraphInput("image_features", features, {0: BATCH, 1: VISUAL})

    @property
    def _features(self) -> int:
        """Width of image_features, with what becomes the decoder's streams."""
        return self.family.feature_width * (1 + self.family.decoder.streams)

    def _numbers(self, total: int) -> Tensor:
        """Example position_ids of `total` tokens."""
        numbers, axes = torch.arange(total).repeat(_B, 1), self.family.decoder.axes
        return numbers if axes == 1 else numbers.unsqueeze(2).repeat(1, 1, axes)

    def _embeds_input(self) -> GraphInput:
        prompts = self._float(_B, self._text(), self.family.decoder.wide(0))
        return GraphInput("inputs_embeds", prompts, _axes("inputs_embeds"))

    def _start_input(self) -> GraphInput:
        several = {1: IMAGES} if self.family.several else {}
        start = torch.arange(self._images()).repeat(_B, 1) * self.family.placeholders
        return GraphInput("image_start", start, {0: BATCH, **several})

    def _images(self) -> int:
        """Pictures of a prompt while tracing."""
        return _I if self.family.several else 1

    def _text(self) -> int:
        """Ids of a prompt while tracing, its pictures' among them."""
        return _T + self._images() * (self.family.placeholders - 1)

    def _text_examples(self) -> dict[str, Tensor]:
        return {
            "text_embeds": self._float(_B, _R, self.family.decoder.wide(0)),
            "text_mask": torch.ones(_B, _R),
            "text_rows": torch.arange(_R).repeat(_B, 1),
        }

    def _prompt_examples(self, count: int, layer: int) -> dict[str, Tensor]:
        """Inputs of a decoder-site pruner in front of `layer` that `count` visual tokens reach."""
        decoder, total = self.family.decoder, count + _R
        return {
            "hidden_states": self._float(_B, total, decoder.wide(layer)),
            "position_ids": self._numbers(total),
            "image_start": torch.ones(_B, 1, dtype=torch.int64),
            "attention_scores": torch.rand(_B, total),
            "next_scores": torch.rand(_B, total),
            "keys": self._float(_B, total, decoder.kv_heads * decoder.head_dim),
            "text_attention": torch.rand(_B, decoder.heads, _R, total),
            "text_gravity": torch.rand(_B, _R, total),
            "image_embeds": self._float(_B, self.count, decoder.wide(0)),
            "previous_indices": torch.arange(count).repeat(_B, 1),
            **self._text_examples(),
        }

    def _add(self, spec: GraphSpec) -> None:
        self.graphs.append(spec)

    def _stage(
        self,
        name: str,
        when: str,
        inputs: Mapping[str, str] | Sequence[str],
        outputs: Mapping[str, str] | Sequence[str],
        file: str = "",
        keep: int | None = None,
        role: str = "",
    ) -> None:
        """List a stage; without a `role`, its name says it."""
        file = f"{file or name}.onnx"
        self.stages.append(StageInfo(name, role or name, file, when, keep, _map(inputs), _map(outputs)))

    def _float(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype)


def _map(names: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    return dict(names) if isinstance(names, Mapping) else {name: name for name in names}


def _reads_rows(cues: Sequence[str]) -> bool:
    return bool(set(cues) & set(TEXT_CUES))


# Dynamic axes of a pruner's inputs; of those that are not named, only the batch.
_AXES: dict[str, dict[int, str]] = {
    "inputs_embeds": {1: TEXT},
    "hidden_states": {1: SEQUENCE},
    "position_ids": {1: SEQUENCE},
    "keys": {1: SEQUENCE},
    "next_scores": {1: SEQUENCE},
    "text_embeds": {1: ROWS},
    "text_mask": {1: ROWS},
    "text_rows": {1: ROWS},
    "text_attention": {2: ROWS, 3: SEQUENCE},
    "text_gravity": {1: ROWS, 2: SEQUENCE},
}


def _axes(name: str) -> dict[int, str]:
    return {0: BATCH, **_AXES.get(name, {})}
