"""Runs engines that `build` made: full TensorRT 10.3 to 11 and TensorRT-RTX 1, by the same Python API.

Written against the library's own documentation and never run on a GPU: tests hold the order and the arguments
of its calls with a stand-in library that computes on the CPU. So an engine runs only after it was compared
with ONNX Runtime on the machine at hand (`Stamp.gate`).
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtp.engines.base import Binding, Engine, TensorSpec, Value
from vtp.engines.cuda.memory import DeviceMemory, cuda_memory
from vtp.engines.errors import VtpError
from vtp.engines.graph.file import read_graph
from vtp.engines.tensorrt.library import library_log, load_library

Bounds = tuple[tuple[int, ...], tuple[int, ...]]  # least and largest shape


class _Block:
    """Device memory that goes back when nothing refers to it."""

    def __init__(self, memory: DeviceMemory, size: int) -> None:
        self.address = memory.alloc(max(1, size))
        self._memory = memory

    def __del__(self) -> None:
        if hasattr(self, "address"):  # not where the allocation failed
            self._memory.free(self.address)


class TrtValue:
    """A tensor in device memory."""

    def __init__(self, memory: DeviceMemory, shape: Sequence[int], dtype: str | np.dtype) -> None:
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.bytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        self._memory = memory
        self._block = _Block(memory, self.bytes)
        self._other: _Block | None = None

    @property
    def address(self) -> int:
        """Where the tensor lies now."""
        return self._block.address

    @property
    def other_address(self) -> int:
        """A second place of the same size, for an engine that cannot write where it reads."""
        if self._other is None:
            self._other = _Block(self._memory, self.bytes)
        return self._other.address

    def swap(self) -> None:
        """The second place becomes the first: what an engine wrote there is the tensor now."""
        assert self._other is not None  # a swap follows a write to it
        self._block, self._other = self._other, self._block

    def numpy(self) -> np.ndarray:
        """Copy the tensor to the host; waits for what is still to be computed."""
        array = np.empty(self.shape, self.dtype)
        self._memory.to_host(array, self.address)
        return array

    def view(self) -> np.ndarray:
        """A copy: the tensor lies on the device."""
        return self.numpy()

    def update(self, array: np.ndarray) -> None:
        """Overwrite the tensor; VtpError for another shape or dtype."""
        if array.shape != self.shape or array.dtype != self.dtype:
            raise VtpError(
                f"a tensor {self.dtype}{list(self.shape)} cannot take {array.dtype}{list(array.shape)}; "
                "give the same shape and dtype"
            )
        self._memory.to_device(self.address, np.ascontiguousarray(array))


class TrtBinding(Binding):
    """A call with all its tensors; `run` enqueues it."""

    def __init__(self, call: _Call, outputs: dict[str, Value]) -> None:
        self._call = call
        self.outputs = outputs

    def run(self) -> None:
        """Enqueue the engine; reading an output waits for it."""
        self._call.run()


class TrtEngine(Engine):
    """One built engine. `graph` is the ONNX file that it was built from: it has the names of the axes."""

    def __init__(
        self, graph: str | Path, plan: str | Path, engine: str, memory: DeviceMemory | None = None
    ) -> None:
        """Open an engine file; VtpError when the library does not take it or it is another graph's."""
        self._name, self._plan = Path(graph).name, Path(plan)
        self._trt = load_library(engine)
        self._log = library_log(engine)
        self._memory = memory or cuda_memory()
        self._runtime = self._trt.Runtime(self._log)
        self._engine = self._deserialize()
        self.inputs, self.outputs = self._specs(Path(graph))
        self._profiles = [self._bounds(number) for number in range(self._engine.num_optimization_profiles)]
        self._contexts: dict[int, _Context] = {}
        # Outputs that the engine writes where an input lies (TensorScatter); no other may share a place.
        self._aliases = {name: alias for name in self.outputs if (alias := self._alias(name))}

    def put(self, array: np.ndarray) -> TrtValue:
        """Copy a host array to the device."""
        value = TrtValue(self._memory, array.shape, array.dtype)
        self._memory.to_device(value.address, np.ascontiguousarray(array))
        return value

    def zeros(self, shape: Sequence[int], dtype: str) -> TrtValue:
        """Allocate a zeroed tensor on the device."""
        value = TrtValue(self._memory, shape, dtype)
        self._memory.zero(value.address, value.bytes)
        return value

    def bind(self, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> TrtBinding:
        """Fix inputs and outputs; every output of the graph must be in `into`."""
        missing = sorted(set(self.outputs) - set(into))
        if missing:
            raise VtpError(f"no place is bound for output '{missing[0]}'; bind every output of the graph")
        call = self._call(feeds, into)
        return TrtBinding(call, {name: into[name] for name in self.outputs})

    def run(self, feeds: Mapping[str, Value], into: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """Run once and wait; outputs that are not in `into` are allocated."""
        call = self._call(feeds, into or {})
        call.run()
        self._memory.wait()
        return {**call.outputs}

    def close(self) -> None:
        """Drop the engine and its contexts."""
        self._contexts.clear()
        self._engine = None

    def _deserialize(self) -> Any:
        try:
            with (
                self._plan.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            ):
                found = self._runtime.deserialize_cuda_engine(content)
        except (OSError, ValueError) as error:
            raise VtpError(f"cannot read engine {self._plan}: {error}") from error
        if found is None:
            raise VtpError(
                f"{self._trt.__name__} {self._trt.__version__} does not take engine {self._plan.name}: "
                f"{self._log.reason()}; build it again on this device with vtp-build"
            )
        return found

    def _specs(self, graph: Path) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        """The graph's inputs and outputs, held against the engine's."""
        read, engine = read_graph(graph), self._engine
        there = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
        specs = []
        for names, mode in ((read.inputs, "INPUT"), (read.outputs, "OUTPUT")):
            mine = {name for name in there if engine.get_tensor_mode(name).name == mode}
            if mine != set(names):
                odd = sorted(mine ^ set(names))[0]
                raise VtpError(f"engine {self._plan.name} is not {graph.name}'s: they disagree about '{odd}'")
            specs.append({name: TensorSpec(name, *_shape_of(read, name)) for name in names})
            for spec in specs[-1].values():
                self._check_spec(spec)
        return specs[0], specs[1]

    def _check_spec(self, spec: TensorSpec) -> None:
        dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(spec.name))).name
        if dtype != spec.dtype:
            raise VtpError(
                f"engine {self._plan.name} has '{spec.name}' in {dtype}, the graph in {spec.dtype}; "
                "build it again with vtp-build"
            )

    def _bounds(self, profile: int) -> dict[str, Bounds]:
        found = {}
        for name in self.inputs:
            if self._engine.is_shape_inference_io(name):
                continue  # its values are bounded, not its shape
            least, _, most = self._engine.get_tensor_profile_shape(name, profile)
            found[name] = (tuple(least), tuple(most))
        return found

    def _alias(self, output: str) -> str:
        ask = getattr(self._engine, "get_aliased_input_tensor", None)  # TensorRT 10.15 and newer
        return (ask(output) or "") if ask else ""

    def _call(self, feeds: Mapping[str, Value], into: Mapping[str, Value]) -> _Call:
        if self._engine is None:
            raise VtpError("this engine is closed; open the graph again")
        for name in into:
            if name not in self.outputs:
                raise VtpError(f"the graph has no output '{name}'; it gives {', '.join(self.outputs)}")
        for name, spec in self.inputs.items():
            if name not in feeds:
                raise VtpError(f"input '{name}' is missing; the graph takes {', '.join(self.inputs)}")
            if str(feeds[name].dtype) != spec.dtype:
                raise VtpError(
                    f"input '{name}' is bound to {feeds[name].dtype}; the graph wants {spec.dtype}"
                )
        context = self._context({name: feeds[name].shape for name in self.inputs})
        return _Call(context, self, feeds, into)

    def _context(self, shapes: Mapping[str, tuple[int, ...]]) -> _Context:
        """The context of the narrowest profile that takes these shapes: a single step has its own."""
        for number in reversed(range(len(self._profiles))):
            if all(_within(shapes[name], bounds) for name, bounds in self._profiles[number].items()):
                if number not in self._contexts:
                    self._contexts[number] = _Context(self._trt, self._engine, number, self._memory)
                return self._contexts[number]
        widest = self._profiles[0]
        name = next(name for name, bounds in widest.items() if not _within(shapes[name], bounds))
        least, most = (list(shape) for shape in widest[name])
        raise VtpError(
            f"input '{name}' of {self._name} has shape {list(shapes[name])}, and its engine was built for "
            f"{least} to {most}; build it again with vtp-build"
        )


