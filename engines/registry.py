"""The engines by name: what each can do, whether it runs here and why (not), and how it opens a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vtp.engines.base import Capabilities, Engine
from vtp.engines.cuda.driver import CudaProbe, probe_cuda
from vtp.engines.errors import UsageError, VtpError, nearest, quoted
from vtp.engines.openvino.library import DEVICES, installed_openvino, listed_devices
from vtp.engines.ort.library import load_onnxruntime
from vtp.engines.tensorrt.library import LIBRARIES, load_library

AUTO = "auto"
_INSTALL = "pip install 'vtp-edge[ort]' (or 'vtp-edge[ort-gpu]' with an NVIDIA GPU)"


Code = Literal[
    "accepted",
    "no-library",  # not installed, or it does not load
    "no-provider",  # an ONNX Runtime without the provider
    "no-gpu",
    "no-device",  # OpenVINO lists none of its kind
    "dtype",  # it does not compute in the bundle's dtype
    "target",  # it does not run the bundle's target
    "by-name",  # it could run, and is used only if it is asked for by name
    "opens-nothing",  # a graph was tried, and did not open
]


@dataclass(frozen=True)
class Decision:
    """One candidate, whether it can run here, and why (not): a code for programs, a line for people."""

    engine: str
    code: Code
    reason: str

    @property
    def accepted(self) -> bool:
        """Whether it can run here."""
        return self.code == "accepted"

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return {**dataclasses.asdict(self), "accepted": self.accepted}


@dataclass(frozen=True)
class Choice:
    """The engine to use and how it was decided, best candidate first."""

    engine: str
    decisions: list[Decision] = field(default_factory=list)


def installed_providers() -> list[str] | None:
    """ONNX Runtime's providers on this machine; None when no onnxruntime is installed."""
    if util.find_spec("onnxruntime") is None:
        return None
    try:
        onnxruntime = load_onnxruntime()
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise VtpError(f"onnxruntime is installed but does not import ({reason}); {_INSTALL}") from error
    return list(onnxruntime.get_available_providers())


def _judge_cuda(providers: list[str] | None, dtype: str | None, cuda: Callable[[], CudaProbe]) -> Decision:
    reject = partial(Decision, "ort-cuda")
    if providers is None:
        return reject("no-library", f"onnxruntime is not installed: {_INSTALL}")
    if "CUDAExecutionProvider" not in providers:
        return reject(
            "no-provider",
            "this onnxruntime has no CUDA provider: pip install 'vtp-edge[ort-gpu]' in place of onnxruntime",
        )
    if dtype == "float32":
        return reject(
            "dtype", "its fused attention takes no float32: export the bundle again with --dtype float16"
        )
    # onnxruntime-gpu lists its provider wherever it is installed
    return _judge_gpu("ort-cuda", "the CUDA provider is present", cuda())


def _judge_cpu(providers: list[str] | None, dtype: str | None, cuda: Callable[[], CudaProbe]) -> Decision:
    if providers is None:
        return Decision("ort-cpu", "no-library", f"onnxruntime is not installed: {_INSTALL}")
    return Decision("ort-cpu", "accepted", "onnxruntime is installed")


def _judge_tensorrt(
    engine: str, providers: list[str] | None, dtype: str | None, cuda: Callable[[], CudaProbe]
) -> Decision:
    try:
        library = load_library(engine)
    except VtpError as error:
        return Decision(engine, "no-library", str(error))
    return _judge_gpu(engine, f"{library.__name__} {library.__version__}", cuda())


def _judge_gpu(engine: str, library: str, found: CudaProbe) -> Decision:
    """The last question to an engine whose library is there."""
    if not found.devices:
        return Decision(engine, "no-gpu", f"{found.reason}; check nvidia-smi, or use --engine ort-cpu")
    device = found.devices[0]
    return Decision(engine, "accepted", f"{library}, and a {device.name} (SM {device.sm})")


def _judge_openvino(
    engine: str, providers: list[str] | None, dtype: str | None, cuda: Callable[[], CudaProbe]
) -> Decision:
    try:
        found = f"openvino {installed_openvino()}"
        kind = DEVICES[engine]
        if kind == "CPU":  # which it has wherever it is installed: nothing is imported
            return Decision(engine, "accepted", found)
        listed = listed_devices()
    except VtpError as error:
        return Decision(engine, "no-library", str(error))
    if not any(device.partition(".")[0] == kind for device in listed):
        return Decision(
            engine,
            "no-device",
            f"{found} lists no {kind} on this machine, only {', '.join(listed)}; use --engine openvino-cpu",
        )
    return Decision(engine, "accepted", f"{found}, and a {kind}")


def _open_ort(
    name: str, path: str | Path, threads: int | None, plan: str | Path | None, **cuda: bool
) -> Engine:
    from vtp.engines.ort.session import OrtEngine

    return OrtEngine(path, name, threads, **cuda)


def _open_tensorrt(
    name: str, path: str | Path, threads: int | None, plan: str | Path | None, **cuda: bool
) -> Engine:
    from vtp.engines.tensorrt.run import TrtEngine

    if plan is None:
        raise VtpError(f"{Path(path).name} needs an engine that was built for {name}: run vtp-build")
    return TrtEngine(path, plan, name)


def _open_openvino(
    name: str, path: str | Path, threads: int | None, plan: str | Path | None, **cuda: bool
) -> Engine:
    from vtp.engines.openvino.session import OvEngine

    return OvEngine(path, name, threads)


class _Registered(NamedTuple):
    """An engine: what it can do, whether it runs here, how it opens a graph."""

    capabilities: Capabilities
    judge: Callable[[list[str] | None, str | None, Callable[[], CudaProbe]], Decision]
    open: Callable[..., Engine]


