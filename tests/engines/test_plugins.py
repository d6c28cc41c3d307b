"""The greedy plugin without a GPU: its kernel on the CPU, its PTX, what TensorRT is told, what is refused."""

from __future__ import annotations

import ctypes
import inspect
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import pytest

from vtp.engines import UsageError, VtpError
from vtp.engines.cuda.driver import CudaDevice, CudaProbe, probe_cuda
from vtp.engines.cuda.memory import CudaMemory, cuda_memory
from vtp.engines.plugins import greedy, nvcc
from vtp.engines.plugins.rewrite import Greedy

from ..stand_ins.greedy_host import by_numpy, needs_compiler, pick

# -- the kernel ----------------------------------------------------------------------------------------------


def tables(rng: np.random.Generator, kind: str, batch: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and positive factors: arbitrary, on a coarse lattice (many ties), or of near-duplicates."""
    scores = rng.random((batch, count), np.float32)
    factors = rng.random((batch, count, count), np.float32) + np.float32(2**-24)
    if kind == "ties":
        return np.round(scores * 4) / 4, np.exp2(-np.floor(factors * 3)).astype(np.float32)
    if kind == "twins":  # pairs that differ in the last bit or not at all, and lower each other to nearly 0
        scores[:, 1::2] = np.nextafter(scores[:, : count // 2 * 2 : 2], np.float32(rng.integers(0, 2)))
        scores = np.where(rng.random(scores.shape) < 0.5, scores, np.roll(scores, 1, axis=1))
        factors = np.where(factors < 0.05, np.float32(1e-30), np.float32(1)) * factors
    if kind == "faint":  # scores that sink below the least normal number
        scores *= np.float32(1e-37)
    return scores, factors.astype(np.float32)


@needs_compiler
@pytest.mark.parametrize("kind", ["any", "ties", "twins", "faint"])
def test_the_kernel_picks_as_numpy_does(kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    for number in range(600):
        count = int(rng.integers(1, 130))
        keep = int(rng.integers(1, count + 1))
        scores, factors = tables(rng, kind, int(rng.integers(1, 4)), count)
        found = pick(scores, factors, keep, shuffle=number % 5)
        np.testing.assert_array_equal(found, by_numpy(scores, factors, keep))


@needs_compiler
@pytest.mark.parametrize("kind", ["any", "ties", "twins"])
def test_at_full_size_too(kind: str) -> None:
    rng = np.random.default_rng(1)
    for count, keep in [(576, 57)] * 8 + [(576, 576), (255, 64), (256, 64), (257, 64), (2880, 160)]:
        scores, factors = tables(rng, kind, 1, count)
        np.testing.assert_array_equal(pick(scores, factors, keep, 2), by_numpy(scores, factors, keep))


@needs_compiler
def test_what_is_no_number_never_leads_outside() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 5, 255, 300):
        for odd in (np.nan, np.inf, -np.inf, 0.0):
            scores, factors = tables(rng, "any", 2, count)
            scores[rng.random(scores.shape) < 0.3] = odd
            factors[rng.random(factors.shape) < 0.1] = odd
            for shuffle in range(3):
                found = pick(scores, factors, count, shuffle)
                assert found.min() >= 0 and found.max() < count


def test_the_kernel_and_its_launch_agree() -> None:
    text = greedy.SOURCE.read_text()
    assert re.search(r"#define THREADS (\d+)", text)[1] == str(greedy.THREADS)  # type: ignore[index]
    assert f" {greedy.KERNEL}(const float* scores, const float* factors, int count, int keep," in text
    assert greedy.shared_bytes(greedy.LARGEST) == 48 * 1024


# -- its PTX -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: install the CUDA toolkit")
@pytest.mark.parametrize("sm", ["8.7", "9.0", "12.0"])
def test_the_kernel_compiles_for_devices(sm: str) -> None:
    ptx = nvcc.compile_ptx(greedy.SOURCE, sm)
    assert f".target sm_{sm.replace('.', '')}" in ptx and f".entry {greedy.KERNEL}(" in ptx
    assert len(re.findall(rf"\.param \.\w+ (?:\.\w+ )*(?:\.align \d+ )?{greedy.KERNEL}_param_\d", ptx)) == 5
    assert "fma.rn.f32" not in ptx and ".ftz" not in ptx  # every product rounded, small numbers kept


def install_nvcc(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """The only nvcc there is: a shell script."""
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(nvcc, "_HOME", str(folder / "none"))


def test_a_compiler_newer_than_the_driver_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_nvcc(monkeypatch, tmp_path, 'echo "Cuda compilation tools, release 13.10, V13.10.1"')
    with pytest.raises(VtpError, match=r"nvcc is of CUDA 13\.10, and the driver runs CUDA 13\.9 at most"):
        nvcc.compile_ptx(greedy.SOURCE, "8.7", driver="13.9")


def test_what_the_compiler_says_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_nvcc(monkeypatch, tmp_path, 'echo "nvcc fatal :\nno such architecture" >&2; exit 1')
    with pytest.raises(VtpError, match=r"nvcc does not compile greedy\.cu .* 5\.3: nvcc fatal : no such"):
        nvcc.compile_ptx(greedy.SOURCE, "5.3", driver="12.6")


def test_a_missing_compiler_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nvcc, "_HOME", str(tmp_path))
    with pytest.raises(VtpError, match=r"install the CUDA toolkit .* or build without --plugin"):
        greedy.check_plugin("tensorrt", "10.13.2")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["any", "ties", "twins", "faint"])
def test_the_kernel_picks_the_same_on_a_gpu(kind: str) -> None:
    """PTX and driver alone, without TensorRT."""
    cuda = probe_cuda()
    if not cuda.devices:
        pytest.skip(cuda.reason)
    try:
        ptx = nvcc.compile_ptx(greedy.SOURCE, cuda.devices[0].sm, cuda.driver)
    except VtpError as error:
        pytest.skip(str(error))
    rng = np.random.default_rng(len(kind))
    for count, keep in [(576, 57), (576, 576), (1, 1), (16, 7), (255, 64), (2880, 160)]:
        scores, factors = tables(rng, kind, 3, count)
        found = launch(cuda_memory(), ptx, scores, factors, keep)
        np.testing.assert_array_equal(found, by_numpy(scores, factors, keep))


def launch(memory: CudaMemory, ptx: str, scores: np.ndarray, factors: np.ndarray, keep: int) -> np.ndarray:
    """The picks of one launch, as TensorRT is told to make it."""
    batch, count = scores.shape
    picks = np.full((batch, keep), -7, np.int64)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    memory._call("cuModuleLoadData", ctypes.byref(module), ptx.encode())
    memory._call("cuModuleGetFunction", ctypes.byref(function), module, greedy.KERNEL.encode())
    arrays = [np.ascontiguousarray(one) for one in (scores, factors, picks)]
    places = [ctypes.c_uint64(memory.alloc(one.nbytes)) for one in arrays]
    for place, array in zip(places, arrays, strict=True):
        memory.to_device(place.value, array)
    given: list[Any] = [*places[:2], ctypes.c_int(count), ctypes.c_int(keep), places[2]]
    pointers = (ctypes.c_void_p * 5)(*(ctypes.addressof(one) for one in given))
    sizes = [batch, 1, 1, greedy.THREADS, 1, 1, greedy.shared_bytes(count)]
    memory._call("cuLaunchKernel", function, *map(ctypes.c_uint, sizes), memory._on, pointers, None)
    memory.to_host(picks, places[2].value)
    memory._call("cuModuleUnload", module)
    for place in places:
        memory.free(place.value)
    return picks


# -- what TensorRT is told -----------------------------------------------------------------------------------


class TensorDesc:
    """A tensor as the library describes it to a plugin."""

    def __init__(self, shape_expr: tuple[Any, ...], dtype: str) -> None:
        self.shape_expr, self.dtype = shape_expr, dtype


class KernelLaunchParams:
    """Everything but these names is refused, as by the library."""

    __slots__ = ("block_x", "block_y", "block_z", "grid_x", "grid_y", "grid_z", "shared_mem")


class SymIntExprs(list):
    """Whole numbers for a kernel."""

    @classmethod
    def from_tuple(cls, numbers: Any) -> SymIntExprs:
        return cls(numbers)


class Plugins(types.ModuleType):
    """A stand-in for `tensorrt.plugin` with the checks that the library's decorators make.

    Types must be annotated (not spelled out as text), inputs first, attributes after them, and the kernel's
    function takes all of these, then `outputs` and `tactic`.
    """

    TensorDesc, KernelLaunchParams, SymIntExprs, SymInt32 = TensorDesc, KernelLaunchParams, SymIntExprs, int

    def __init__(self) -> None:
        super().__init__("tensorrt.plugin")
        self.described: dict[str, Any] = {}
        self.launched: dict[str, Any] = {}

    @staticmethod
    def from_shape_expr(shape: tuple[Any, ...], dtype: str) -> TensorDesc:
        return TensorDesc(shape, dtype)

    def register(self, plugin: str) -> Any:
        def decorate(function: Any) -> Any:
            found = inspect.signature(function)
            kinds = [parameter.annotation for parameter in found.parameters.values()]
            assert kinds[:2] == [TensorDesc] * 2 and found.return_annotation is TensorDesc
            assert [get_origin(kind) for kind in kinds[2:]] == [np.ndarray]
            assert get_args(get_args(kinds[2])[1]) == (np.int32,)
            self.described[plugin] = function
            return function

        return decorate

    def aot_impl(self, plugin: str) -> Any:
        def decorate(function: Any) -> Any:
            names = list(inspect.signature(self.described[plugin]).parameters)
            found = inspect.signature(function)
            assert list(found.parameters) == [*names, "outputs", "tactic"]
            assert get_origin(found.parameters["outputs"].annotation) is tuple
            assert get_args(found.return_annotation) == (str, str, KernelLaunchParams, SymIntExprs)
            self.launched[plugin] = function
            return function

        return decorate


def test_the_plugin_is_described_as_its_kernel_wants_it() -> None:
    plugins, found = Plugins(), Greedy("scores", "factors", "picks", 576, 57)
    greedy.register_greedy(types.SimpleNamespace(int64="int64"), plugins, found, "PTX")
    inputs = (TensorDesc((3, 576), "float32"), TensorDesc((3, 576, 576), "float32"))
    keep = np.array([57], np.int32)  # as the parser hands a list attribute over
    output = plugins.described["vtp::greedy"](*inputs, keep)
    assert (output.shape_expr, output.dtype) == ((3, 57), "int64")
    name, ptx, params, numbers = plugins.launched["vtp::greedy"](*inputs, keep, (output,), 0)
    assert (name, ptx, numbers) == ("vtp_greedy", "PTX", [576, 57])
    assert (params.grid_x, params.block_x, params.shared_mem) == (3, 256, 4 * (576 + 512))


@pytest.mark.parametrize(
    ("engine", "version", "error", "message"),
    [
        (
            "tensorrt-rtx",
            "1.7.1",
            UsageError,
            "--plugin is for --engine tensorrt: tensorrt-rtx 1.7.1 takes no",
        ),
        ("tensorrt", "10.3.0", VtpError, "--plugin wants TensorRT 10.9 or newer, this is 10.3.0"),
    ],
)
def test_libraries_that_take_no_such_plugin_are_refused(
    engine: str, version: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        greedy.check_plugin(engine, version)


def test_preparing_a_graph_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = types.SimpleNamespace(__name__="no_such_library", __version__="10.13", int64="int64")
    count = {"count": greedy.LARGEST + 1}
    monkeypatch.setattr(
        greedy, "with_greedy_node", lambda path: (b"graph", Greedy("a", "b", "c", count["count"], 2))
    )
    monkeypatch.setattr(greedy, "probe_cuda", lambda: CudaProbe(reason="the driver finds no GPU"))
    with pytest.raises(VtpError, match=r"takes up to \d+ visual tokens, these are \d+"):
        greedy.prepare_graph(library, tmp_path)
    count["count"] = 16
    with pytest.raises(VtpError, match="there is none: the driver finds no GPU"):
        greedy.prepare_graph(library, tmp_path)
    orin = CudaProbe([CudaDevice("Orin", "8.7", 1 << 30)], driver="12.6")
    monkeypatch.setattr(greedy, "probe_cuda", lambda: orin)
    seen = []
    monkeypatch.setattr(greedy, "compile_ptx", lambda *given: seen.append(given) or "PTX")
    with pytest.raises(VtpError, match=r"no_such_library 10\.13 came without plugins"):
        greedy.prepare_graph(library, tmp_path)
    plugins = Plugins()
    monkeypatch.setitem(sys.modules, "no_such_library", types.ModuleType("no_such_library"))
    monkeypatch.setitem(sys.modules, "no_such_library.plugin", plugins)
    assert greedy.prepare_graph(library, tmp_path) == b"graph"
    assert seen[-1] == (greedy.SOURCE, "8.7", "12.6") and plugins.launched
