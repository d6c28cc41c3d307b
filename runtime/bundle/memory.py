"""What a bundle needs in memory, told before anything is loaded: every shape is bounded at export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vtp.engines import Capabilities, capabilities
from vtp.engines.graph.memory import graph_memory
from vtp.runtime.bundle.caches import FILLED, kv_pairs
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.manifest import SINGLE, GraphInfo, Manifest

# Beside a bundle, measured on x86: Python with the runtime and ONNX Runtime; a CUDA context with cuBLAS.
PROCESS = 100_000_000
CUDA_CONTEXT = 500_000_000
# On the CPU, ONNX Runtime widens float16 weights to float32 and keeps the originals (measured: 2.8 times).
_WIDENED = 3
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one graph of a bundle, on the engine asked about; activations are an upper bound.

    `unknown` counts inner tensors of unknown shape, which the bound leaves out.
    """

    file: str
    weights: int
    cache: int
    activations: int
    unknown: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.cache + self.activations


@dataclass(frozen=True)
class BundleMemory:
    """Bytes of a bundle with every stage open, one conversation at the full length."""

    engine: str
    stages: list[StageMemory]
    beside: int

    @property
    def total(self) -> int:
        """All stages and what the engine takes beside them."""
        return self.beside + sum(stage.total for stage in self.stages)


def bundle_memory(bundle: Bundle, engine: str, keep: int | None = None) -> BundleMemory:
    """Memory of a bundle on an engine, batch 1, at the longest prompt and answer that it was exported for.

    keep  the keep-count that all prompts use (None: the longest sequence that each graph takes). Weights of
          other keep-counts and the cache stay: a pipeline opens all graphs, with caches of fixed size.

    Every open graph is counted with all it may hold at once: engines do not give memory back between stages.
    """
    able = capabilities(engine)
    longest = {} if keep is None else _longest(bundle.manifest, keep)
    stages = [
        _stage(bundle, file, graph, able, longest.get(file, {}))
        for file, graph in bundle.manifest.graphs.items()
    ]
    if bundle.manifest.target not in able.cache_in_place:
        stages = [replace(stage, cache=2 * stage.cache) for stage in stages]
    return BundleMemory(engine, stages, PROCESS if able.on_cpu else PROCESS + CUDA_CONTEXT)


def _longest(manifest: Manifest, keep: int) -> dict[str, dict[str, int]]:
    """Graph file -> axes that are shorter at a keep-count, for graphs that run after the last pruner."""
    visual, shorter = manifest.visual, dict[str, dict[str, int]]()
    stages = [stage for when in ("image", "prefill") for stage in manifest.stages_for(when, keep)]
    cuts = [place for place, stage in enumerate(stages) if stage.role == "pruner"]
    for stage in stages[cuts[-1] + 1 :] if cuts else []:
        shorter[stage.file] = {"visual": keep, "sequence": manifest.model.max_length - visual.count + keep}
    return shorter


def _stage(
    bundle: Bundle, file: str, graph: GraphInfo, able: Capabilities, longest: Mapping[str, int]
) -> StageMemory:
    # One prompt; a prompt of several pictures has no more visual tokens than the longest has room for.
    axes = {name: 1 if name in SINGLE else sizes[-1] for name, sizes in graph.axes.items()}
    axes |= {name: min(size, axes[name]) for name, size in longest.items() if name in axes}
    if graph.kv is not None:
        axes[FILLED] = graph.kv.capacity
        if "sequence" in axes:
            axes["sequence"] = min(axes["sequence"], _longest_run(bundle.manifest, file, graph.kv.capacity))
    found = graph_memory(bundle.path(file), axes)
    widened = able.widens_float16 and bundle.manifest.dtype == "float16"
    return StageMemory(
        file,
        found.weights * (_WIDENED if widened else 1),
        cache_bytes(graph),
        found.activations * (2 if widened else 1) + (found.scores if able.on_cpu else 0),
        found.unknown,
    )


def _longest_run(manifest: Manifest, file: str, capacity: int) -> int:
    """Tokens of a prompt, or the one of a step where another graph reads prompts on a decoder's cache."""
    return 1 if any(one.cache_of == file for one in manifest.graphs.values()) else capacity


def cache_bytes(graph: GraphInfo) -> int:
    """Keys, values and states of every layer, one buffer each; past and present share it.

    0 for a graph that works on another's."""
    return 0 if graph.cache_of is not None else kv_bytes(graph) + state_bytes(graph)


def kv_bytes(graph: GraphInfo) -> int:
    """The buffers of keys and values alone; layers may differ in size, and inputs say each."""
    kv = graph.kv
    if kv is None:
        return 0
    shapes = [graph.inputs[name].shape for name in kv_pairs(kv.layers)]
    numbers = sum(int(heads) * kv.capacity * int(size) for _, heads, _, size in shapes)
    return numbers * _DTYPE_BYTES.get(kv.dtype, 4)


def state_bytes(graph: GraphInfo) -> int:
    """The states alone, which do not grow."""
    return sum(state.count * _DTYPE_BYTES.get(state.dtype, 4) for state in graph.states)
