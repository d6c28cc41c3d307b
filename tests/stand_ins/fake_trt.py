"""A stand-in for TensorRT's Python library and a GPU's memory: strict about calls, computes on the CPU.

An "engine" is a few lines of JSON that name a graph, its profiles and its aliases; ONNX Runtime computes. The
memory is the host's. What a real library would forbid or leave undefined raises AssertionError here: shapes
outside the profile, an address that is missing, freed or too small, an output on top of another tensor, a
profile that was not set, a foreign stream.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import importlib.machinery
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from vtp.engines.graph.file import read_graph
from vtp.engines.tensorrt.library import BuildOptions
from vtp.engines.tensorrt.store import make_folder

STREAM = 7
VERSION = "10.3.0"


class FakeMemory:
    """Host memory behind the interface of `DeviceMemory`; knows what lives at which address."""

    def __init__(self) -> None:
        self.stream = STREAM
        self.blocks: dict[int, Any] = {}
        self.calls: list[str] = []

    def alloc(self, size: int) -> int:
        buffer = (ctypes.c_ubyte * size)()
        ctypes.memset(buffer, 0xAB, size)  # never zero by luck
        address = ctypes.addressof(buffer)
        self.blocks[address] = buffer
        return address

    def free(self, address: int) -> None:
        del self.blocks[address]

    def zero(self, address: int, size: int) -> None:
        self.check(address, size)
        ctypes.memset(address, 0, size)

    def to_device(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.check(address, array.nbytes)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def to_host(self, array: np.ndarray, address: int) -> None:
        assert array.flags.c_contiguous
        self.check(address, array.nbytes)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def wait(self) -> None:
        self.calls.append("wait")

    def check(self, address: int, size: int) -> None:
        assert address in self.blocks, "an address that was never given out, or freed"
        assert size <= len(self.blocks[address]), "more bytes than were asked for"


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1


class Runtime:
    def __init__(self, log: ILogger) -> None:
        assert isinstance(log, ILogger)

    def deserialize_cuda_engine(self, content: Any) -> FakeEngine | None:
        try:
            return FakeEngine(**json.loads(bytes(content)))
        except ValueError:
            return None


class FakeEngine:
    """What `plan` describes."""

    def __init__(
        self,
        graph: str,
        profiles: list[dict[str, Any]],
        aliases: dict[str, str],
        host: list[str],
        scale: float,
        other_token: bool,
    ) -> None:
        self.read = read_graph(graph)
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.profiles, self.aliases, self.host, self.scale = profiles, aliases, host, scale
        self.other_token = other_token
        self.names = [*self.read.inputs, *self.read.outputs]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(profiles)

    def get_tensor_name(self, place: int) -> str:
        return self.names[place]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.read.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        return self.read.tensors[name].dtype

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self.host else TensorLocation.DEVICE

    def is_shape_inference_io(self, name: str) -> bool:
        return name in self.host

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.profiles[profile][name]]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> FakeContext:
        assert isinstance(strategy, ExecutionContextAllocationStrategy)
        return FakeContext(self)


class FakeContext:
    """Holds addresses and shapes until it is asked to execute."""

    memory: FakeMemory  # set by `install`

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.made: dict[str, np.ndarray] = {}
        self.runs = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream == STREAM
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "no profile was set"
        if name not in self.engine.host:
            least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
            if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
                return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.names
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        lacking = [name for name in self.engine.read.inputs if name not in self.shapes]
        lacking += [name for name in self.engine.host if name not in self.addresses]
        return lacking

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of an output: as the graph makes it from what the inputs hold now."""
        if name in self.shapes:
            return self.shapes[name]
        axes: dict[str, int] = {}
        for given, shape in self.shapes.items():
            for axis, size in zip(self.engine.read.tensors[given].shape, shape, strict=True):
                if isinstance(axis, str):
                    axes[axis] = size
        wanted = self.engine.read.tensors[name].shape
        if all(isinstance(axis, int) or axis in axes for axis in wanted):
            return tuple(axis if isinstance(axis, int) else axes[axis] for axis in wanted)
        outputs = self.engine.session.run([name], self._feeds())
        return tuple(outputs[0].shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        outputs = dict(
            zip(self.engine.read.outputs, self.engine.session.run(None, self._feeds()), strict=True)
        )
        for name, array in outputs.items():
            address = self.addresses[name]
            self.memory.check(address, array.nbytes)
            sharing = [other for other, where in self.addresses.items() if where == address and other != name]
            alias = self.engine.aliases.get(name)
            assert sharing == ([alias] if alias else []), f"{name} lies on {sharing}"
        for name, array in outputs.items():
            changed = array * array.dtype.type(self.engine.scale) if array.dtype.kind == "f" else array
            if name == "keep_indices" and self.engine.other_token:
                changed = with_another(array)
            fresh = np.ascontiguousarray(changed)
            ctypes.memmove(self.addresses[name], fresh.ctypes.data, fresh.nbytes)
        self.runs += 1
        return True

    def _feeds(self) -> dict[str, np.ndarray]:
        feeds = {}
        for name in self.engine.read.inputs:
            array = np.empty(self.shapes[name], self.engine.read.tensors[name].dtype)
            if name not in self.engine.host:
                self.memory.check(self.addresses[name], array.nbytes)
            ctypes.memmove(array.ctypes.data, self.addresses[name], array.nbytes)
            feeds[name] = array
        return feeds


def with_another(kept: np.ndarray) -> np.ndarray:
    """Kept tokens [1,K] with the last one exchanged for one that was dropped."""
    spare = next(token for token in range(kept.size + 1) if token not in kept)
    return np.sort(np.append(kept[0, :-1], spare)).reshape(1, -1).astype(kept.dtype)


def plan(
    graph: Path,
    profiles: list[Mapping[str, Any]],
    aliases: Mapping[str, str] | None = None,
    host: list[str] | None = None,
    scale: float = 1.0,
    other_token: bool = False,
) -> bytes:
    """The bytes of an "engine".

    Its float answers come out `scale` times too large; with `other_token` it keeps one that it should not.
    """
    wide = [{name: [list(shape) for shape in shapes] for name, shapes in one.items()} for one in profiles]
    said = {
        "graph": str(graph),
        "profiles": wide,
        "aliases": aliases or {},
        "host": host or [],
        "scale": scale,
        "other_token": other_token,
    }
    return json.dumps(said).encode()


def store(
    folder: Path,
    graph: Path,
    profiles: list[Any],
    engine: str = "tensorrt",
    version: str = VERSION,
    options: BuildOptions | None = None,
    **said: Any,
) -> Path:
    """Put an "engine" and its stamp where a build would."""
    from vtp.engines.tensorrt import build as trt_build

    content = plan(graph, profiles, **said)
    settings = trt_build.settings_hash(profiles, options or BuildOptions())
    content_hash = hashlib.sha256(content).hexdigest()
    hashed = trt_build.graph_hash(graph)
    stamp = trt_build.Stamp(engine, version, "8.7", hashed, settings, len(content), content_hash)
    path = folder / f"{graph.stem}-{stamp.key}{trt_build.PLAN}"
    make_folder(folder)
    path.write_bytes(content)
    trt_build.write_stamp(path, stamp)
    return path


def install_gpu(monkeypatch: Any) -> None:
    """Make the CUDA driver one that knows an Orin."""
    from ..engines.test_cuda import Driver

    real = ctypes.CDLL
    monkeypatch.setattr(
        "vtp.engines.cuda.driver.ctypes.CDLL",
        lambda name, *rest, **named: Driver() if "cuda" in str(name) else real(name, *rest, **named),
    )


def install(monkeypatch: Any, name: str = "tensorrt") -> FakeMemory:
    """Make `import tensorrt` give the stand-in, and every engine without a memory use the fake one."""
    from vtp.engines.tensorrt import library as trt
    from vtp.engines.tensorrt import run as trt_run

    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    parts: dict[str, Any] = {
        "__version__": VERSION,
        "ILogger": ILogger,
        "Runtime": Runtime,
        "TensorIOMode": TensorIOMode,
        "TensorLocation": TensorLocation,
        "ExecutionContextAllocationStrategy": ExecutionContextAllocationStrategy,
        "nptype": np.dtype,
    }
    for key, value in parts.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    memory = FakeMemory()
    monkeypatch.setattr(FakeContext, "memory", memory, raising=False)
    monkeypatch.setattr(trt_run, "cuda_memory", lambda: memory)
    trt.library_log.cache_clear()
    return memory
