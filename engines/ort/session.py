"""ONNX Runtime: the CPU and CUDA providers behind the Engine interface, always through IOBinding."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from vtp.engines.base import Binding, Engine, Held, TensorSpec, Value
from vtp.engines.errors import VtpError
from vtp.engines.graph.file import read_graph
from vtp.engines.graph.masks import masks_attention
from vtp.engines.ort.library import load_onnxruntime
from vtp.engines.ort.needs import unguarded_products, unmet_need
from vtp.engines.ort.placement import record_assignment, refuse_cpu_nodes

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
CUDA = "ort-cuda"
_DEVICES = {"ort-cpu": "cpu", CUDA: "cuda"}
_PROVIDERS = {"ort-cpu": "CPUExecutionProvider", CUDA: "CUDAExecutionProvider"}
_MIXED = "MatMulIntegerToFloat"  # which ONNX Runtime 1.32 has for int8 with int8, not for int8 with uint8
_NO_GRAPH = -1
_X86 = ("x86_64", "AMD64")


class OrtValue:
    """A tensor held by ONNX Runtime, on the CPU or on a CUDA device.

    `memory` is the array that ONNX Runtime uses as the tensor, where it does.
    """

    def __init__(self, raw: Any, memory: np.ndarray | None = None) -> None:
        self.raw = raw
        # They never change, and asking takes as long as binding does.
        self.shape: tuple[int, ...] = tuple(raw.shape())
        self.dtype = np.dtype(_DTYPES[raw.data_type()])
        self._memory = memory

    def numpy(self) -> np.ndarray:
        """Copy the tensor to the host."""
        # On the CPU, ONNX Runtime gives a view, into memory that it frees with the value.
        return np.array(self.raw.numpy() if self._memory is None else self._memory)

    def view(self) -> np.ndarray:
        """The tensor on the host: its own memory, for as long as the value lives; on a GPU a copy."""
        return self.raw.numpy() if self._memory is None else self._memory

    def update(self, array: np.ndarray) -> None:
        """Overwrite the tensor in place; VtpError for another shape or dtype (ONNX Runtime counts bytes)."""
        if array.shape != self.shape or array.dtype != self.dtype:
            raise VtpError(
                f"a tensor {self.dtype}{list(self.shape)} cannot take {array.dtype}{list(array.shape)}; "
                "give the same shape and dtype"
            )
        if self._memory is None:
            self.raw.update_inplace(np.ascontiguousarray(array))
        else:
            self._memory[...] = array


class OrtBinding(Binding):
    """A session with all inputs and outputs bound; `run` does nothing but run.

    With a `graph` number the first run is recorded as that CUDA graph and later ones replay it. Where the
    recording fails, `refused` is told why, and this binding runs without one.
    """

    def __init__(
        self,
        session: Any,
        io: Any,
        outputs: dict[str, Value],
        hosted: Mapping[str, Any],
        graph: int | None = None,
        refused: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._session = session
        self._io = io
        self._hosted = hosted
        self._options = None if graph is None else _run_options(graph)
        self._refused = refused if graph is not None else None  # until the first run is over
        self.outputs = outputs

    def run(self) -> None:
        """Run the graph on the bound places."""
        # What lies on the GPU and is read on the host was copied when it was bound: bind what it holds now.
        for name, raw in self._hosted.items():
            self._io.bind_ortvalue_input(name, raw)
        try:
            _run(self._session, self._io, self._options)
        except VtpError as error:
            if self._refused is None:
                raise
            self._refused(str(error))
            self._options = _run_options(_NO_GRAPH)
            _run(self._session, self._io, self._options)
        self._refused = None


class OrtHeld(Held):
    """A session with some inputs and outputs bound for good; the others are bound for every run."""

    def __init__(self, engine: OrtEngine, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> None:
        super().__init__(engine, feeds, into)
        self._session = engine._opened()  # what is bound must not outlive it
        self._io = self._session.io_binding()
        self._opened, self._bind_inputs, self._device = engine._opened, engine._bind_inputs, engine._device
        engine._bind_inputs(self._io, [name for name in engine.inputs if name in feeds], feeds)
        engine._bind_outputs(self._io, into)
        # What the host reads was copied from the GPU when it was bound: it is bound again for every run.
        self._hosted = {name: feeds[name] for name in engine._read_on_host() if name in feeds}
        self._others = [name for name in engine.inputs if name not in feeds]
        self._allocated = [name for name in engine.outputs if name not in into]
        self._options = None if engine._graphs is None else _run_options(_NO_GRAPH)

    def run(self, feeds: Mapping[str, Value]) -> dict[str, Value]:
        """Run once; outputs that are not held are allocated by ONNX Runtime on the device."""
        session, io = self._opened(), self._io
        self._bind_inputs(io, self._hosted, self._hosted)
        self._bind_inputs(io, self._others, feeds)
        for name in self._allocated:
            io.bind_output(name, self._device)
        _run(session, io, self._options)
        # In the order in which they were bound first: those that are held come before.
        raws = io.get_outputs()[len(self._into) :]
        return {
            **self._into,
            **{name: OrtValue(raw) for name, raw in zip(self._allocated, raws, strict=True)},
        }


class OrtEngine(Engine):
    """One graph in an ONNX Runtime session. `name` is "ort-cpu" or "ort-cuda"."""

    def __init__(
        self,
        path: str | Path,
        name: str = "ort-cpu",
        threads: int | None = None,
        allow_cpu_nodes: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        """Open `path`; `threads` limits the CPU threads of one operator (None: all cores).

        On "ort-cuda" nodes that are left to the CPU are refused unless `allow_cpu_nodes`, and with
        `cuda_graph` a binding's first run is recorded and its later ones replayed. Where ONNX Runtime refuses
        that, the graph runs without, and `notes` says so.

        Raises VtpError when the file cannot be loaded by this ONNX Runtime.
        """
        self._device, self._file = _DEVICES[name], Path(path).name
        self.notes: list[str] = []
        self._graphs = count() if cuda_graph and name == CUDA else None
        try:
            self._session = _open_session(Path(path), name, threads, self._graphs is not None)
        except VtpError as error:
            if self._graphs is None:
                raise
            self._note_refusal(str(error))
            self._graphs = None
            self._session = _open_session(Path(path), name, threads)
        if name == CUDA:
            _refuse_masks(Path(path))
        if name == CUDA and not allow_cpu_nodes:
            refuse_cpu_nodes(Path(path), self._session, _PROVIDERS[CUDA])
        self.inputs = {arg.name: _spec(arg) for arg in self._session.get_inputs()}
        self.outputs = {arg.name: _spec(arg) for arg in self._session.get_outputs()}

    def put(self, array: np.ndarray) -> OrtValue:
        """Copy a host array to the session's device."""
        return self._hand_over(np.array(array, order="C", copy=True))

    def adopt(self, value: Value) -> Value:
        """A value of another engine in the host's memory, without copying it."""
        if isinstance(value, OrtValue):
            return value
        adopted = self._hand_over(value.view())
        if adopted._memory is None:
            raise VtpError("this ONNX Runtime copies what another engine made; give all stages one engine")
        return adopted

    def zeros(self, shape: Sequence[int], dtype: str) -> OrtValue:
        """Allocate a zeroed tensor on the session's device."""
        return self._hand_over(np.zeros(shape, dtype))

    @property
    def shares_rows(self) -> bool:  # type: ignore[override]
        """Whether values lie in memory of the host, part of which can be used by itself."""
        return self._device == "cpu"

    def rows(self, value: Value, first: int, count: int) -> OrtValue:
        """Some rows of a value as one of its own, in the same memory."""
        return self._hand_over(_memory(value)[first : first + count])

    def copy_row(self, value: Value, source: int, target: int, places: int) -> None:
        """Copy the first `places` of axis 2 of one row to another."""
        memory = _memory(value)
        memory[target, :, :places] = memory[source, :, :places]

    def bind(self, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> OrtBinding:
        """Fix inputs and outputs; every output of the graph must be in `into`."""
        missing = sorted(set(self.outputs) - set(into))
        if missing:
            raise VtpError(f"no place is bound for output '{missing[0]}'; bind every output of the graph")
        io = self._opened().io_binding()
        self._bind_inputs(io, self.inputs, feeds)
        self._bind_outputs(io, into)
        hosted = {name: feeds[name].raw for name in self._read_on_host()}  # type: ignore[attr-defined]
        graph = None if self._graphs is None else next(self._graphs)
        outputs = {name: into[name] for name in self.outputs}
        return OrtBinding(self._session, io, outputs, hosted, graph, self._note_refusal)

    def run(self, feeds: Mapping[str, Value], into: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """Run once; outputs that are not in `into` are allocated by ONNX Runtime on the device."""
        return self.hold({}, into or {}).run(feeds)

    def hold(self, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> OrtHeld:
        """Bind some inputs and outputs once, for runs that bring the others."""
        return OrtHeld(self, feeds, into)

    def close(self) -> None:
        """Drop the session and its weights."""
        self._session = None

    def _hand_over(self, array: np.ndarray) -> OrtValue:
        """A value made of an array that nobody else holds."""
        ort = load_onnxruntime()

        raw = ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)
        shared = self._device == "cpu" and raw.data_ptr() == array.__array_interface__["data"][0]
        return OrtValue(raw, array if shared else None)

    def _note_refusal(self, why: str) -> None:
        self.notes.append(f"{self._file} runs without a CUDA graph: {why}")

    def _read_on_host(self) -> list[str]:
        """Inputs that a GPU session reads on the host, such as GroupQueryAttention's total length."""
        if self._device == "cpu":
            return []
        if not hasattr(self._session, "get_input_memory_infos"):  # an older ONNX Runtime
            return [name for name, spec in self.inputs.items() if not spec.shape]
        places = self._session.get_input_memory_infos()
        return [name for name, place in zip(self.inputs, places, strict=True) if "cpu" in place.name.lower()]

    def _opened(self) -> Any:
        if self._session is None:
            raise VtpError("this engine is closed; open the graph again")
        return self._session

    def _bind_inputs(self, io: Any, names: Iterable[str], feeds: Mapping[str, Value]) -> None:
        """Bind the inputs `names`; VtpError for one that is missing or does not fit."""
        for name in names:
            if name not in feeds:
                raise VtpError(f"input '{name}' is missing; the graph takes {', '.join(self.inputs)}")
            _check("input", self.inputs[name], feeds[name])
            io.bind_ortvalue_input(name, feeds[name].raw)  # type: ignore[attr-defined]

    def _bind_outputs(self, io: Any, into: Mapping[str, Value]) -> None:
        """Bind outputs to places; VtpError for one that the graph does not have or that does not fit."""
        for name, value in into.items():
            if name not in self.outputs:
                raise VtpError(f"the graph has no output '{name}'; it gives {', '.join(self.outputs)}")
            _check("output", self.outputs[name], value)
            io.bind_ortvalue_output(name, value.raw)  # type: ignore[attr-defined]


def _memory(value: Value) -> np.ndarray:
    """The array in which a value lies; VtpError if ONNX Runtime keeps it elsewhere."""
    if value._memory is None:  # type: ignore[attr-defined]
        raise VtpError("ONNX Runtime keeps this tensor in memory of its own; use another version of it")
    return value._memory  # type: ignore[attr-defined]


def _spec(arg: Any) -> TensorSpec:
    # An axis without a name comes as None.
    shape = tuple("?" if axis is None else axis for axis in arg.shape)
    return TensorSpec(arg.name, _DTYPES.get(arg.type, arg.type), shape)


def _check(kind: str, spec: TensorSpec, value: Value) -> None:
    shape = value.shape
    fits = len(shape) == len(spec.shape) and all(
        isinstance(want, str) or want == have for want, have in zip(spec.shape, shape, strict=True)
    )
    if not fits or value.dtype != spec.dtype:
        raise VtpError(
            f"{kind} '{spec.name}' is bound to {value.dtype}{list(shape)}; "
            f"the graph wants {spec.dtype}{list(spec.shape)}"
        )


def _run(session: Any, io: Any, options: Any = None) -> None:
    try:
        session.run_with_iobinding(io, options)
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise VtpError(f"ONNX Runtime failed while running the graph: {_one_line(error)}") from error


def _refuse_masks(path: Path) -> None:
    """VtpError for attention that the CUDA provider was never seen to compute."""
    if masks_attention(read_graph(path)):
        raise VtpError(
            f"{path.name}: attention that takes masks was never run on CUDA; use ort-cpu, or export "
            "the bundle again without --oldest-onnxruntime"
        )


def _run_options(graph: int) -> Any:
    """Which recorded CUDA graph a run belongs to; _NO_GRAPH for one that is neither recorded nor replayed."""
    ort = load_onnxruntime()

    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def check_opens(path: Path) -> None:
    """VtpError for a graph that ONNX Runtime's CPU provider does not open. Its weights are not copied.

    Everything is fused but what is particular to this processor: for that ONNX Runtime makes copies of the
    weights, of float16 ones in float32, so that a graph takes more than twice its file in memory.
    """
    ort = load_onnxruntime()

    def without_copies(options: Any) -> None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.add_session_config_entry("session.disable_prepacking", "1")

    _load(path, without_copies, [_PROVIDERS["ort-cpu"]], disabled_optimizers=["ConstantFolding"])


def _open_session(path: Path, name: str, threads: int | None, cuda_graph: bool = False) -> Any:
    """Open a graph on the engine's provider; VtpError if it cannot be loaded or CUDA does not start."""
    providers: list[Any] = [_PROVIDERS["ort-cpu"]]
    if name == CUDA:
        providers.insert(0, (_PROVIDERS[CUDA], {"enable_cuda_graph": "1"} if cuda_graph else {}))

    def settle(options: Any) -> None:
        if threads:
            options.intra_op_num_threads = threads
        if name == CUDA:
            record_assignment(options)

    session = _load(path, settle, providers)
    if session.get_providers()[0] != _PROVIDERS[name]:
        raise VtpError("ONNX Runtime could not start CUDA on this machine; check the driver, or use ort-cpu")
    return session


def _load(path: Path, settle: Callable[[Any], None], providers: list[Any], **how: Any) -> Any:
    try:
        return _exact_session(path, settle, providers, how)
    except Exception as error:  # as above
        version = load_onnxruntime().__version__
        why = _unmet(path, version) or _one_line(error)
        raise VtpError(f"ONNX Runtime {version} cannot load {path.name}: {why}") from error


def _exact_session(
    path: Path, settle: Callable[[Any], None], providers: list[Any], how: Mapping[str, Any]
) -> Any:
    """A session whose products of eight bits do not saturate."""
    _refuse_unguarded(path)
    try:
        return _session(path, _session_options(settle, exact_products=True), providers, how)
    except Exception as error:  # as above
        if _MIXED not in str(error):
            raise
    # int8 activations met weights made uint8; products of int8 and int8 are exact as they are
    return _session(path, _session_options(settle, exact_products=False), providers, how)


def _refuse_unguarded(path: Path) -> None:
    """VtpError for a graph that could end the process: nothing can be caught then."""
    version = load_onnxruntime().__version__
    if platform.machine() in _X86 and (why := unguarded_products(path, version)):
        raise VtpError(why)


def _session_options(settle: Callable[[Any], None], exact_products: bool) -> Any:
    options = load_onnxruntime().SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised; a log line as well would be said twice
    # A bundle is several sessions in turn: threads that went on spinning would take the next one's cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # int8 activations stay as they are written. Made uint8 for x86, they fall out with the `output_dtype`
    # that ONNX Runtime gives to those it moves past a Reshape, and it refuses the graph (its issue 25526).
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    if exact_products:
        # Of uint8 and int8, two products are added in 16 bits on x86 processors without VNNI, and saturate
        # there: sums are off by a sixth and more. On those alone ONNX Runtime then makes weights uint8.
        options.add_session_config_entry("session.x64quantprecision", "1")
    settle(options)
    return options


def _session(path: Path, options: Any, providers: list[Any], how: Mapping[str, Any]) -> Any:
    # Its own second try prints four lines, and on CUDA would go on without it.
    return load_onnxruntime().InferenceSession(
        str(path), options, providers=providers, enable_fallback=0, **how
    )


def _unmet(path: Path, version: str) -> str:
    try:
        return unmet_need(read_graph(path), version)
    except VtpError:  # what is no graph is told in ONNX Runtime's words
        return ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
