"""Full TensorRT 10 and 11 and TensorRT-RTX 1, which share one Python API: graph file in, engine bytes out.

Knows no cache, no process and no device: `build` adds those, `run` runs what was built. The library
is imported where it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import util
from pathlib import Path
from typing import Any

from vtp.engines.errors import UsageError, VtpError

# Engine name -> Python module.
LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL = {
    "tensorrt": "install TensorRT 10.3 or newer (JetPack brings it; elsewhere: pip install tensorrt)",
    "tensorrt-rtx": "pip install 'vtp-edge[trtrtx]'",
}

Shape = Sequence[int]
# Input name -> its smallest, most usual and largest shape. Inputs without dynamic axes may be left out.
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
# One profile, or several: the widest first, then narrower ones that the engine is tuned for as well.
Profiles = Profile | Sequence[Profile]
Step = Callable[[str, int, int], None]  # phase of the builder, steps done, steps in all


@dataclass(frozen=True)
class BuildOptions:
    """What changes the engine that comes out, so what its cache key is made of.

    workspace   bytes that one layer may use beside weights and tensors
    level       the builder's optimization level, 0 (quick to build) to 5; None: the library's default
    plugin      name of the plugin that takes the place of some nodes (`vtp.engines.plugins`); "": none
    """

    workspace: int = 1 << 30
    level: int | None = None
    plugin: str = ""


@dataclass(frozen=True)
class Built:
    """An engine's bytes (the library's own buffer: a copy could be gigabytes), and the timing cache to
    build the next one with (empty for TensorRT-RTX)."""

    plan: memoryview
    timing_cache: bytes


def load_library(engine: str) -> Any:
    """Import the Python module of "tensorrt" or "tensorrt-rtx".

    Raises UsageError for another name, VtpError when it is not installed or does not load.
    """
    if engine not in LIBRARIES:
        raise UsageError(f"unknown engine '{engine}'; TensorRT builds are for one of {', '.join(LIBRARIES)}")
    if util.find_spec(LIBRARIES[engine]) is None:
        raise VtpError(f"{LIBRARIES[engine]} is not installed: {INSTALL[engine]}")
    try:
        return importlib.import_module(LIBRARIES[engine])
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VtpError(
            f"{LIBRARIES[engine]} is installed but does not load ({reason}); {INSTALL[engine]}"
        ) from error


def build_engine(
    path: str | Path,
    engine: str,
    profile: Profiles | None = None,
    options: BuildOptions | None = None,
    timing_cache: bytes = b"",
    step: Step = lambda phase, done, total: None,
) -> Built:
    """Parse a graph and build it in this process, strongly typed: every tensor keeps the graph's dtype.

    Raises VtpError in one line: nodes that the library does not take (by name, with its reason), a profile
    that does not fit the graph, a build that fails.
    """
    trt, path, options = load_library(engine), Path(path), options or BuildOptions()
    log = library_log(engine)
    log.clear()
    builder = trt.Builder(log)
    network, parser = _parse(trt, builder, log, path, options.plugin)
    config = builder.create_builder_config()
    _configure(trt, config, options)
    for one in profile_list(profile):
        _add_profile(builder, config, network, one, path.name)
    cache = _set_timing_cache(engine, config, timing_cache)
    config.progress_monitor = _monitor(engine, step)
    plan = builder.build_serialized_network(network, config)
    del parser  # it owns the weights that the network reads: not before the build is done
    if plan is None:
        raise VtpError(f"{engine} {trt.__version__} cannot build {path.name}: {log.reason()}")
    return Built(memoryview(plan), bytes(cache.serialize()) if cache else b"")


def refused_nodes(path: str | Path, engine: str) -> list[str]:
    """What `engine` does not take of a graph: one line for each node, empty where the whole graph parses."""
    trt, log = load_library(engine), library_log(engine)
    log.clear()
    builder = trt.Builder(log)
    network = _network(trt, builder)  # held until the end, as the builder: the parser keeps neither alive
    parser = trt.OnnxParser(network, log)
    return [] if parser.parse_from_file(str(path)) else _parse_errors(parser) or [log.reason()]


def profile_list(given: Profiles | None) -> list[Profile]:
    """The profiles that were given, at least one."""
    if given is None or isinstance(given, Mapping):
        return [given or {}]
    return list(given)


def _parse(trt: Any, builder: Any, log: Any, path: Path, plugin: str) -> tuple[Any, Any]:
    if not path.is_file():
        raise VtpError(f"no graph at {path}: no such file")
    network = _network(trt, builder)
    parser = trt.OnnxParser(network, log)
    if plugin:
        from vtp.engines.plugins.greedy import prepare_graph

        parsed = parser.parse(prepare_graph(trt, path), str(path))
    else:
        parsed = parser.parse_from_file(str(path))
    if parsed:
        return network, parser
    errors = _parse_errors(parser)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    raise VtpError(
        f"{trt.__name__} {trt.__version__} does not take {path.name}: "
        f"{errors[0] if errors else log.reason()}{more}; "
        "export the bundle for it with: vtp-export --target tensorrt, or jetpack6 for TensorRT before 10.15"
    )


def _network(trt: Any, builder: Any) -> Any:
    # From 11 on every network is strongly typed, and the flag may be gone.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if typed is None else 1 << int(typed))


def _parse_errors(parser: Any) -> list[str]:
    lines = []
    for place in range(parser.num_errors):
        error = parser.get_error(place)
        node = f"node '{error.node_name()}' ({error.node_operator()}): " if error.node_operator() else ""
        lines.append(node + " ".join(error.desc().split())[:300])
    return lines


def _configure(trt: Any, config: Any, options: BuildOptions) -> None:
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.level is not None:
        config.builder_optimization_level = options.level


def _add_profile(builder: Any, config: Any, network: Any, given: Profile, name: str) -> None:
    """One optimization profile from plain data, held against the network's inputs."""
    inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    unknown = sorted(set(given) - set(inputs))
    if unknown:
        raise VtpError(f"the profile names '{unknown[0]}'; {name} takes {', '.join(inputs)}")
    profile = builder.create_optimization_profile()
    for tensor in inputs.values():
        if tensor.name in given:
            shapes = tuple(tuple(shape) for shape in given[tensor.name])
            _check_shapes(name, tensor, shapes)
            profile.set_shape(tensor.name, *shapes)
        elif -1 in tuple(tensor.shape):
            raise VtpError(
                f"input '{tensor.name}' of {name} has dynamic axes {list(tensor.shape)}; "
                "give its smallest, usual and largest shape"
            )
    config.add_optimization_profile(profile)


