"""Fidelity: every graph against its torch module, and generation against the model it was made from.

A float16 bundle is held against the same, rounded weights computed in float32: the error is then the bundle's
own and not the reference's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtp.engines import Value, VtpError
from vtp.export.checkpoint.loading import Checkpoint
from vtp.export.checkpoint.weights import fill, streamed
from vtp.export.graphs.attention.operators import emitting
from vtp.export.onnx.emit import GraphSpec
from vtp.export.plan.plan import Plan
from vtp.export.plan.schedule import Schedule, keep_of
from vtp.export.pruners.base import Pruner
from vtp.export.pruners.site import Site
from vtp.export.verify.by_layers import STEPS as LAYER_STEPS
from vtp.export.verify.by_layers import Layers
from vtp.export.verify.overflow import check_finite, refuse_overflow
from vtp.export.verify.reference import ReferenceAnswer, reference_generate
from vtp.export.verify.streams import check_stream
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.compare import Comparison, compare, limits_of, row_scale
from vtp.runtime.example_input import PROMPT, sample_for
from vtp.runtime.opening import every_graph
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompter
from vtp.runtime.result import Timings
from vtp.runtime.stages.runner import StageRunner

STEPS = 16


@dataclass(frozen=True)
class _Case:
    """One picture and one prompt, as the graphs and as transformers take them."""

    pixels: np.ndarray
    ids: list[int]
    image_start: int
    expanded: Tensor  # input_ids [1,T] with N placeholders


def verify(
    bundle: Bundle, model: Checkpoint, plan: Plan, schedules: Sequence[Schedule], mode: str = "full"
) -> dict[str, Any]:
    """Check a bundle on ONNX Runtime's CPU provider; returns the parity report for its manifest.

    Every keep-count's pruner is checked; generation is checked for the smallest and the largest keep-count.
    Mode "full" loads the torch model and the bundle whole; "layers" does the same with a few hundred MB of
    weights in memory at a time, for fewer tokens, and compares what goes from layer to layer besides.
    Raises VtpError, naming the graph (or its layer) and the difference, when a check fails.
    """
    with ExitStack() as stack:
        layers = None
        if mode == "layers":
            stack.enter_context(streamed(model.family.model))
            layers = Layers(bundle, plan)
        else:
            fill(model.family.model)
            model.family.model.float()
        runner = layers.runner if layers else StageRunner(bundle, "ort-cpu", None, every_graph(bundle))
        stack.callback(runner.close)
        steps = LAYER_STEPS if layers else STEPS
        found = _check_keeps(bundle, model, plan, schedules, runner, steps, layers)
        if layers:
            layers.check_counts()
    return {"mode": mode, "engine": "ort-cpu", "steps": steps, **found}


def _check_keeps(
    bundle: Bundle,
    model: Checkpoint,
    plan: Plan,
    schedules: Sequence[Schedule],
    runner: StageRunner,
    steps: int,
    layers: Layers | None,
) -> dict[str, Any]:
    """What is measured of the report: "graphs", "generation"; by layers also "layers" and "borders"."""
    case = _case(bundle, model)
    by_keep = {keep_of(schedule): schedule for schedule in schedules}
    keeps = bundle.manifest.visual.keep
    graphs: dict[str, Any] = {}
    generation: dict[str, Any] = {}
    for keep in keeps:
        values = runner.prefill(keep, case.pixels, case.ids, case.image_start, Timings())
        refuse_overflow(bundle, keep, values)
        graphs.update(_check_graphs(bundle, plan, model, keep, values, set(graphs), layers))
        if keep in (keeps[0], keeps[-1]):
            with layers.listening(*plan.caches) if layers else nullcontext():
                answer = _reference(model, case, by_keep.get(keep, ()), values, bundle, steps)
            generation[str(keep)] = _check_generation(runner, keep, values, answer, bundle, layers)
    found = {"graphs": graphs, "generation": generation}
    if bundle.manifest.stream is not None:
        found["stream"] = worst_of(check_stream(bundle, model, runner, values, case.pixels))
    return {**found, "layers": layers.worst, "borders": layers.compared} if layers else found


def _case(bundle: Bundle, model: Checkpoint) -> _Case:
    prompter = Prompter(bundle.manifest.text, bundle.path("tokenizer.json"))
    prompt = prompter.encode(prompter.messages_for(PROMPT))
    image = bundle.manifest.image
    pixels = preprocess(sample_for(image), image)
    start, width = prompt.image_start, model.family.placeholders
    expanded = [*prompt.ids[:start], *model.family.picture_ids, *prompt.ids[start + width :]]
    encoder = bundle.manifest.stages_of("encoder")[0]
    dtype = bundle.manifest.graphs[encoder.file].inputs["pixel_values"].dtype
    return _Case(pixels.astype(dtype), prompt.ids, start, torch.tensor([expanded]))


# -- graph by graph ------------------------------------------------------------------------------------------


def _check_graphs(
    bundle: Bundle,
    plan: Plan,
    model: Checkpoint,
    keep: int,
    values: dict[str, Value],
    skip: set[str],
    layers: Layers | None,
) -> dict[str, Any]:
    """Compare every graph without a cache with its module, on the values that flowed through the bundle."""
    specs = {f"{spec.name}.onnx": spec for spec in plan.graphs if spec.name not in plan.caches}
    report: dict[str, Any] = {}
    for when in ("image", "prefill"):
        for stage in bundle.manifest.stages_for(when, keep):
            spec = specs.get(stage.file)
            if spec is None or spec.name in skip:
                continue
            inputs = [values[stage.inputs[item.name]].numpy() for item in spec.inputs]
            outputs = {name: values[target].numpy() for name, target in stage.outputs.items()}
            listening = layers.listening(spec.name) if layers else nullcontext()
            with emitting(model.family.decoder.model, model.family.tower), torch.no_grad(), listening:
                report[spec.name] = _compare(spec, inputs, outputs, bundle.manifest.dtype)
    return report


def _compare(
    spec: GraphSpec, inputs: list[np.ndarray], outputs: dict[str, np.ndarray], dtype: str
) -> dict[str, Any]:
    """A graph's line of the report: "indices" where it chooses some, and the figures of its float outputs."""
    tensors = [_as_reference(array) for array in inputs]
    wanted = _call(spec, tensors)
    found: list[Comparison] = []
    for name, tensor in wanted.items():
        one = compare(outputs[name], tensor.numpy(), dtype)
        if name == "keep_indices" and not one.ok and _unstable(spec, tensors, tensor):
            return {"indices": "equal up to ties within 1e-6"}
        if not one.ok:
            raise VtpError(
                f"fidelity check failed: {name} of {spec.name} is not its torch module's: {one.why}"
            )
        if tensor.is_floating_point():
            found.append(one)
    if not wanted:
        raise VtpError(f"fidelity check failed: {spec.name} has no output to compare")
    return {**({"indices": "equal"} if "keep_indices" in wanted else {}), **worst_of(found)}


