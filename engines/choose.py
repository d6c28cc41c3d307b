"""Which engine runs here: every candidate is accepted or rejected with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path

from vtp.engines.base import Engine
from vtp.engines.cuda import CudaProbe, probe_cuda
from vtp.engines.errors import UsageError, VtpError, nearest

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
        import onnxruntime
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


# Which engines run the graphs of a target. TensorRT itself is built for, not yet run by, this package.
_RUNS = {"ort": ("ort-cuda", "ort-cpu"), "tensorrt": ("ort-cpu",), "jetpack6": ("ort-cuda", "ort-cpu")}

# Best first: "auto" takes the first that is accepted.
_JUDGES: dict[str, Callable[[list[str] | None, str | None, Callable[[], CudaProbe]], Decision]] = {
    "ort-cuda": _judge_cuda,
    "ort-cpu": _judge_cpu,
}


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
    if wanted not in engine_names():
        known = engine_names()
        raise UsageError(
            f"unknown engine '{wanted}'{nearest(wanted, known)}; choose one of {', '.join(known)}"
        )
    if target not in _RUNS:
        raise VtpError(
            f"this bundle was made for target '{target}', which no engine here runs; "
            "export it again with: vtp-export --target ort"
        )
    providers = probe()
    names = list(_JUDGES) if wanted == AUTO else [wanted]
    decisions = [_judge(name, providers, dtype, cuda, target) for name in names]
    for decision in decisions:
        if decision.accepted:
            return Choice(decision.engine, decisions)
    raise VtpError(f"engine '{wanted}' cannot run here: {decisions[-1].reason}")


def judge_engines(
    dtype: str | None = None,
    probe: Callable[[], list[str] | None] = installed_providers,
    cuda: Callable[[], CudaProbe] = probe_cuda,
    target: str = "ort",
) -> list[Decision]:
    """Every engine, best first, whether it can run here, and why (not); raises nothing that it can tell."""
    try:
        providers = probe()
    except VtpError as error:
        return [Decision(name, False, str(error)) for name in _JUDGES]
    return [_judge(name, providers, dtype, cuda, target) for name in _JUDGES]


def _judge(
    name: str,
    providers: list[str] | None,
    dtype: str | None,
    cuda: Callable[[], CudaProbe],
    target: str,
) -> Decision:
    if name not in _RUNS.get(target, ()):
        return Decision(
            name, False, f"it does not run target '{target}'; export the bundle again with --target ort"
        )
    return _JUDGES[name](providers, dtype, cuda)


def open_graph(path: str | Path, engine: str, threads: int | None = None) -> Engine:
    """Open one graph file with the engine that `choose_engine` decided on."""
    from vtp.engines.ort import OrtEngine

    return OrtEngine(path, engine, threads)
