"""What a decoder carries from run to run, as the manifest describes it: keys and values, and states."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

LENGTHS = ("seqlens_k", "total_sequence_length")  # by these inputs a graph learns how much is filled
_PAST, _PRESENT = "past_key_values.", "present."


@dataclass(frozen=True)
class KvInfo:
    """The KV cache of one decoder stage: one [batch, heads, capacity, head_dim] key and value per layer.

    `layers` are absolute layer numbers; none where every layer of the stage has a state instead. `lengths`
    names the convention by which the graph learns how much of the cache is filled: "seqlens_k" is
    GroupQueryAttention's (int32 [B] valid tokens minus one, and int32 scalar total_sequence_length).
    """

    layers: list[int]
    heads: int
    head_dim: int
    capacity: int
    dtype: str
    lengths: str

    @property
    def slots(self) -> list[str]:
        """ "L.key" and "L.value" of every layer, in the order of the graph's inputs."""
        return [f"{layer}.{part}" for layer in self.layers for part in ("key", "value")]


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


def kv_pairs(kv: KvInfo) -> dict[str, str]:
    """Graph's input -> output of every key and value, layer by layer."""
    return {f"{_PAST}{slot}": f"{_PRESENT}{slot}" for slot in kv.slots}


def present_of(name: str) -> str | None:
    """The output that goes where the input `name` lies: of keys, values and states; None for other inputs."""
    if name.startswith(_PAST):
        return _PRESENT + name.removeprefix(_PAST)
    return name.replace("past_", "present_", 1) if name.startswith("past_") else None
