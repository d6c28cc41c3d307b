"""What a decoder carries from run to run, as the manifest describes it: keys and values, and states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

LENGTHS = ("seqlens_k", "total_sequence_length")  # by these inputs a graph learns how much is filled
FILLED = "filled"  # axis of a decoder's inner tensors: tokens of the longest row after a run
_PAST, _PRESENT = "past_key_values.", "present."


@dataclass(frozen=True)
class KvInfo:
    """The KV cache of one decoder stage: one [batch, heads, capacity, head_dim] key and value per layer.

    `layers` are absolute layer numbers of those with keys and values of their own; none where every layer of
    the stage has a state. If they differ in heads or head_dim, these are the first one's, and the graph's
    inputs say each. `lengths` is how the graph learns what is filled: "seqlens_k" is that of
    GroupQueryAttention (int32 [B] valid tokens minus one, and int32 scalar total_sequence_length).
    """

    layers: list[int]
    heads: int
    head_dim: int
    capacity: int
    dtype: str
    lengths: str


@dataclass(frozen=True)
class StateTensors:
    """One kind of state of a decoder stage: a tensor [batch, *shape] for each of `layers`.

    It stands in for keys and values where a layer sums up all that came before, such as the last inputs of a
    convolution ("conv") or the matrix of linear attention ("recurrent"). The graph takes it as past_NAME.L
    and gives it as present_NAME.L. Every run replaces it as a whole, so that it never grows and cannot be cut
    back to an earlier token; padding on the right of a row does not enter it. A run on an empty cache (as
    many tokens as total_sequence_length says) starts from zeros, whatever the tensor holds.
    """

    name: str
    layers: list[int]
    shape: list[int]
    dtype: str

    @property
    def pairs(self) -> dict[str, str]:
        """Graph's input -> output, layer by layer."""
        return {f"past_{self.name}.{layer}": f"present_{self.name}.{layer}" for layer in self.layers}

    @property
    def count(self) -> int:
        """Numbers in all of them together, for one row."""
        return len(self.layers) * prod(self.shape)


def kv_pairs(layers: Sequence[int]) -> dict[str, str]:
    """Graph's input -> output of every key and value, layer by layer."""
    slots = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    return {f"{_PAST}{slot}": f"{_PRESENT}{slot}" for slot in slots}


def present_of(name: str) -> str | None:
    """The output that goes where the input `name` lies: of keys, values and states; None for other inputs."""
    if name.startswith(_PAST):
        return _PRESENT + name.removeprefix(_PAST)
    return name.replace("past_", "present_", 1) if name.startswith("past_") else None


def cache_problem(file: str, graph: Any, longest: int) -> str:
    """What does not fit between a manifest's graph (a GraphInfo) and its cache; "" if all does.

    longest  the most tokens that a prompt and its answer may have
    """
    kv = graph.kv
    if kv is None:
        return f"{file} has states and no cache to tell their lengths" if graph.states else ""
    if not (kv.heads > 0 and kv.head_dim > 0 and (kv.layers or graph.states)):
        return f"the cache of {file} is empty"
    if not 0 < kv.capacity <= longest:
        return f"the cache of {file} has {kv.capacity} places, not 1 to {longest}"
    for state in graph.states:
        if min(state.shape, default=0) < 1:
            return f"the {state.name} states of {file} are empty"
    for name in [*_unfit_keys(kv, graph.inputs), *_unfit_states(graph.states, graph.inputs)]:
        return f"the cache of {file} does not fit its inputs at layer {name.split('.')[1]}"
    lacking = [name for name in graph.carried.values() if name not in graph.outputs]
    return f"{file} does not give {lacking[0]}" if lacking else ""


def sharing_problem(file: str, manifest: Any) -> str:
    """What keeps one of a manifest's graphs from working on the cache of another; "" if nothing does.

    It reads prompts where the other takes steps, and is the only such graph beside it.
    """
    graphs = manifest.graphs
    graph, name = graphs[file], graphs[file].cache_of
    if name is None:
        return ""
    owner = graphs.get(name)
    if owner is None or owner.kv is None or owner.cache_of is not None:
        return f"{file} works on the cache of {name!r}, which has none of its own"
    parts = ("inputs", "outputs", "axes", "kv", "states")
    if any(getattr(graph, part) != getattr(owner, part) for part in parts):
        return f"{file} works on the cache of {name} and differs from it"
    moments = {(stage.file, stage.when) for stage in manifest.stages if stage.file in (file, name)}
    if moments != {(file, "prefill"), (name, "step")}:
        return f"{file} works on the cache of {name}, but they do not read prompts and take steps"
    others = [other for other, one in graphs.items() if one.cache_of == name]
    return "" if len(others) == 1 else f"several graphs work on the cache of {name}"


def unused_cache(manifest: Any, keep: int) -> str:
    """A cache that prompts of a keep-count fill and steps do not read, or the other way round; "" without."""
    filled, read = (
        {manifest.graphs[stage.file].cache_of or stage.file for stage in stages}
        for stages in (
            [one for one in manifest.stages_for(when, keep) if manifest.graphs[one.file].kv is not None]
            for when in ("prefill", "step")
        )
    )
    for file in sorted(filled ^ read):
        moments = ("prompts fill", "steps do not") if file in filled else ("steps read", "prompts do not")
        return f"the cache of {file} is one that {' and '.join(moments)}, at {keep} visual tokens"
    return ""


def _unfit_keys(kv: KvInfo, inputs: Mapping[str, Any]) -> Iterator[str]:
    """Names of keys and values whose inputs are not of `kv`, which has the first layer's sizes."""
    first = {name: [kv.heads, kv.head_dim] for name in kv_pairs(kv.layers[:1])}
    for name in kv_pairs(kv.layers):
        info = inputs.get(name)
        sizes = info.shape[1::2] if info and info.dtype == kv.dtype and len(info.shape) == 4 else [0]
        if not all(isinstance(size, int) and size > 0 for size in sizes) or sizes != first.get(name, sizes):
            yield name


def _unfit_states(states: Sequence[StateTensors], inputs: Mapping[str, Any]) -> Iterator[str]:
    for state in states:
        for name in state.pairs:
            info = inputs.get(name)
            if info is None or info.dtype != state.dtype or info.shape[1:] != state.shape:
                yield name