def worst_of(found: Sequence[Comparison]) -> dict[str, Any]:
    """The figures of several comparisons together; empty for none."""
    if not found:
        return {}
    return {
        "rows": sum(one.rows for one in found),
        "relative": max(one.relative for one in found),
        "element": max(one.element for one in found),
        "cosine": min(one.cosine for one in found),
    }


def _call(spec: GraphSpec, tensors: list[Tensor]) -> dict[str, Tensor]:
    answer = spec.module(*tensors)
    answers = answer if isinstance(answer, tuple) else (answer,)
    return dict(zip(spec.outputs, answers, strict=True))


def _unstable(spec: GraphSpec, tensors: list[Tensor], chosen: Tensor) -> bool:
    """Whether the torch module's own choice changes when its cues change in the seventh digit."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        noisy = [
            tensor * (1 + 1e-6 * torch.randn(tensor.shape, generator=generator))
            if tensor.is_floating_point()
            else tensor
            for tensor in tensors
        ]
        if not torch.equal(_call(spec, noisy)["keep_indices"], chosen):
            return True
    return False


def _as_reference(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array.copy())
    return tensor.float() if tensor.is_floating_point() else tensor


# -- end to end ----------------------------------------------------------------------------------------------


class Chosen(Pruner):
    """Keeps what a bundle kept, so that generation is compared on equal tokens."""

    def __init__(self, pruner: Pruner, keep_indices: Tensor, rows: Tensor | None = None) -> None:
        """Stand in for `pruner` with indices [1,K] and, where it merges, the rows [1,K,.] it made (in the
        decoder the whole sequence [1,S,.] that they are part of)."""
        self.name, self.site, self.needs = pruner.name, pruner.site, pruner.needs  # type: ignore[misc]
        self.merges = pruner.merges  # type: ignore[misc]
        super().__init__(pruner.grid, pruner.keep)
        self.settings = pruner.settings
        self.answer = keep_indices if rows is None else (keep_indices, rows)

    def forward(self, **_: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.answer


_KEPT_ROWS = ("kept_features", "kept_embeds", "kept_hidden_states")  # by kind of site


def chosen(
    bundle: Bundle, schedule: Schedule, values: Mapping[str, Value], places: Tensor | None = None
) -> list[Pruner]:
    """The pruners of a schedule with what a bundle chose for them, from the tensors that flowed through it.

    `places` are the family's: where the patches are among the visual tokens.
    """
    stages = [
        stage
        for when in ("image", "prefill")
        for stage in bundle.manifest.stages_for(when, keep_of(schedule) if schedule else 0)
        if "keep_indices" in stage.outputs
    ]
    answers: list[Pruner] = []
    arriving = torch.arange(bundle.manifest.visual.count)
    if places is not None and schedule and not Site.parse(schedule[0].site).in_decoder:
        arriving = places
    for pruner, stage in zip(schedule, stages, strict=True):
        kept = torch.from_numpy(values[stage.outputs["keep_indices"]].numpy())
        rows = next((name for name in _KEPT_ROWS if name in stage.outputs), None)
        merged = torch.from_numpy(values[stage.outputs[rows]].numpy()) if pruner.merges and rows else None
        # A bundle counts within the picture, a pruner among the tokens that reach it.
        answers.append(Chosen(pruner, torch.searchsorted(arriving, kept), merged))
        arriving = kept[0]
    return answers


def _reference(
    model: Checkpoint, case: _Case, schedule: Schedule, values: dict[str, Value], bundle: Bundle, steps: int
) -> ReferenceAnswer:
    with torch.no_grad():
        return reference_generate(
            model.family.model,
            chosen(bundle, schedule, values, model.family.places()),
            case.expanded,
            torch.from_numpy(case.pixels).float(),
            max_new_tokens=steps,
            eos_ids=(),
            positions=bundle.manifest.method.positions,
            image_size=bundle.manifest.image.image_size,
            view_grids=bundle.manifest.image.view_grids,
            reference=model.family.reference,
            reduction=model.family.row_reduction,
            restore=bundle.manifest.method.restore,
        )


def _check_generation(
    runner: StageRunner,
    keep: int,
    values: dict[str, Value],
    answer: ReferenceAnswer,
    bundle: Bundle,
    layers: Layers | None,
) -> dict[str, Any]:
    """Feed the reference's tokens to the bundle step by step and compare logits and greedy choices."""
    dtype = bundle.manifest.dtype
    logits = values["logits"].numpy()[0, 0]
    position = int(values["next_position"].numpy()[0])
    found: list[Comparison] = []
    equal = 0
    for number, token in enumerate(answer.token_ids):
        wanted = answer.step_logits[number].float().numpy()
        found.append(compare(logits, wanted, dtype))
        if not found[-1].ok:
            raise VtpError(
                f"fidelity check failed: logits of token {number + 1} at {keep} kept are not torch's: "
                f"{found[-1].why}"
            )
        if int(logits.argmax()) == token:
            equal += 1
        elif not _undecided(wanted, dtype):
            raise VtpError(
                f"fidelity check failed: greedy token {number + 1} of {keep} kept differs from torch's"
            )
        if number + 1 < len(answer.token_ids):
            logits = runner.step(keep, token, position + number)
            if dtype == "float16":
                check_finite(logits, "decoder.onnx", "logits")
            if layers:
                layers.check_step(number + 1)
    if not found:
        raise VtpError(f"fidelity check failed: the answer at {keep} kept has no token to compare")
    return {"tokens": len(found), "equal": equal, **worst_of(found)}


def _undecided(logits: np.ndarray, dtype: str) -> bool:
    """Whether the two largest logits are nearer than rows of this dtype may be apart."""
    limits = limits_of(dtype)
    second, first = np.partition(logits.astype(np.float64), -2)[-2:]
    scale = max(float(row_scale(logits[None].astype(np.float64), limits)[0, 0]), abs(float(first)))
    return bool(first - second <= limits.relative * scale)