class _Context:
    """An execution context at one profile, and the call whose tensors it holds now."""

    def __init__(self, trt: Any, engine: Any, profile: int, memory: DeviceMemory) -> None:
        # With several profiles a context else takes the memory of the largest.
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        self.raw = engine.create_execution_context(strategy)
        if self.raw is None:
            raise VtpError("TensorRT could not make an execution context: most likely the GPU is full")
        if not self.raw.set_optimization_profile_async(profile, memory.stream):
            raise VtpError(f"TensorRT could not take profile {profile} of its own engine")
        memory.wait()
        self.engine, self.memory = engine, memory
        self.holds: object = None  # the mark of a call: the call itself would keep its tensors alive
        self.host = trt.TensorLocation.HOST


class _Call:
    """One graph on given tensors: sets what the context does not hold yet, enqueues, swaps places."""

    def __init__(
        self, context: _Context, engine: TrtEngine, feeds: Mapping[str, Value], into: Mapping[str, Value]
    ) -> None:
        context.holds = None
        self._context, self._mark = context, object()
        self._feeds: dict[str, Any] = {name: feeds[name] for name in engine.inputs}
        self._hosts: dict[str, np.ndarray] = {}  # inputs that TensorRT wants on the host: they make shapes
        self._set_inputs()
        self.outputs: dict[str, Any] = {}
        self._twins: list[tuple[str, str, Any]] = []  # output, input, the value that is both
        for name, spec in engine.outputs.items():
            shape = tuple(context.raw.get_tensor_shape(name))
            value = into.get(name) or self._allocate(engine, name, shape, spec.dtype)
            if value.shape != shape or str(value.dtype) != spec.dtype:
                raise VtpError(
                    f"output '{name}' is bound to {value.dtype}{list(value.shape)}; "
                    f"the graph gives {spec.dtype}{list(shape)}"
                )
            self._place(engine, name, value)
            self.outputs[name] = value
        self._set_outputs()
        context.holds = self._mark

    def run(self) -> None:
        """Enqueue; VtpError when TensorRT refuses."""
        raw = self._context.raw
        if self._context.holds is not self._mark or self._hosts:
            self._set_inputs()
            self._set_outputs()
            self._context.holds = self._mark
        for output, name, value in self._twins:  # they change places at every run
            _set(raw, name, value.address)
            _set(raw, output, value.other_address)
        if not raw.execute_async_v3(self._context.memory.stream):
            raise VtpError(
                "TensorRT failed while running the graph; run vtp-build again to check its engines"
            )
        for _, _, value in self._twins:
            value.swap()

    def _allocate(self, engine: TrtEngine, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        alias = engine._aliases.get(name)
        return self._feeds[alias] if alias else TrtValue(self._context.memory, shape, dtype)

    def _place(self, engine: TrtEngine, output: str, value: Any) -> None:
        """Note where an output shares its value with an input, and whether the engine writes in place."""
        alias = engine._aliases.get(output)
        if alias and self._feeds[alias] is not value:
            raise VtpError(f"'{output}' is written where '{alias}' lies: bind both to one value")
        if alias:
            return
        for name, fed in self._feeds.items():
            if fed is value:
                self._twins.append((output, name, value))

    def _set_inputs(self) -> None:
        raw = self._context.raw
        for name, value in self._feeds.items():
            if not raw.set_input_shape(name, value.shape):
                raise VtpError(f"TensorRT refuses shape {list(value.shape)} of input '{name}'")
            if self._context.engine.get_tensor_location(name) == self._context.host:
                self._hosts[name] = value.numpy()
                _set(raw, name, self._hosts[name].ctypes.data)
            else:
                _set(raw, name, value.address)
        lacking = raw.infer_shapes()
        if lacking:
            raise VtpError(f"TensorRT cannot tell the graph's shapes without '{lacking[0]}'")

    def _set_outputs(self) -> None:
        twins = {output for output, _, _ in self._twins}
        for name, value in self.outputs.items():
            if name not in twins:
                _set(self._context.raw, name, value.address)


def _set(raw: Any, name: str, address: int) -> None:
    if not raw.set_tensor_address(name, address):
        raise VtpError(f"TensorRT refuses the address of '{name}'")


def _shape_of(graph: Any, name: str) -> tuple[str, tuple[int | str, ...]]:
    found = graph.tensors[name]
    return found.dtype, found.shape


def _within(shape: tuple[int, ...], bounds: Bounds) -> bool:
    least, most = bounds
    return len(shape) == len(least) and all(
        low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
    )
