"""What a pipeline keeps of the prompt before: the decoder's cache, as far as the next prompt begins alike.

Off unless asked for, as the vision feature cache is.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vtp.engines import Engine, UsageError, Value
from vtp.engines.graph.file import read_graph
from vtp.runtime.bundle.folder import Bundle

_CAUSAL = "GroupQueryAttention"  # exporters write it for plain causal attention only


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
            f"prefix_caching does not support method {manifest.method.name}, which chooses inside the "
            "decoder from a prompt as a whole; leave it out, or export with a method at the vision or "
            "projector site"
        )
    operators = {node.op for file in files for node in read_graph(bundle.path(file)).nodes}
    if _CAUSAL not in operators:
        raise UsageError(
            f"prefix_caching does not support this bundle (family {manifest.model.family}, target "
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
