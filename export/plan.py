"""From a family and a method to graphs and an ordered list of stages: what a bundle will hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtp.export.families.base import Family
from vtp.export.graphs.emit import GraphInput, GraphSpec
from vtp.export.graphs.modules import (
    DecoderPart,
    DecoderPruner,
    EmbedTokens,
    FeaturePruner,
)
from vtp.export.pruners import parse_site
from vtp.export.pruners.base import Pruner
from vtp.runtime.manifest import KvInfo, StageInfo

BATCH, SEQUENCE, TEXT, VISUAL, CAPACITY = "batch", "sequence", "text", "visual", "capacity"
_B, _T = 2, 5  # example sizes while tracing: above 1, so that no axis is frozen


@dataclass(frozen=True)
class Plan:
    """Graphs to emit (in the order in which weights are laid down), stages in order, caches by graph name."""

    graphs: list[GraphSpec]
    stages: list[StageInfo]
    caches: dict[str, KvInfo]


def make_plan(
    family: Family, pruners: Sequence[Pruner], positions: str, dtype: torch.dtype, max_length: int
) -> Plan:
    """Lay out a bundle. `pruners` holds one instance per keep-count of one method, or is empty for `none`."""
    return _Planner(family, list(pruners), positions, dtype, max_length).plan()


class _Planner:
    def __init__(
        self, family: Family, pruners: list[Pruner], positions: str, dtype: torch.dtype, max_length: int
    ) -> None:
        self.family = family
        self.pruners = pruners
        self.dtype = dtype
        self.max_length = max_length
        self.count = family.grid[0] * family.grid[1]
        self.site, self.layer = parse_site(pruners[0].site) if pruners else ("none", None)
        self.needs = pruners[0].needs if pruners else ()
        # Before a decoder-site pruner nothing is missing yet: places and positions agree.
        self.positions = positions if self.layer is None else "compact"
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
        scores = self.site in ("vision", "projector") and "attention_scores" in self.needs
        height, width = self.family.image_size
        outputs = ["image_features", *(["attention_scores"] if scores else [])]
        pixels = GraphInput("pixel_values", self._float(_B, 3, height, width), {0: BATCH})
        self._add(GraphSpec("vision_encoder", self.family.vision_encoder(scores), [pixels], outputs))
        self._stage("vision_encoder", "image", ["pixel_values"], outputs)
        if self.site == "vision":
            self._feature_pruners("image_features", "kept_features", self.family.feature_width)
        features = self._float(_B, self.count, self.family.feature_width)
        self._add(
            GraphSpec(
                "projector",
                self.family.projector(),
                [GraphInput("image_features", features, {0: BATCH, 1: VISUAL})],
                ["image_embeds"],
            )
        )
        source = "kept_features" if self.site == "vision" else "image_features"
        self._stage("projector", "image", {"image_features": source}, ["image_embeds"])
        if self.site == "projector":
            self._feature_pruners("image_embeds", "kept_embeds", self.family.decoder.width)

    def _feature_pruners(self, rows: str, kept: str, width: int) -> None:
        cues = [rows, *(name for name in self.needs if name != rows)]
        shapes = {
            "image_features": self._float(_B, self.count, self.family.feature_width),
            "image_embeds": self._float(_B, self.count, self.family.decoder.width),
            "attention_scores": torch.rand(_B, self.count),
        }
        for pruner in self.pruners:
            inputs = [GraphInput(name, shapes[name], {0: BATCH}) for name in cues]
            name = self._pruner_name(pruner)
            self._add(
                GraphSpec(name, FeaturePruner(pruner, cues), inputs, ["keep_indices", kept], rewrite=False)
            )
            self._stage("pruner", "image", cues, ["keep_indices", kept], file=name, keep=pruner.keep)

    # -- once a prompt -------------------------------------------------------------------------------------

    def _prompt_stages(self) -> None:
        self._embed_graph()
        self._stage("embed_tokens", "prefill", ["input_ids"], ["inputs_embeds"])
        self._splice()
        if self.layer is None:
            layers = len(self.family.decoder.layers)
            self._decoder_graph("decoder", 0, layers, "inputs_embeds", [])
            reads = {"inputs_embeds": "prompt_embeds", "position_ids": "position_ids"}
            self._stage("decoder", "prefill", reads, ["logits"])
        else:
            self._split_decoder(self.layer)

    def _split_decoder(self, layer: int) -> None:
        cues = [name for name in self.needs if name != "hidden_states"]
        layers = len(self.family.decoder.layers)
        self._decoder_graph("decoder_head", 0, layer, "inputs_embeds", cues)
        reads = {"inputs_embeds": "prompt_embeds", "position_ids": "position_ids"}
        self._stage("decoder_head", "prefill", reads, ["hidden_states", *cues])
        self._decoder_pruners(cues)
        self._decoder_graph("decoder", layer, layers, "hidden_states", [])
        reads = {"hidden_states": "kept_hidden_states", "position_ids": "kept_position_ids"}
        self._stage("decoder", "prefill", reads, ["logits"])

    def _embed_graph(self) -> None:
        ids = GraphInput("input_ids", torch.zeros(_B, _T, dtype=torch.int64), {0: BATCH, 1: TEXT})
        embedding = EmbedTokens(self.family.decoder.model.embed_tokens)
        self._add(GraphSpec("embed_tokens", embedding, [ids], ["inputs_embeds"]))

    def _splice(self) -> None:
        width, visual = self.family.decoder.width, max(2, min((p.keep for p in self.pruners), default=2))
        original = self.positions == "original"
        inputs = [
            GraphInput("inputs_embeds", self._float(_B, _T, width), {0: BATCH, 1: TEXT}),
            GraphInput("image_embeds", self._float(_B, visual, width), {0: BATCH, 1: VISUAL}),
            GraphInput("image_start", torch.ones(_B, dtype=torch.int64), {0: BATCH}),
        ]
        if original:
            keep = torch.zeros(_B, visual, dtype=torch.int64)
            inputs.append(GraphInput("keep_indices", keep, {0: BATCH, 1: VISUAL}))
        outputs = ["prompt_embeds", "position_ids", "next_position"]
        sequence = {"prompt_embeds": {1: SEQUENCE}, "position_ids": {1: SEQUENCE}}
        self._add(GraphSpec("splice", self.family.splice(self.positions), inputs, outputs, sequence))
        reads = {item.name: item.name for item in inputs}
        if self.site == "projector":
            reads["image_embeds"] = "kept_embeds"
        self._stage("splice", "prefill", reads, outputs)

    def _decoder_graph(self, name: str, first: int, end: int, source: str, cues: list[str]) -> None:
        decoder = self.family.decoder
        normed = bool(self.pruners) and self.pruners[0].settings.get("keys") == "normed"
        module = DecoderPart(decoder, first, end, cues, normed)
        rows = {0: BATCH, 1: SEQUENCE}
        inputs = [
            GraphInput(source, self._float(_B, _T, decoder.width), rows),
            GraphInput("position_ids", torch.arange(_T).repeat(_B, 1), rows),
            GraphInput("seqlens_k", torch.full((_B,), _T - 1, dtype=torch.int32), {0: BATCH}),
            GraphInput("total_sequence_length", torch.tensor(_T, dtype=torch.int32)),
            *self._past(first, end),
        ]
        answer = ["logits"] if module.final else ["hidden_states", *cues]
        present = [f"present.{layer}.{part}" for layer in range(first, end) for part in ("key", "value")]
        self._add(GraphSpec(name, module, inputs, [*answer, *present]))
        self.caches[name] = KvInfo(
            layers=list(range(first, end)),
            heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            capacity=self._capacity(name),
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

    def _capacity(self, name: str) -> int:
        """A head sees all N visual tokens; what comes after pruning holds at most the largest keep-count."""
        if not self.pruners or name == "decoder_head":
            return self.max_length
        return self.max_length - self.count + max(pruner.keep for pruner in self.pruners)

    def _decoder_pruners(self, cues: list[str]) -> None:
        decoder, total = self.family.decoder, self.count + _T
        rows = {0: BATCH, 1: SEQUENCE}
        shapes = {
            "attention_scores": torch.rand(_B, total),
            "keys": self._float(_B, total, decoder.kv_heads * decoder.head_dim),
        }
        inputs = [
            GraphInput("hidden_states", self._float(_B, total, decoder.width), rows),
            GraphInput("position_ids", torch.arange(total).repeat(_B, 1), rows),
            GraphInput("image_start", torch.ones(_B, dtype=torch.int64), {0: BATCH}),
            *(GraphInput(cue, shapes[cue], rows) for cue in cues),
        ]
        outputs = ["keep_indices", "kept_hidden_states", "kept_position_ids"]
        kept = {"kept_hidden_states": {1: "kept_sequence"}, "kept_position_ids": {1: "kept_sequence"}}
        for pruner in self.pruners:
            name = self._pruner_name(pruner)
            self._add(GraphSpec(name, DecoderPruner(pruner, cues), inputs, outputs, kept, rewrite=False))
            reads = [item.name for item in inputs]
            self._stage("pruner", "prefill", reads, outputs, file=name, keep=pruner.keep)

    # -- once a token --------------------------------------------------------------------------------------

    def _step_stages(self) -> None:
        self._stage("embed_tokens", "step", ["input_ids"], ["inputs_embeds"])
        reads = {"inputs_embeds": "inputs_embeds", "position_ids": "position_ids"}
        if self.layer is None:
            self._stage("decoder", "step", reads, ["logits"])
            return
        self._stage("decoder_head", "step", reads, ["hidden_states"])
        reads = {"hidden_states": "hidden_states", "position_ids": "position_ids"}
        self._stage("decoder", "step", reads, ["logits"])

    # -- small things --------------------------------------------------------------------------------------

    def _pruner_name(self, pruner: Pruner) -> str:
        return "pruner" if len(self.pruners) == 1 else f"pruner_{pruner.keep}"

    def _add(self, spec: GraphSpec) -> None:
        self.graphs.append(spec)

    def _stage(
        self,
        name: str,
        when: str,
        inputs: dict[str, str] | list[str],
        outputs: list[str],
        file: str = "",
        keep: int | None = None,
    ) -> None:
        reads = inputs if isinstance(inputs, dict) else {item: item for item in inputs}
        gives = {item: item for item in outputs}
        self.stages.append(StageInfo(name, f"{file or name}.onnx", when, keep, reads, gives))

    def _float(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype)