def _check_shapes(name: str, tensor: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    wanted = tuple(tensor.shape)
    fits = len(shapes) == 3 and all(
        len(shape) == len(wanted)
        and all(have >= 0 and want in (-1, have) for want, have in zip(wanted, shape, strict=True))
        for shape in shapes
    )
    ordered = fits and all(low <= usual <= high for low, usual, high in zip(*shapes, strict=True))
    if not ordered:
        raise VtpError(
            f"profile {[list(shape) for shape in shapes]} of input '{tensor.name}' does not fit "
            f"{name}, which has {list(wanted)}; give smallest <= usual <= largest"
        )


def _set_timing_cache(engine: str, config: Any, content: bytes) -> Any:
    """Full TensorRT only: TensorRT-RTX times nothing while building and calls these functions deprecated."""
    if engine == "tensorrt-rtx":
        return None
    # A cache of another version or device is not taken; a new one then takes its place.
    for candidate in (content, b""):
        cache = config.create_timing_cache(candidate)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


@lru_cache(maxsize=len(LIBRARIES))
def library_log(engine: str) -> Any:
    """The logger of a library, one for the process as TensorRT wants it; prints nothing, keeps the errors."""
    trt = load_library(engine)
    base: Any = trt.ILogger
    severities = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    class Log(base):
        def __init__(self) -> None:
            base.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in severities:
                self._errors.append(" ".join(message.split()))

        def clear(self) -> None:
            self._errors.clear()

        def reason(self) -> str:
            """What the library said last, that is not about the missing GPU it builds without."""
            errors = [line for line in self._errors if "cudaError" not in line] or self._errors
            return errors[-1][:400] if errors else "it gives no reason"

    return Log()


def _monitor(engine: str, step: Step) -> Any:
    base: Any = load_library(engine).IProgressMonitor

    class Monitor(base):
        def __init__(self) -> None:
            base.__init__(self)
            self._totals: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._totals[phase] = steps
            step(phase, 0, steps)

        def step_complete(self, phase: str, done: int) -> bool:
            step(phase, done + 1, self._totals.get(phase, 0))
            return True

        def phase_finish(self, phase: str) -> None:
            self._totals.pop(phase, None)

    return Monitor()
