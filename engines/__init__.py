"""vtp.engines: opens and runs ONE graph file. Knows no model, no pruner and no bundle."""

from vtp.engines.base import Binding, Capabilities, Engine, Held, TensorSpec, Value
from vtp.engines.errors import UsageError, VtpError, nearest
from vtp.engines.ort.library import disable_telemetry
from vtp.engines.registry import (
    AUTO,
    Choice,
    Decision,
    capabilities,
    choose_engine,
    engine_names,
    judge_engines,
    open_graph,
)

__all__ = [
    "AUTO",
    "Binding",
    "Capabilities",
    "Choice",
    "Decision",
    "Engine",
    "Held",
    "TensorSpec",
    "UsageError",
    "Value",
    "VtpError",
    "capabilities",
    "choose_engine",
    "engine_names",
    "judge_engines",
    "nearest",
    "open_graph",
]

disable_telemetry()
