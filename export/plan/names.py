"""Every name of a bundle that is made up: graphs, tensors around the decoder's cuts, and dynamic axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vtp.runtime.bundle.manifest import StageInfo
from vtp.runtime.bundle.then_info import THEN

# Dynamic axes.
BATCH, SEQUENCE, TEXT, ROWS, VISUAL, CAPACITY = (
    "batch",
    "sequence",
    "text",
    "text_rows",
    "visual",
    "capacity",
)
SECOND = THEN  # ends the names of tensors around the cut of `--then`
IMAGES, PICTURES = "images", "pictures"  # of one prompt; of all prompts of a batch
KEPT_SEQUENCE = "kept_sequence"

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


def axes(name: str) -> dict[int, str]:
    """The dynamic axes of a tensor, as axis -> name."""
    return {0: BATCH, **_AXES.get(name, {})}


# In what follows, `cuts` are the layers before which a decoder is cut, `number` counts its parts from 0, and
# the pruner after part `number` has the same number.


def part_name(number: int, cuts: Sequence[int]) -> str:
    """The graph of a part of the decoder: decoder_head, decoder_1, … decoder; a whole one is decoder."""
    if number == len(cuts):
        return "decoder"
    return "decoder_head" if number == 0 else f"decoder_{number}"


def part_role(number: int, cuts: Sequence[int]) -> str:
    """The role of a part: the last one, or a whole decoder, gives the logits."""
    return "decoder" if number == len(cuts) else "decoder_head"


def part_source(number: int, cuts: Sequence[int]) -> str:
    """The input of a part: a middle one gives hidden_states itself, and no graph has a name twice."""
    if number == 0:
        return "inputs_embeds"
    return "hidden_states" if number == len(cuts) else "kept_hidden_states"


def tail(number: int, cuts: Sequence[int]) -> str:
    """What is added to the pipeline's names around a cut: nothing at the last one (or the only one)."""
    return "" if number + 1 >= len(cuts) else f".{number + 1}"


def pruner_name(number: int, sites: int, keep: int | None) -> str:
    """The graph of one of `sites` pruners: pruner, or pruner_<i>, with the keep-count if not None."""
    name = f"pruner_{number + 1}" if sites > 1 else "pruner"
    return name if keep is None else f"{name}_{keep}"


def stage(
    name: str,
    when: str,
    inputs: Mapping[str, str] | Sequence[str],
    outputs: Mapping[str, str] | Sequence[str],
    file: str = "",
    keep: int | None = None,
    role: str = "",
) -> StageInfo:
    """One run of graph `file` (or `name`); without a `role` its name says it.

    Tensors without another name in the pipeline keep their own.
    """
    return StageInfo(name, role or name, f"{file or name}.onnx", when, keep, _map(inputs), _map(outputs))


def _map(names: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    return dict(names) if isinstance(names, Mapping) else {name: name for name in names}
