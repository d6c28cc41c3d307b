"""Which engine runs here: every candidate is accepted or rejected with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import util
from pathlib import Path

from vtp.engines.base import Engine
from vtp.engines.cuda.driver import CudaProbe, probe_cuda
from vtp.engines.errors import UsageError, VtpError, nearest, quoted
from vtp.engines.ort.library import load_onnxruntime
from vtp.engines.tensorrt.library import LIBRARIES, load_library

AUTO = "auto"
_INSTALL = "pip install 'vtp-edge[ort]' (or 'vtp-edge[ort-gpu]' with an NVIDIA GPU)"


@dataclass(frozen=True)
class Decision:
    """One candidate, whether it can run here, and why (not)."""

    engine: str
    accepted: bool
    reason: str


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
    if providers is None:
        return Decision("ort-cuda", False, f"onnxruntime is not installed: {_INSTALL}")
    if "CUDAExecutionProvider" not in providers:
        return Decision(
            "ort-cuda",
            False,
            "this onnxruntime has no CUDA provider: pip install 'vtp-edge[ort-gpu]' in place of onnxruntime",
        )
    if dtype == "float32":
        return Decision(
            "ort-cuda",
            False,
            "its fused attention takes no float32: export the bundle again with --dtype float16",
        )
    found = cuda()  # onnxruntime-gpu lists its provider wherever it is installed
    if not found.devices:
        return Decision("ort-cuda", False, f"{found.reason}; check nvidia-smi, or use --engine ort-cpu")
    device = found.devices[0]
    return Decision("ort-cuda", True, f"the CUDA provider is present, and a {device.name} (SM {device.sm})")


def _judge_cpu(providers: list[str] | None, dtype: str | None, cuda: Callable[[], CudaProbe]) -> Decision:
    if providers is None:
        return Decision("ort-cpu", False, f"onnxruntime is not installed: {_INSTALL}")
    return Decision("ort-cpu", True, "onnxruntime is installed")


def _judge_tensorrt(
    engine: str, providers: list[str] | None, dtype: str | None, cuda: Callable[[], CudaProbe]
) -> Decision:
    try:
        library = load_library(engine)
    except VtpError as error:
        return Decision(engine, False, str(error))
    found = cuda()
    if not found.devices:
        return Decision(engine, False, f"{found.reason}; check nvidia-smi, or use --engine ort-cpu")
    device = found.devices[0]
    return Decision(
        engine, True, f"{library.__name__} {library.__version__}, and a {device.name} (SM {device.sm})"
    )


# Which engines run the graphs of a target.
_RUNS = {
    "ort": ("ort-cuda", "ort-cpu"),
    "tensorrt": ("ort-cpu", *LIBRARIES),
    "jetpack6": ("ort-cuda", "ort-cpu", *LIBRARIES),
}

Judge = Callable[[list[str] | None, str | None, Callable[[], CudaProbe]], Decision]

# Best first: "auto" takes the first that is accepted, of those that were ever run on their hardware.
_JUDGES: dict[str, Judge] = {
    "ort-cuda": _judge_cuda,
    "ort-cpu": _judge_cpu,
    **{name: partial(_judge_tensorrt, name) for name in LIBRARIES},
}
_BY_NAME = tuple(LIBRARIES)


def engine_names() -> list[str]:
    """Every name that `--engine` takes."""
    return [AUTO, *_JUDGES]


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
    if target not in _RUNS:
        raise VtpError(
            f"this bundle was made for target '{target}', which no engine here runs; "
            "export it again with: vtp-export --target ort"
        )
    providers = probe()
    names = [name for name in _JUDGES if name not in _BY_NAME] if wanted == AUTO else [wanted]
    decisions = [_judge(name, providers, dtype, cuda, target) for name in names]
    for decision in list(decisions):
        if decision.accepted:
            if wanted == AUTO:
                decisions += [_not_by_itself(name) for name in _BY_NAME if name in _RUNS[target]]
            return Choice(decision.engine, decisions)
    raise VtpError(f"engine '{wanted}' cannot run here: {decisions[-1].reason}")


def judge_engines(
    dtype: str | None = None,
    probe: Callable[[], list[str] | None] = installed_providers,
    cuda: Callable[[], CudaProbe] = probe_cuda,
    target: str | None = "ort",
) -> list[Decision]:
    """Every engine, best first, whether it can run here, and why (not); raises nothing that it can tell.

    `target` None: whatever it is made for.
    """
    try:
        providers = probe()
    except VtpError as error:
        return [Decision(name, False, str(error)) for name in _JUDGES]
    return [_judge(name, providers, dtype, cuda, target) for name in _JUDGES]


def _not_by_itself(name: str) -> Decision:
    return Decision(name, False, f"its code never ran on a GPU yet: only by name, --engine {name}")


def _judge(
    name: str,
    providers: list[str] | None,
    dtype: str | None,
    cuda: Callable[[], CudaProbe],
    target: str | None,
) -> Decision:
    if target is not None and name not in _RUNS.get(target, ()):
        fitting = "tensorrt" if name in LIBRARIES else "ort"
        return Decision(
            name, False, f"it does not run target '{target}'; export the bundle again with --target {fitting}"
        )
    return _JUDGES[name](providers, dtype, cuda)


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
    if engine in LIBRARIES:
        from vtp.engines.tensorrt.run import TrtEngine

        if plan is None:
            raise VtpError(f"{Path(path).name} needs an engine that was built for {engine}: run vtp-build")
        return TrtEngine(path, plan, engine)
    from vtp.engines.ort.session import OrtEngine

    return OrtEngine(path, engine, threads, **cuda)
