"""The interface that every engine serves: open a graph, describe it, run it, keep values on its device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vtp.engines.errors import VtpError


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph. `dtype` is numpy's name; a dynamic axis is a string."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do on any machine that has it; `vtp.engines.capabilities` gives them by name.

    device            where graphs run and values lie: "cpu" or "cuda"
    targets           the export targets whose graphs it runs
    widens_float16    computes float16 graphs in float32, holding the weights in both
    built             runs what vtp-build made of a graph on this device, not the graph's file
    largest_batch     most rows (prompts, or pictures of one) in a run; None: as many as the graph takes
    replays           can record runs with fixed places and replay them
    cache_in_place    the targets whose KV cache is read and written at one place; others take two
    proven            whether its code ever ran on its hardware; if not, it runs only when asked for by name
    float64           computes in float64 where a graph says so; another refuses such a graph
    """

    device: str
    targets: tuple[str, ...]
    widens_float16: bool = False
    built: bool = False
    largest_batch: int | None = None
    replays: bool = True
    cache_in_place: tuple[str, ...] = ("ort", "tensorrt", "jetpack6")
    proven: bool = True
    float64: bool = True

    @property
    def on_cpu(self) -> bool:
        """Whether it shares the host's memory."""
        return self.device == "cpu"


class Value(Protocol):
    """A tensor on an engine's device. Only the engine that made it may run on it or update it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def numpy(self) -> np.ndarray:
        """Copy the tensor to the host."""
        ...

    def view(self) -> np.ndarray:
        """The tensor to be read on the host now: not copied where it lies there, so that the next update or
        run may change what is seen."""
        ...

    def update(self, array: np.ndarray) -> None:
        """Overwrite the tensor in place: same shape, same dtype, same address."""
        ...


class Binding(ABC):
    """A graph with every input and output at a fixed place, to be run many times without set-up."""

    outputs: dict[str, Value]

    @abstractmethod
    def run(self) -> None:
        """Run the graph on what the bound inputs hold now; the bound outputs hold the answer."""


class _PlainBinding(Binding):
    """Fixed places for an engine that has no set-up to save."""

    def __init__(self, engine: Engine, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> None:
        self.outputs = dict(into)
        self._engine, self._feeds = engine, dict(feeds)

    def run(self) -> None:
        self._engine.run(self._feeds, self.outputs)


class Held:
    """A graph with some inputs and outputs at fixed places; every run brings the others."""

    def __init__(self, engine: Engine, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> None:
        self._engine = engine
        self._feeds, self._into = dict(feeds), dict(into)

    def run(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run once with the inputs that are not held; as `Engine.run`."""
        return self._engine.run({**self._feeds, **feeds}, self._into)


class Engine(ABC):
    """One opened graph. Not safe for use from several threads at once.

    notes        what was asked for and could not be done, a line each; may grow while the engine runs
    shares_rows  whether `rows` and `copy_row` work: values lie where their rows can be used one by one
    """

    notes: Sequence[str] = ()
    shares_rows = False
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    @abstractmethod
    def put(self, array: np.ndarray) -> Value:
        """Copy a host array to this engine's device."""

    def adopt(self, value: Value) -> Value:
        """A value of another engine on the same device as one of this engine's own, in the same memory."""
        return value

    @abstractmethod
    def zeros(self, shape: Sequence[int], dtype: str) -> Value:
        """Allocate a zeroed tensor on this engine's device."""

    def rows(self, value: Value, first: int, count: int) -> Value:
        """Rows first .. first + count - 1 of a value that `zeros` made: a value in the same memory."""
        raise VtpError(f"{type(self).__name__} gives no part of a tensor; use ort-cpu")

    def copy_row(self, value: Value, source: int, target: int, places: int) -> None:
        """Copy, in a value [B,H,S,D] that `zeros` made, the first `places` of axis 2 from row to row."""
        raise VtpError(f"{type(self).__name__} copies no part of a tensor; use ort-cpu")

    def bind(self, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> Binding:
        """Fix the graph's inputs and (all of) its outputs; an input and an output may share a value.

        An engine may set them up once for all runs.
        """
        return _PlainBinding(self, feeds, into)

    @abstractmethod
    def run(self, feeds: Mapping[str, Value], into: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """Run once. Outputs named in `into` are written there, the others are allocated; all are returned."""

    def hold(self, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> Held:
        """Fix some inputs and outputs for many runs, such as a cache: an engine may do it once for all."""
        return Held(self, feeds, into)

    @abstractmethod
    def close(self) -> None:
        """Free the graph and its weights. Values it made stay valid."""
