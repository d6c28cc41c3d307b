"""ONNX Runtime: the CPU and CUDA providers behind the Engine interface, always through IOBinding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtp.engines.base import Binding, Engine, TensorSpec, Value
from vtp.engines.errors import VtpError

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
_DEVICES = {"ort-cpu": "cpu", "ort-cuda": "cuda"}


class OrtValue:
    """A tensor held by ONNX Runtime, on the CPU or on a CUDA device."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.raw.shape())

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(_DTYPES[self.raw.data_type()])

    def numpy(self) -> np.ndarray:
        """Copy the tensor to the host."""
        # On the CPU, ONNX Runtime gives a view, into memory that it frees with the value.
        return np.array(self.raw.numpy())

    def update(self, array: np.ndarray) -> None:
        """Overwrite the tensor in place; VtpError for another shape or dtype (ONNX Runtime counts bytes)."""
        if array.shape != self.shape or array.dtype != self.dtype:
            raise VtpError(
                f"a tensor {self.dtype}{list(self.shape)} cannot take {array.dtype}{list(array.shape)}; "
                "give the same shape and dtype"
            )
        self.raw.update_inplace(np.ascontiguousarray(array))


class OrtBinding(Binding):
    """A session with all inputs and outputs bound; `run` does nothing but run."""

    def __init__(self, session: Any, io: Any, outputs: dict[str, Value]) -> None:
        self._session = session
        self._io = io
        self.outputs = outputs

    def run(self) -> None:
        """Run the graph on the bound places."""
        _run(self._session, self._io)


class OrtEngine(Engine):
    """One graph in an ONNX Runtime session. `name` is "ort-cpu" or "ort-cuda"."""

    def __init__(self, path: str | Path, name: str = "ort-cpu", threads: int | None = None) -> None:
        """Open `path`; `threads` limits the CPU threads of one operator (None: all cores).

        Raises VtpError when the file cannot be loaded by this ONNX Runtime.
        """
        self._device = _DEVICES[name]
        self._session = _open_session(Path(path), name, threads)
        self.inputs = {arg.name: _spec(arg) for arg in self._session.get_inputs()}
        self.outputs = {arg.name: _spec(arg) for arg in self._session.get_outputs()}

    def put(self, array: np.ndarray) -> OrtValue:
        """Copy a host array to the session's device."""
        import onnxruntime as ort

        # On the CPU, ONNX Runtime may share the array's memory: a copy keeps the value our own.
        own = np.array(array, order="C", copy=True)
        return OrtValue(ort.OrtValue.ortvalue_from_numpy(own, self._device, 0))

    def zeros(self, shape: Sequence[int], dtype: str) -> OrtValue:
        """Allocate a zeroed tensor on the session's device."""
        import onnxruntime as ort

        return OrtValue(ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), self._device, 0))

    def bind(self, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> OrtBinding:
        """Fix inputs and outputs; every output of the graph must be in `into`."""
        missing = sorted(set(self.outputs) - set(into))
        if missing:
            raise VtpError(f"no place is bound for output '{missing[0]}'; bind every output of the graph")
        io = self._bind_inputs(feeds)
        self._bind_outputs(io, into)
        return OrtBinding(self._session, io, {name: into[name] for name in self.outputs})

    def run(self, feeds: Mapping[str, Value], into: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """Run once; outputs that are not in `into` are allocated by ONNX Runtime on the device."""
        into = into or {}
        io = self._bind_inputs(feeds)
        self._bind_outputs(io, into)
        allocated = [name for name in self.outputs if name not in into]
        for name in allocated:
            io.bind_output(name, self._device)
        _run(self._session, io)
        # In the order of binding: first those in `into`.
        raws = io.get_outputs()[len(into) :]
        return {**into, **{name: OrtValue(raw) for name, raw in zip(allocated, raws, strict=True)}}

    def close(self) -> None:
        """Drop the session and its weights."""
        self._session = None

    def _bind_inputs(self, feeds: Mapping[str, Value]) -> Any:
        if self._session is None:
            raise VtpError("this engine is closed; open the graph again")
        io = self._session.io_binding()
        for name, spec in self.inputs.items():
            if name not in feeds:
                raise VtpError(f"input '{name}' is missing; the graph takes {', '.join(self.inputs)}")
            _check("input", spec, feeds[name])
            io.bind_ortvalue_input(name, feeds[name].raw)  # type: ignore[attr-defined]
        return io

    def _bind_outputs(self, io: Any, into: Mapping[str, Value]) -> None:
        for name, value in into.items():
            if name not in self.outputs:
                raise VtpError(f"the graph has no output '{name}'; it gives {', '.join(self.outputs)}")
            _check("output", self.outputs[name], value)
            io.bind_ortvalue_output(name, value.raw)  # type: ignore[attr-defined]


def _spec(arg: Any) -> TensorSpec:
    # An axis without a name comes as None.
    shape = tuple("?" if axis is None else axis for axis in arg.shape)
    return TensorSpec(arg.name, _DTYPES.get(arg.type, arg.type), shape)


def _check(kind: str, spec: TensorSpec, value: Value) -> None:
    shape = value.shape
    fits = len(shape) == len(spec.shape) and all(
        isinstance(want, str) or want == have for want, have in zip(spec.shape, shape, strict=True)
    )
    if not fits or str(value.dtype) != spec.dtype:
        raise VtpError(
            f"{kind} '{spec.name}' is bound to {value.dtype}{list(shape)}; "
            f"the graph wants {spec.dtype}{list(spec.shape)}"
        )


def _run(session: Any, io: Any) -> None:
    try:
        session.run_with_iobinding(io)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise VtpError(f"ONNX Runtime failed while running the graph: {_one_line(error)}") from error


def _open_session(path: Path, name: str, threads: int | None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised; a log line as well would be said twice
    if threads:
        options.intra_op_num_threads = threads
    providers = ["CPUExecutionProvider"]
    if name == "ort-cuda":
        providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # as above
        raise VtpError(
            f"ONNX Runtime {ort.__version__} cannot load {path.name}: {_one_line(error)}"
        ) from error
    if session.get_providers()[0] != providers[0]:
        raise VtpError("ONNX Runtime could not start CUDA on this machine; check the driver, or use ort-cpu")
    return session


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