_TENSORRT = Capabilities(
    "cuda",
    ("tensorrt", "jetpack6"),
    built=True,
    largest_batch=1,
    replays=False,
    cache_in_place=("tensorrt",),  # written by TensorScatter; another cache has two places that change roles
    proven=False,
)
# Values lie in the host's memory, whatever computes.
_OPENVINO = Capabilities("cpu", ("ort", "jetpack6"), widens_float16=True, float64=False)


def _openvino(name: str, able: Capabilities) -> _Registered:
    return _Registered(able, partial(_judge_openvino, name), partial(_open_openvino, name))


# Best first: "auto" takes the first that is accepted, of those that are proven.
_ENGINES = {
    "ort-cuda": _Registered(
        Capabilities("cuda", ("ort", "jetpack6")), _judge_cuda, partial(_open_ort, "ort-cuda")
    ),
    "ort-cpu": _Registered(
        Capabilities("cpu", ("ort", "tensorrt", "jetpack6"), widens_float16=True),
        _judge_cpu,
        partial(_open_ort, "ort-cpu"),
    ),
    "openvino-cpu": _openvino("openvino-cpu", _OPENVINO),
    **{
        name: _openvino(name, dataclasses.replace(_OPENVINO, proven=False))
        for name in ("openvino-gpu", "openvino-npu")
    },
    **{
        name: _Registered(_TENSORRT, partial(_judge_tensorrt, name), partial(_open_tensorrt, name))
        for name in LIBRARIES
    },
}
_TARGETS = {target for engine in _ENGINES.values() for target in engine.capabilities.targets}


def capabilities(engine: str) -> Capabilities:
    """What an engine can do, by its name ("auto" is none). Raises UsageError for an unknown name."""
    if engine not in _ENGINES:
        raise UsageError(f"unknown engine '{engine}'; choose one of {', '.join(_ENGINES)}")
    return _ENGINES[engine].capabilities


def engine_names() -> list[str]:
    """Every name that `--engine` takes."""
    return [AUTO, *_ENGINES]


def choose_engine(
    wanted: str = AUTO,
    dtype: str | None = None,
    probe: Callable[[], list[str] | None] = installed_providers,
    cuda: Callable[[], CudaProbe] = probe_cuda,
    target: str = "ort",
) -> Choice:
    """Decide which engine to use for graphs that compute in `dtype` (None: not known), made for `target`.

    `probe` says which providers exist, `cuda` which GPUs (passed in, so that it can be tested).

    Raises UsageError for an unknown name, VtpError when what was asked for cannot run here.
    """
    known = engine_names()
    if not isinstance(wanted, str):
        raise UsageError(f"engine {quoted(wanted, 60)} is not a name; choose one of {', '.join(known)}")
    if wanted not in known:
        raise UsageError(
            f"unknown engine '{wanted}'{nearest(wanted, known)}; choose one of {', '.join(known)}"
        )
    if target not in _TARGETS:
        raise VtpError(
            f"this bundle was made for target '{target}', which no engine here runs; "
            "export it again with: vtp-export --target ort"
        )
    providers = probe() if wanted == AUTO or _is_ort(wanted) else None
    proven = [name for name, engine in _ENGINES.items() if engine.capabilities.proven]
    decisions: list[Decision] = []
    for name in proven if wanted == AUTO else [wanted]:
        decisions.append(_judge(name, providers, dtype, cuda, target))
        if decisions[-1].accepted:
            return Choice(name, [*decisions, *(_only_by_name(target) if wanted == AUTO else [])])
    # Of several that cannot run, the one that most people would install says why.
    told = next((one for one in decisions if one.engine == "ort-cpu"), decisions[-1])
    raise VtpError(f"engine '{wanted}' cannot run here: {told.reason}")


def judge_engines(
    dtype: str | None = None,
    probe: Callable[[], list[str] | None] = installed_providers,
    cuda: Callable[[], CudaProbe] = probe_cuda,
    target: str | None = "ort",
) -> list[Decision]:
    """Every engine, best first, whether it can run here, and why (not); raises nothing that it can tell.

    `target` None: whatever it is made for.
    """
    broken, providers = "", None
    try:
        providers = probe()
    except VtpError as error:
        broken = str(error)
    return [
        Decision(name, "no-library", broken)
        if broken and _is_ort(name)
        else _judge(name, providers, dtype, cuda, target)
        for name in _ENGINES
    ]


def _is_ort(name: str) -> bool:
    return name.startswith("ort-")


def _only_by_name(target: str) -> list[Decision]:
    return [
        Decision(name, "by-name", f"its code never ran on a GPU yet: only by name, --engine {name}")
        for name, engine in _ENGINES.items()
        if engine.capabilities.built and not engine.capabilities.proven
        if target in engine.capabilities.targets
    ]


def _judge(
    name: str,
    providers: list[str] | None,
    dtype: str | None,
    cuda: Callable[[], CudaProbe],
    target: str | None,
) -> Decision:
    targets = _ENGINES[name].capabilities.targets
    if target is not None and target not in targets:
        return Decision(
            name,
            "target",
            f"it does not run target '{target}'; export the bundle again with --target {targets[0]}",
        )
    return _ENGINES[name].judge(providers, dtype, cuda)


def open_graph(
    path: str | Path,
    engine: str,
    threads: int | None = None,
    plan: str | Path | None = None,
    **cuda: bool,
) -> Engine:
    """Open one graph file with the engine that `choose_engine` decided on.

    `plan` is the file that TensorRT's engine was built into; `cuda` are OrtEngine's allow_cpu_nodes and
    cuda_graph.
    """
    capabilities(engine)  # an unknown name
    return _ENGINES[engine].open(path, threads, plan, **cuda)
