"""What a bundle can be made for: the facts that differ between targets, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vtp.engines import UsageError
from vtp.engines.graph.masks import SINCE
from vtp.export.graphs.attention.decomposed import DECOMPOSED, MASKED
from vtp.export.graphs.attention.fixed_cache import FIXED_CACHE, fix_capacity
from vtp.export.graphs.attention.fixed_cache import OPSET as FIXED_CACHE_OPSET
from vtp.export.graphs.attention.masked_query import MASKED_QUERY
from vtp.export.graphs.attention.operators import GROUPED_QUERY, Attending
from vtp.export.graphs.attention.states import RECURRENT
from vtp.export.graphs.decoder import Decoder
from vtp.export.onnx.emit import OPSET, GraphSpec
from vtp.export.onnx.lower import OPSET as DECOMPOSED_OPSET
from vtp.export.plan.plan import Plan
from vtp.runtime.bundle.manifest import TILES

Version = tuple[int, ...]
OLDEST: Version = (1, 23)  # onnxruntime, as the extra `ort` in pyproject.toml


@dataclass(frozen=True)
class Target:
    """How graphs are written for one kind of engine.

    dtype         the default; what most of its devices are fastest in
    attending     what attention (on a cache and in towers), rotary embeddings and RMS norms are written as
    static_cache  whether the cache's length is a constant of the graph
    float64       whether the engine computes in float64; methods that would like to are told if not
    """

    name: str
    opset: int
    dtype: str
    attending: Attending
    static_cache: bool
    float64: bool

    def serving(self, decoder: Decoder, oldest: Version = OLDEST) -> Target:
        """This target for a decoder: masked attention if its tokens do not just see all before them.

        oldest  the oldest onnxruntime that has to open the graphs

        Raises UsageError for linear attention on a target without an operator for it.
        """
        if self.attending is not GROUPED_QUERY and any(one.name == RECURRENT for one in decoder.states):
            raise UsageError(
                f"target {self.name} has no operator for linear attention, which layers {_some(decoder)} of "
                "this decoder are: it would take a loop over the prompt; leave out --target, or give ort"
            )
        causal = decoder.mask_kind == "causal" and not decoder.windows
        plain = causal or self.attending is not GROUPED_QUERY
        masked = MASKED_QUERY if oldest >= SINCE else MASKED
        return self if plain else replace(self, attending=masked)

    def prepare(self, plan: Plan) -> Plan:
        """The plan as this target wants it."""
        if not self.float64:
            for part in (module for spec in plan.graphs for module in spec.module.modules()):
                if hasattr(part, "exact"):
                    part.exact = False  # type: ignore[assignment]
        if not self.static_cache:
            return plan
        graphs = [
            fix_capacity(spec, plan.caches[spec.name].capacity) if spec.name in plan.caches else spec
            for spec in plan.graphs
        ]
        return replace(plan, graphs=list(map(_with_all_tiles, graphs)))


def _with_all_tiles(spec: GraphSpec) -> GraphSpec:
    """A graph that takes a picture's tiles in any number as one that takes all: an engine that is built for
    one size does better."""
    if not any(TILES in item.dynamic.values() for item in spec.inputs):
        return spec
    inputs = [
        replace(item, dynamic={axis: name for axis, name in item.dynamic.items() if name != TILES})
        for item in spec.inputs
    ]
    return replace(spec, inputs=inputs, output_axes={})


def _some(decoder: Decoder) -> str:
    """The first layers with a recurrent state, in words."""
    layers = next(state.layers for state in decoder.states if state.name == RECURRENT)
    return ", ".join(map(str, layers[:3])) + (" and others" if len(layers) > 3 else "")


TARGETS = {
    target.name: target
    for target in (
        Target("ort", OPSET, "float32", GROUPED_QUERY, static_cache=False, float64=True),
        # TensorRT 10.15 and TensorRT-RTX 1 or newer: standard operators only.
        Target("tensorrt", FIXED_CACHE_OPSET, "float16", FIXED_CACHE, static_cache=True, float64=False),
        # TensorRT 10.3: no operator for attention, rotary embeddings, RMS norms or the cache.
        Target("jetpack6", DECOMPOSED_OPSET, "float16", DECOMPOSED, static_cache=True, float64=False),
    )
}
