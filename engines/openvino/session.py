"""OpenVINO behind the Engine interface: one graph, compiled for a device of the machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtp.engines.base import Binding, Engine, Held, TensorSpec, Value
from vtp.engines.errors import VtpError
from vtp.engines.graph.file import GraphFile, computes_float64, read_graph
from vtp.engines.openvino.attention import rewrite_attention
from vtp.engines.openvino.library import DEVICES, load_openvino
from vtp.engines.openvino.products import product_settings
from vtp.engines.openvino.reading import read_model, reason, version
from vtp.engines.openvino.reductions import keep_reductions_apart
from vtp.engines.openvino.request import Request, check_fit
from vtp.engines.openvino.ties import order_ties
from vtp.engines.openvino.value import OvValue, adopted, array_of


class OvHeld(Held):
    """A request with some inputs and outputs in their places; every run brings the others."""

    def __init__(self, engine: OvEngine, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> None:
        super().__init__(engine, feeds, into)
        self._request = Request(engine)
        self._request.place_inputs(feeds, feeds)
        self._held = engine.check_outputs(into)
        self._others = [name for name in engine.inputs if name not in feeds]

    def run(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run once; outputs that are not held are allocated."""
        self._request.place_inputs(self._others, feeds)
        return self._request.run({**self._feeds, **feeds}, self._held)


class OvBinding(Binding):
    """A request with all inputs and outputs in their places; `run` does nothing but run."""

    def __init__(self, engine: OvEngine, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> None:
        self._request = Request(engine)
        self._feeds = dict(feeds)
        self._request.place_inputs(engine.inputs, feeds)
        self._into = engine.check_outputs(into)
        self.outputs = {name: into[name] for name in engine.outputs}

    def run(self) -> None:
        """Run the graph on the bound places."""
        self._request.run(self._feeds, self._into)


class OvEngine(Engine):
    """One graph in OpenVINO. `name` is "openvino-cpu", "openvino-gpu" or "openvino-npu"."""

    shares_rows = True

    def __init__(self, path: str | Path, name: str = "openvino-cpu", threads: int | None = None) -> None:
        """Open `path`; `threads` limits the CPU threads of one operator (None: all cores).

        Raises VtpError for a graph that vtp does not write, and for one that this OpenVINO cannot compile.
        """
        path = Path(path)
        model, file = read_model(path), read_graph(path)
        if computes_float64(file):
            raise VtpError(
                f"{path.name} computes in float64, which OpenVINO rounds to float32: it would keep other "
                "tokens; use ort-cpu for it"
            )
        try:
            self.caches = rewrite_attention(model)
            order_ties(model)
            keep_reductions_apart(model)
            self.compiled = _compile(model, DEVICES[name], threads)
        except VtpError as error:
            raise VtpError(f"{path.name}: {error}; use --engine ort-cpu") from error
        except Exception as error:  # as `read_model`
            raise VtpError(
                f"OpenVINO {version()} cannot compile {path.name}: {reason(error)}; use --engine ort-cpu"
            ) from error
        self.inputs, self.outputs = (_specs(file, names) for names in (_given(file), file.outputs))
        self._plain: Request | None = None

    def put(self, array: np.ndarray) -> OvValue:
        """Copy a host array."""
        return OvValue(np.array(array, order="C", copy=True))

    def adopt(self, value: Value) -> OvValue:
        """A value of another engine in the host's memory, without copying it."""
        return adopted(value)

    def zeros(self, shape: Sequence[int], dtype: str) -> OvValue:
        """Allocate a zeroed tensor."""
        return OvValue(np.zeros(shape, dtype))

    def rows(self, value: Value, first: int, count: int) -> OvValue:
        """Some rows of a value as one of its own, in the same memory."""
        return OvValue(array_of(value)[first : first + count], value)

    def copy_row(self, value: Value, source: int, target: int, places: int) -> None:
        """Copy the first `places` of axis 2 of one row to another."""
        array = array_of(value)
        array[target, :, :places] = array[source, :, :places]

    def bind(self, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> OvBinding:
        """Fix inputs and outputs; every output of the graph must be in `into`."""
        missing = sorted(set(self.outputs) - set(into))
        if missing:
            raise VtpError(f"no place is bound for output '{missing[0]}'; bind every output of the graph")
        return OvBinding(self, feeds, into)

    def hold(self, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> OvHeld:
        """Fix some inputs and outputs, for runs that bring the others."""
        return OvHeld(self, feeds, into)

    def run(self, feeds: Mapping[str, Value], into: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """Run once; outputs that are not in `into` are allocated."""
        if self._plain is None:
            self._plain = Request(self)
        self._plain.place_inputs(self.inputs, feeds)
        return self._plain.run(feeds, self.check_outputs(into or {}))

    def close(self) -> None:
        """Drop the compiled graph and its weights."""
        self.compiled = self._plain = None

    def check_outputs(self, into: Mapping[str, Value]) -> dict[str, Value]:
        """The places of outputs; VtpError for one that the graph does not have or that does not fit."""
        for name, value in into.items():
            if name not in self.outputs:
                raise VtpError(f"the graph has no output '{name}'; it gives {', '.join(self.outputs)}")
            check_fit("output", self.outputs[name], value)
        return dict(into)


def _compile(model: Any, device: str, threads: int | None) -> Any:
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        # By itself it computes in bfloat16 where the processor can, and keeps caches in int8.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    if device == "CPU":
        # Processes that pin their threads meet on the same cores.
        settings |= {"KV_CACHE_PRECISION": "f32", "ENABLE_CPU_PINNING": False, **product_settings()}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
    return load_openvino().Core().compile_model(model, device, settings)


def _given(graph: GraphFile) -> list[str]:
    """Inputs that are not weights: older graphs list these as well."""
    return [name for name in graph.inputs if name not in graph.weights]


def _specs(graph: GraphFile, names: Iterable[str]) -> dict[str, TensorSpec]:
    """As the file says it: OpenVINO forgets what axes are called."""
    missing = [name for name in names if name not in graph.tensors]
    if missing:
        raise VtpError(f"the graph says no shape of '{missing[0]}'; export the bundle again")
    return {name: TensorSpec(name, graph.tensors[name].dtype, graph.tensors[name].shape) for name in names}
