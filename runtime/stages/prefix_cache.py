"""What a pipeline keeps of the prompt before: the decoder's cache, as far as the next prompt begins alike.

Off unless asked for, as the vision feature cache is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vtp.engines import Engine, UsageError, Value
from vtp.engines.graph.file import read_graph
from vtp.engines.graph.masks import masks_attention
from vtp.runtime.bundle.folder import Bundle

_CAUSAL = "GroupQueryAttention"  # unless it takes masks, exporters write it for plain causal attention only


class Prefix:
    """The rows that fill a decoder's cache, so that a prompt that begins alike is read on from there.

    Rows are compared as the decoder's graph takes them, embeddings and positions: in causal attention equal
    rows have equal keys and values, whichever picture, method or keep-count they come from. For one
    conversation at a time (batch 1).
    """

    def __init__(self) -> None:
        self.reused = 0  # rows of the last prompt that were not read again
        self._rows: dict[str, list[np.ndarray]] = {}  # graph's input -> pieces [1,S,...]

    def begin(self, feeds: Mapping[str, Value]) -> int:
        """How many first rows of a prompt [1,S,...] lie in the cache: all but one of them at most."""
        given = {name: value.numpy() for name, value in feeds.items()}
        return self._go_on(given, self.shared(given))

    def shared(self, given: Mapping[str, np.ndarray]) -> int:
        """How many first rows of a prompt are those that fill this cache."""
        if not self._rows or not _single(given):
            return 0
        return _equal_rows(
            {name: np.concatenate(pieces, axis=1) for name, pieces in self._rows.items()}, given
        )

    def _go_on(self, given: Mapping[str, np.ndarray], reused: int) -> int:
        """Keep the first `reused` rows, to which the others of the prompt will be added."""
        self.reused = reused
        rows = {name: [array[:, :reused]] for name, array in given.items()}
        self._rows = rows if _single(given) else {}
        return reused

    def add(self, feeds: Mapping[str, Value]) -> None:
        """Note rows that have joined the cache."""
        self.note({name: value.numpy() for name, value in feeds.items()})

    def note(self, given: Mapping[str, np.ndarray]) -> None:
        """The same, of rows [1,S,...] on the host."""
        for name, pieces in self._rows.items():
            pieces.append(given[name])


class SlotPrefix(Prefix):
    """The rows of one of several caches, whose prompts begin with what any of them holds.

    slots  all of them, this one among them
    copy   copies the first rows of one cache to another: source, target, how many
    """

    def __init__(self, slots: list[SlotPrefix], copy: Callable[[int, int, int], None]) -> None:
        super().__init__()
        self._slots, self._copy = slots, copy

    def begin(self, feeds: Mapping[str, Value]) -> int:
        """How many first rows of a prompt [1,S,...] lie in this cache, once they are copied to it."""
        given = {name: value.numpy() for name, value in feeds.items()}
        own, found = self._slots.index(self), [one.shared(given) for one in self._slots]
        best = own if found[own] == max(found) else found.index(max(found))
        if best != own:
            self._rows = {}  # not its rows any more, should the copying fail
            self._copy(best, own, found[best])
        return self._go_on(given, found[best])

    def follow(self, other: SlotPrefix) -> None:
        """Take over what is known of a cache that was copied whole."""
        self._rows = {name: list(pieces) for name, pieces in other._rows.items()}


class StepPrefix(Prefix):
    """Tells several caches, each of its own row, what has joined them."""

    def __init__(self, slots: Sequence[SlotPrefix]) -> None:
        super().__init__()
        self._slots = slots

    def add(self, feeds: Mapping[str, Value]) -> None:
        """Note rows [B,1,...] that have joined the caches, one each."""
        given = {name: value.numpy() for name, value in feeds.items()}
        for row, slot in enumerate(self._slots):
            slot.note({name: array[row : row + 1] for name, array in given.items()})


def rest_of(feeds: Mapping[str, Value], first: int, engine: Engine) -> dict[str, Value]:
    """Rows [B,S,...] from `first` on."""
    if not first:
        return dict(feeds)
    return {name: engine.put(value.numpy()[:, first:]) for name, value in feeds.items()}


def check_prefix(bundle: Bundle) -> None:
    """UsageError where a prompt cannot be read on from a filled cache."""
    manifest = bundle.manifest
    files = [file for file, graph in manifest.graphs.items() if graph.kv is not None]
    if sum(manifest.graphs[file].cache_of is None for file in files) > 1:
        then = manifest.method.then
        what = f"method {manifest.method.name}" if then is None else f"a bundle with --then {then.name}"
        cure = "with a method at the vision or projector site" if then is None else "without --then"
        raise UsageError(
            f"prefix_caching does not support {what}, which chooses inside the decoder from a prompt as a "
            f"whole; leave it out, or export {cure}"
        )
    if any(graph.states for graph in manifest.graphs.values()):
        raise UsageError(
            f"prefix_caching does not support this bundle (family {manifest.model.family}): its decoder has "
            "layers with a state, which cannot be cut back to the beginning of a prompt; leave it out"
        )
    graphs = [read_graph(bundle.path(file)) for file in files]
    operators = {node.op for graph in graphs for node in graph.nodes}
    if _CAUSAL not in operators or any(map(masks_attention, graphs)):
        raise UsageError(
            f"prefix_caching does not support this bundle (family {manifest.model.family}, target "
            f"{manifest.target}): its decoder reads a prompt in one piece; leave it out"
        )


def _single(given: Mapping[str, np.ndarray]) -> bool:
    return all(array.shape[0] == 1 for array in given.values())


def _equal_rows(known: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray]) -> int:
    """Length of the beginning in which all arrays [1,S,...] agree; at most S - 1 of `given`."""
    count = min(array.shape[1] for array in known.values())
    for name, array in given.items():
        count = min(count, array.shape[1] - 1)
        same = known[name][0, :count] == array[0, :count]
        rows = same.reshape(count, -1).all(axis=1)
        count = count if rows.all() else int(rows.argmin())
    return count
