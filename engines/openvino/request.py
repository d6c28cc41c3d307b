"""One request to a graph that OpenVINO compiled: tensors put in place, a run, new tokens into the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from vtp.engines.base import TensorSpec, Value
from vtp.engines.errors import VtpError
from vtp.engines.openvino.attention import Caches
from vtp.engines.openvino.library import load_openvino
from vtp.engines.openvino.reading import reason
from vtp.engines.openvino.value import OvValue, array_of


class Compiled(Protocol):
    """What a request has to know of its engine."""

    compiled: Any
    caches: Caches
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


class Request:
    """What a graph reads stays in place until something else is put there."""

    def __init__(self, engine: Compiled) -> None:
        self._engine = engine
        compiled = self._opened()
        self._request = compiled.create_infer_request()
        self._inputs, self._outputs = _places(compiled.inputs), _places(compiled.outputs)
        self._kinds = [
            (port.get_element_type(), _least(port.get_partial_shape())) for port in compiled.outputs
        ]
        # New tokens are copied to where they belong at once: their tensors serve every run.
        names = [*(self._outputs[name] for name in engine.caches.pairs)]
        names += [] if engine.caches.first is None else [engine.caches.first]
        self._passing = {place: self._place_empty(place) for place in names}

    def place_inputs(self, names: Iterable[str], feeds: Mapping[str, Value]) -> None:
        """Have inputs read from values; VtpError for one that is missing or does not fit."""
        self._opened()
        inputs = self._engine.inputs
        for name in names:
            if name not in feeds:
                raise VtpError(f"input '{name}' is missing; the graph takes {', '.join(inputs)}")
            check_fit("input", inputs[name], feeds[name])
            if name in self._inputs:
                _call(self._request.set_input_tensor, self._inputs[name], feeds[name].tensor)  # type: ignore[attr-defined]

    def run(self, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> dict[str, Value]:
        """Run on the inputs in place; `feeds` are they. Outputs that are not in `into` are allocated."""
        given = {
            name: self._place_output(name, into) for name in self._engine.outputs if not self._is_cache(name)
        }
        _call(self._start)
        outputs = {name: self._taken(name, tensor, into) for name, tensor in given.items()}
        outputs.update(self._write_caches(feeds, into))
        return {name: outputs[name] for name in self._engine.outputs}

    def _opened(self) -> Any:
        if self._engine.compiled is None:
            raise VtpError("this engine is closed; open the graph again")
        return self._engine.compiled

    def _is_cache(self, name: str) -> bool:
        return name in self._engine.caches.pairs

    def _place_output(self, name: str, into: Mapping[str, Value]) -> Any:
        place = self._outputs[name]
        if name not in into:
            return self._place_empty(place)
        tensor = into[name].tensor  # type: ignore[attr-defined]
        _call(self._request.set_output_tensor, place, tensor)
        return tensor

    def _place_empty(self, place: int) -> Any:
        """A tensor that gets its size and memory from the run, where OpenVINO does not know the size."""
        openvino = load_openvino()
        kind, shape = self._kinds[place]
        tensor = openvino.Tensor(kind, openvino.Shape(shape))
        _call(self._request.set_output_tensor, place, tensor)
        return tensor

    def _start(self) -> None:
        """`infer` would copy every output."""
        self._request.start_async()
        self._request.wait()

    def _taken(self, name: str, tensor: Any, into: Mapping[str, Value]) -> Value:
        if name not in into:
            return OvValue(tensor.data, tensor)
        if tuple(tensor.shape) != into[name].shape:
            raise VtpError(
                f"OpenVINO failed while running the graph: output '{name}' came as {list(tensor.shape)}, "
                f"and its place is {list(into[name].shape)}"
            )
        return into[name]

    def _write_caches(self, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> dict[str, Value]:
        """Put the new tokens of every cache behind those that it holds."""
        caches = self._engine.caches
        if caches.first is None:
            return {}
        first, written = self._passing[caches.first].data, dict[str, Value]()
        for name, past in caches.pairs.items():
            new = self._passing[self._outputs[name]].data
            written[name] = _room(name, feeds[past], into)
            _write(array_of(written[name]), new, first)
        return written


def _room(name: str, past: Value, into: Mapping[str, Value]) -> Value:
    """Where a cache is to lie: the place it has, or another one with the same tokens in it."""
    if name not in into:
        return OvValue(past.numpy())
    if (room := array_of(into[name])) is not (old := array_of(past)):
        if room.shape != old.shape:
            raise VtpError(
                f"output '{name}' is bound to {list(room.shape)}, and the cache is {list(old.shape)}"
            )
        if not np.shares_memory(room, old):
            room[...] = old
    return into[name]


def _write(cache: np.ndarray, new: np.ndarray, first: np.ndarray) -> None:
    """Write new [B,H,S,D] into cache [B,H,capacity,D], in row b from place first[b] on."""
    count, last = new.shape[2], int(first.max()) + new.shape[2]
    if last > cache.shape[2]:
        raise VtpError(f"{last} tokens exceed this cache of {cache.shape[2]}; shorten the prompt")
    if len(first) == 1 or (first == first[0]).all():
        cache[:, :, first[0] : first[0] + count] = new
        return
    for row, place in enumerate(first):
        cache[row, :, place : place + count] = new[row]


def _call(act: Callable[..., None], *arguments: Any) -> None:
    """Something that OpenVINO does; VtpError where it fails."""
    try:
        act(*arguments)
    except Exception as error:  # RuntimeError, and what C++ calls otherwise
        raise VtpError(f"OpenVINO failed while running the graph: {reason(error)}") from error


def _least(shape: Any) -> list[int]:
    """Zeros for the shape of an output that is only known after a run."""
    return list(shape.to_shape()) if shape.is_static else [0] * shape.rank.get_length()


def check_fit(kind: str, spec: TensorSpec, value: Value) -> None:
    """VtpError for a value of another shape or dtype than an input or output has."""
    fits = len(value.shape) == len(spec.shape) and all(
        isinstance(want, str) or want == have for want, have in zip(spec.shape, value.shape, strict=True)
    )
    if not fits or value.dtype != spec.dtype:
        raise VtpError(
            f"{kind} '{spec.name}' is bound to {value.dtype}{list(value.shape)}; "
            f"the graph wants {spec.dtype}{list(spec.shape)}"
        )


def _places(ports: Iterable[Any]) -> dict[str, int]:
    return {name: place for place, port in enumerate(ports) for name in port.get_names()}
