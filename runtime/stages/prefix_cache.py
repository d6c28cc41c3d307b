"""What a pipeline keeps of earlier answers: image stages' outputs by picture, and the decoder's cache.

Both are off unless asked for: an answer's timings then mean what they say, and it depends on nothing that was
asked before. Knows values and caches; names no family and no method.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vtp.engines import Engine, UsageError, Value
from vtp.engines.graph.file import read_graph
from vtp.runtime.bundle.folder import Bundle

StageKey = tuple[str, "int | None"]  # file, keep-count
# What image stages gave for one picture: stage -> pipeline name -> value.
Seen = dict[StageKey, dict[str, Value]]
Put = Callable[[np.ndarray], Value]
_CAUSAL = "GroupQueryAttention"  # exporters write it for plain causal attention only


class ImageCache:
    """What the image stages gave for the pictures of the last `most` prompts; those unused for longest go
    first. Pictures are told apart by a hash of their pixel_values, in which the preprocessing is contained.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._prompts: OrderedDict[tuple[bytes, ...], None] = OrderedDict()
        self._seen: dict[bytes, Seen] = {}

    def find(self, pictures: Sequence[np.ndarray]) -> list[Seen] | None:
        """An entry for each picture of one prompt, to be read and added to; None for a cache of none."""
        if not self._most:
            return None
        names = tuple(_digest(picture) for picture in pictures)
        self._prompts[names] = None
        self._prompts.move_to_end(names)
        if len(self._prompts) > self._most:
            self._prompts.popitem(last=False)
        wanted = {name for prompt in self._prompts for name in prompt}
        self._seen = {name: self._seen.get(name, {}) for name in wanted}
        return [self._seen[name] for name in names]

    def find_all(self, prompts: Sequence[Sequence[np.ndarray]]) -> list[Seen] | None:
        """The entries of several prompts' pictures, in their order."""
        found = [self.find(pictures) for pictures in prompts]
        return [seen for entries in found for seen in entries or ()] if self._most else None

    def clear(self) -> None:
        """Forget every picture."""
        self._prompts.clear()
        self._seen.clear()

    @property
    def bytes(self) -> int:
        """Memory that the kept outputs take."""
        outputs = [outputs for seen in self._seen.values() for outputs in seen.values()]
        kept = {id(value): value for values in outputs for value in values.values()}
        return sum(int(np.prod(value.shape)) * value.dtype.itemsize for value in kept.values())


def _digest(picture: np.ndarray) -> bytes:
    digest = hashlib.sha256(repr(picture.shape).encode())
    digest.update(np.ascontiguousarray(picture).data)
    return digest.digest()


def recall(seen: Sequence[Seen], stage: StageKey, put: Put) -> dict[str, Value] | None:
    """What a stage gave for these pictures, one after the other; None unless all of them are known."""
    known = [one[stage] for one in seen if stage in one]
    if len(known) < len(seen):
        return None
    if len(known) == 1:
        return known[0]
    return {name: put(np.concatenate([one[name].numpy() for one in known])) for name in known[0]}


def note(seen: Sequence[Seen], stage: StageKey, outputs: Mapping[str, Value], put: Put) -> None:
    """Keep what a stage gave for these pictures: the rows of each of them with its own entry."""
    if len(seen) == 1:
        seen[0][stage] = dict(outputs)
        return
    rows = {name: rows_of(value, len(seen)) for name, value in outputs.items()}
    for place, one in enumerate(seen):
        one[stage] = {name: put(parts[place]) for name, parts in rows.items()}


def rows_of(value: Value, pictures: int) -> list[np.ndarray]:
    """An output of an image stage cut into those of its pictures, which have equally many rows."""
    return [np.ascontiguousarray(part) for part in np.split(value.numpy(), pictures)]


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
        known = {name: np.concatenate(pieces, axis=1) for name, pieces in self._rows.items()}
        single = all(array.shape[0] == 1 for array in given.values())
        self.reused = _equal_rows(known, given) if single and known else 0
        self._rows = {name: [array[:, : self.reused]] for name, array in given.items()} if single else {}
        return self.reused

    def add(self, feeds: Mapping[str, Value]) -> None:
        """Note rows that have joined the cache."""
        for name, pieces in self._rows.items():
            pieces.append(feeds[name].numpy())


def rest_of(feeds: Mapping[str, Value], first: int, engine: Engine) -> dict[str, Value]:
    """Rows [B,S,...] from `first` on."""
    if not first:
        return dict(feeds)
    return {name: engine.put(value.numpy()[:, first:]) for name, value in feeds.items()}


def check_prefix(bundle: Bundle) -> None:
    """UsageError where a prompt cannot be read on from a filled cache."""
    manifest = bundle.manifest
    files = [file for file, graph in manifest.graphs.items() if graph.kv is not None]
    if len(files) > 1:
        raise UsageError(
            f"reuse_prompt does not serve method {manifest.method.name}, which chooses inside the decoder "
            "from a prompt as a whole; leave it out, or export with a method at the vision or projector site"
        )
    operators = {node.op for file in files for node in read_graph(bundle.path(file)).nodes}
    if _CAUSAL not in operators:
        raise UsageError(
            f"reuse_prompt does not serve this bundle (family {manifest.model.family}, target "
            f"{manifest.target}): its decoder reads a prompt in one piece; leave it out"
        )


def _equal_rows(known: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray]) -> int:
    """Length of the beginning in which all arrays [1,S,...] agree; at most S - 1 of `given`."""
    count = min(array.shape[1] for array in known.values())
    for name, array in given.items():
        count = min(count, array.shape[1] - 1)
        same = known[name][0, :count] == array[0, :count]
        rows = same.reshape(count, -1).all(axis=1)
        count = count if rows.all() else int(rows.argmin())
    return count
