"""Which engine runs which stage of a bundle: one for all, or a stage elsewhere.

Engines whose values lie in the host's memory can be mixed: what one made the next reads in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from vtp.engines import AUTO, Choice, UsageError, VtpError, capabilities, choose_engine, nearest
from vtp.engines.errors import shown
from vtp.engines.graph.file import computes_float64, read_graph
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.measured_engines import MEASURED_WITH, Measured, recall
from vtp.runtime.opening import Opening

FLOAT64 = "ort-cpu"  # runs what others would round to float32
_EXAMPLE = "--engine ort-cpu,vision_encoder=openvino-cpu"


@dataclass(frozen=True)
class StageEngines:
    """The engines of a bundle's stages.

    choice     the engine of all stages that are not elsewhere, and how it was decided
    elsewhere  graph file -> another engine
    notes      what was not asked for, a line each
    """

    choice: Choice
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def opening(self, wanted: Opening | None) -> Opening:
        """How to open the graphs: as `wanted`, on these engines."""
        return replace(wanted or Opening(), elsewhere=dict(self.elsewhere))

    def by_stage(self, manifest: Manifest) -> dict[str, str]:
        """Stage name -> engine, in the order of the stages; a graph that runs on another engine than its
        stage's first one stands there by its file, as `choose_engines` reads it."""
        found: dict[str, str] = {}
        for stage in manifest.stages:
            engine = self.elsewhere.get(stage.file, self.choice.engine)
            if found.setdefault(stage.name, engine) != engine:
                found[stage.file] = engine
        return found

    @property
    def label(self) -> str:
        """The choice as `choose_engines` reads it; what was measured with it is kept under this name."""
        parts = [f"{file}={engine}" for file, engine in sorted(self.elsewhere.items())]
        return ",".join([self.choice.engine, *parts])


def main_engine(label: str) -> str:
    """The engine that runs all stages that are not elsewhere, of a `StageEngines.label`."""
    return label.partition(",")[0]


def choose_engines(
    bundle: Bundle,
    wanted: str = AUTO,
    choose: Callable[..., Choice] = choose_engine,
    threads: int | None = None,
) -> StageEngines:
    """Decide which engine runs which stage.

    wanted  an engine for all stages, or "auto"; after it, each behind a comma, STAGE=ENGINE for stages that
            another one runs (or GRAPH FILE=ENGINE)
    threads CPU threads of one operator: for "auto", what `vtp-bench --engines` measured with as many is taken

    A graph that computes in float64 goes to ort-cpu where the engine for all stages would round it, unless
    the stage was named. Raises UsageError for what is not written so, for unknown stages and engines, and
    for engines that cannot be mixed; VtpError for one that cannot run here.
    """
    manifest = bundle.manifest

    def judged(name: str) -> Choice:
        return choose(name, manifest.dtype, target=manifest.target)

    first, named = _parse(wanted) if isinstance(wanted, str) else (wanted, {})
    choice = judged(first)
    if wanted == AUTO and (taken := _measured(bundle, choice, threads, judged)) is not None:
        return taken
    asked = _by_file({stage: judged(engine).engine for stage, engine in named.items()}, manifest)
    _refuse_unmixable({choice.engine, *asked.values()})
    moved = [] if capabilities(choice.engine).float64 else _with_float64(bundle, set(asked))
    if moved:
        _check_mover(judged, choice.engine, moved)
    found = {**asked, **dict.fromkeys(moved, FLOAT64)}
    elsewhere = {file: engine for file, engine in sorted(found.items()) if engine != choice.engine}
    return StageEngines(choice, elsewhere, tuple(_note(file, choice.engine) for file in moved))


def _measured(
    bundle: Bundle, choice: Choice, threads: int | None, judged: Callable[[str], Choice]
) -> StageEngines | None:
    """The engines that were measured as fastest here; None where "auto" has a GPU, or nothing is known."""
    able = capabilities(choice.engine)
    found = recall(bundle, threads) if able.on_cpu and able.float64 else Measured()
    if found.note:
        return StageEngines(choice, notes=(found.note,))
    elsewhere = {file: engine for file, engine in found.engines.items() if engine != choice.engine}
    if not elsewhere:
        return None
    try:
        for engine in set(elsewhere.values()):
            judged(engine)
    except VtpError as error:
        return StageEngines(choice, notes=(f"what {MEASURED_WITH} chose is not used: {error}",))
    told = ", ".join(f"{file} on {engine}" for file, engine in sorted(elsewhere.items()))
    note = f"as {MEASURED_WITH} measured here, {told}; the others on {choice.engine}"
    return StageEngines(choice, elsewhere, (note,))


def _parse(wanted: str) -> tuple[str, dict[str, str]]:
    first, *rest = (part.strip() for part in wanted.split(","))
    if "=" in first:
        first, rest = AUTO, [first, *rest]
    named: dict[str, str] = {}
    for part in rest:
        stage, equals, engine = (piece.strip() for piece in part.partition("="))
        if not (stage and equals and engine) or stage in named:
            raise UsageError(
                f"engine '{shown(wanted)}' is not an engine and then one STAGE=ENGINE for each stage that is "
                f"to run elsewhere, such as {_EXAMPLE}"
            )
        named[stage] = engine
    return first, named


def _by_file(named: Mapping[str, str], manifest: Manifest) -> dict[str, str]:
    """Graph file -> engine, of stages or files by name; several pruners by keep-count have one name."""
    known = list(dict.fromkeys(stage.name for stage in manifest.stages))
    found: dict[str, str] = {}
    for name, engine in named.items():
        files = {stage.file for stage in manifest.stages if name in (stage.name, stage.file)}
        if not files:
            raise UsageError(
                f"no stage '{shown(name)}' in this bundle, which has {', '.join(known)}{nearest(name, known)}"
            )
        for file in files:
            if found.setdefault(file, engine) != engine:
                raise UsageError(f"stage {name} shares {file} with another one; give both one engine")
    return found


def _refuse_unmixable(engines: set[str]) -> None:
    for engine in sorted(engines) if len(engines) > 1 else []:
        able = capabilities(engine)
        if not able.on_cpu or able.built:
            raise UsageError(
                f"{engine} keeps values where no other engine reads them; give it all stages, or mix engines "
                "that end in -cpu"
            )


def _with_float64(bundle: Bundle, asked: set[str]) -> list[str]:
    """The graphs that compute in float64, but for those whose stages were named."""
    files = [file for file in bundle.manifest.graphs if file not in asked]
    return [file for file in files if computes_float64(read_graph(bundle.path(file)))]


def _check_mover(judged: Callable[[str], Choice], engine: str, moved: list[str]) -> None:
    try:
        judged(FLOAT64)
    except VtpError as error:
        raise VtpError(
            f"{', '.join(moved)} computes in float64, which {engine} rounds to float32, so that other tokens "
            f"would be kept, and {error}"
        ) from error


def _note(file: str, engine: str) -> str:
    return f"{file} runs on {FLOAT64}: it computes in float64, which {engine} rounds to float32"
