"""The export, start to end: a model folder becomes a verified bundle, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vtp.engines import VtpError
from vtp.export.checkpoint import loading as checkpoint
from vtp.export.checkpoint.loading import Checkpoint
from vtp.export.graphs.attention.operators import emitting
from vtp.export.manifest import describe
from vtp.export.onnx.emit import WeightStore, emit
from vtp.export.plan.plan import Plan, make_plan
from vtp.export.request import Job, Request
from vtp.export.verify.opening import open_each
from vtp.export.verify.parity import PROMPT, verify
from vtp.runtime.bundle.folder import MANIFEST, Bundle, open_bundle, whole_bundle
from vtp.runtime.bundle.manifest import TOKENIZER, Manifest
from vtp.runtime.prompt.prompter import Prompter

__all__ = ["Request", "export"]

Progress = Callable[[str], None]


def export(
    request: Request,
    progress: Progress = lambda _: None,
    store: Callable[[Path], WeightStore] = WeightStore,
    note: Callable[[str], None] = lambda _: None,
    settle: Callable[[Job], Job] = lambda job: job,
) -> Bundle:
    """Export a bundle and return it opened. `store` takes the weights (see `vtp.bench.shapes.weightless`).

    `note` gets a line about every setting of the model that the bundle does not serve, or only if asked.
    `settle` sees what was decided before anything is traced: it may change it, or raise.

    Raises UsageError for a bad request, VtpError when the model cannot be served or a fidelity check fails;
    in every such case the output folder is as it was.
    """
    request.check()
    job = settle(request.resolve(_load_model(request, progress, note)))
    plan = _make_plan(job)
    with whole_bundle(request.output, request.overwrite) as folder:
        _write_tokenizer(job.model, folder)
        weights = store(folder)
        _emit_graphs(job, plan, weights, progress)
        _verify(folder, describe(folder, job, plan), job, plan, request.verify, progress)
        if request.verify == "none" and weights.filled:
            _open_graphs(folder, progress, note)
    return open_bundle(request.output)


def _load_model(request: Request, progress: Progress, note: Callable[[str], None]) -> Checkpoint:
    """The model that is asked for, its weights still on the disk."""
    folder = checkpoint.resolve(request.model)
    checkpoint.check(folder, request.frames, request.reduction)
    progress("load the model")
    model = checkpoint.load(
        folder, request.precision, request.image_size, request.image_fit, request.frames, request.reduction
    )
    for line in model.notes:
        note(line)
    return model


def _make_plan(job: Job) -> Plan:
    with checkpoint.about(job.model.folder):  # examples run through the model: sizes that do not fit show
        return job.target.prepare(make_plan(job.layout))


def _write_tokenizer(model: Checkpoint, folder: Path) -> None:
    """Also refuses a tokenizer or chat template that no prompt can go through, before minutes are spent."""
    (folder / TOKENIZER).write_text(model.tokenizer_json, encoding="utf-8")
    try:
        prompter = Prompter(model.text, folder / TOKENIZER)
        prompt = prompter.encode(prompter.messages_for(PROMPT))
    except VtpError as error:  # what would be a user's mistake is the model's here
        raise VtpError(f"the model in {model.folder} cannot be prompted: {error}") from error
    rows = model.family.decoder.model.embed_tokens.num_embeddings
    outside = [one for one in prompt.ids if one >= rows and one != model.text.image_token_id]
    if outside:
        raise VtpError(
            f"the model in {model.folder} cannot be prompted: its tokenizer gives id {outside[0]}, and its "
            f"embedding table has {rows} rows"
        )


def _emit_graphs(job: Job, plan: Plan, store: WeightStore, progress: Progress) -> None:
    family = job.model.family
    with emitting(family.decoder.model, family.tower, job.target.attending):
        for spec in plan.graphs:
            progress(f"export {spec.name}")
            emit(spec, store, job.target.opset)


def _open_graphs(folder: Path, progress: Progress, note: Callable[[str], None]) -> None:
    """Refuse a bundle whose graphs do not open, the least that is held where nothing is verified."""
    progress("open every graph")
    if not open_each(open_bundle(folder)):
        note("no graph was opened, since ONNX Runtime is missing: see vtp-doctor")


def _verify(folder: Path, manifest: Manifest, job: Job, plan: Plan, mode: str, progress: Progress) -> None:
    """Write the manifest, hold the bundle against torch as `mode` says, and add what was measured."""
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    bundle = open_bundle(folder)  # what an outside method wrote may be refused: then no bundle is left
    if mode == "none":
        manifest.parity.update({"mode": "none"})
    else:
        progress(f"verify against the torch model ({mode})")
        manifest.parity.update(verify(bundle, job.model, plan, job.schedules, mode))
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
