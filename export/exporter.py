"""The export, start to end: a model folder becomes a verified bundle, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtp.engines import UsageError, VtpError
from vtp.export.checkpoint import loading as checkpoint
from vtp.export.checkpoint.loading import DTYPES, Checkpoint
from vtp.export.graphs.attention.operators import emitting
from vtp.export.keep_counts import check_keep, keep_for_ratio, parse_keep
from vtp.export.manifest import describe
from vtp.export.onnx.emit import WeightStore, emit
from vtp.export.plan.plan import Plan, make_plan
from vtp.export.plan.schedule import Chain, make_chains
from vtp.export.pruners import POSITIONS, Site, parse_options, resolve_method
from vtp.export.pruners.base import Pruner
from vtp.export.targets import TARGETS, Target
from vtp.export.verify.parity import PROMPT, verify
from vtp.runtime.bundle.folder import MANIFEST, Bundle, check_output, open_bundle, whole_bundle
from vtp.runtime.bundle.manifest import TOKENIZER
from vtp.runtime.preprocess import FITS
from vtp.runtime.prompt.prompter import Prompter

VERIFY = ("full", "layers", "none")
MOST_FRAMES = 4096
ROOM_FOR_TEXT = 1472  # tokens of prompt and answer beside the picture, where the model has the positions


@dataclass(frozen=True)
class Request:
    """What to export; the fields are vtp-export's flags."""

    output: Path
    model: str | None = None
    method: str = "adaptprune"
    keep_tokens: str | None = None
    prune_ratio: float | None = None
    method_options: Sequence[str] = ()
    target: str = "ort"
    dtype: str | None = None  # the target's
    max_length: int | None = None
    image_size: tuple[int, int] | None = None  # (height, width)
    image_fit: str = "letterbox"
    frames: int | None = None  # of the videos that the bundle is for; None: pictures
    verify: str = "full"
    overwrite: bool = False


def export(
    request: Request,
    progress: Callable[[str], None] = lambda _: None,
    store: Callable[[Path], WeightStore] = WeightStore,
    note: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Export a bundle and return it opened. `store` takes the weights (see `vtp.bench.shapes.weightless`).

    `note` gets a line about every setting of the model that the bundle does not serve.

    Raises UsageError for a bad request, VtpError when the model cannot be served or a fidelity check fails;
    in every such case the output folder is as it was.
    """
    _check_request(request)
    target = TARGETS[request.target]
    dtype = request.dtype or target.dtype
    check_output(request.output, request.overwrite)
    method, options, positions = _method(request)
    folder = checkpoint.resolve(request.model)
    checkpoint.check(folder, request.frames)
    progress("load the model")
    model = checkpoint.load(folder, dtype, request.image_size, request.image_fit, request.frames)
    for line in model.generation.notes:
        note(line)
    positions = _served_positions(request, model, positions)
    chains = _chains(request, model, method, options)
    max_length = _max_length(request, model)
    target = target.serving(model.family.decoder)
    with checkpoint.about(folder):  # examples run through the model: sizes that do not fit show here
        plan = target.prepare(make_plan(model.family, chains, positions, DTYPES[dtype], max_length))
    with whole_bundle(request.output, request.overwrite) as folder:
        (folder / TOKENIZER).write_text(model.tokenizer_json, encoding="utf-8")
        _check_prompt(model, folder)
        _emit_graphs(model, plan, target, store(folder), progress)
        manifest = describe(
            folder,
            model,
            plan,
            chains,
            positions=positions,
            max_length=max_length,
            target=request.target,
            dtype=dtype,
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        if request.verify != "none":
            progress(f"verify against the torch model ({request.verify})")
            manifest.parity.update(verify(open_bundle(folder), model, plan, chains, request.verify))
        else:
            open_bundle(folder)  # what an outside method wrote may be refused: then no bundle is left
            manifest.parity.update({"mode": "none"})
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return open_bundle(request.output)


def _check_request(request: Request) -> None:
    """Refuse what can be refused before a model is loaded."""
    for name, value, known in (
        ("target", request.target, tuple(TARGETS)),
        ("verify", request.verify, VERIFY),
        ("image-fit", request.image_fit, FITS),
        ("dtype", request.dtype, (None, *DTYPES)),
    ):
        if value not in known:
            raise UsageError(f"unknown {name} '{value}'; choose one of {', '.join(filter(None, known))}")
    if request.frames is not None and not 1 <= request.frames <= MOST_FRAMES:
        raise UsageError(f"frames {request.frames} is outside 1 to {MOST_FRAMES}")
    if request.keep_tokens is not None and request.prune_ratio is not None:
        raise UsageError("give either --keep-tokens or --prune-ratio, not both")
    if request.keep_tokens is not None:
        for keep in parse_keep(request.keep_tokens):
            if keep < 1:
                raise UsageError(f"keep-tokens {keep} keeps nothing; choose at least 1")
    if request.prune_ratio is not None:
        keep_for_ratio(request.prune_ratio, 1)


def _method(request: Request) -> tuple[type[Pruner] | None, dict[str, Any], str]:
    """The pruner class, its options, and how kept tokens are numbered.

    `positions` is an option of every vision- and projector-site method, so the exporter reads it;
    decoder-site methods always keep original positions.
    """
    method = resolve_method(request.method)
    texts = list(request.method_options)
    if method is None:
        if texts:
            raise UsageError(f"method none has no options; leave out --method-option {texts[0]}")
        return None, {}, "compact"
    own: list[str] = []
    places: list[str] = []
    for text in texts:
        (places if text.partition("=")[0].strip() == "positions" else own).append(text)
    return method, parse_options(method, own), _positions(method, places)


def _positions(method: type[Pruner], texts: Sequence[str]) -> str:
    """What `--method-option positions=...` says, else the method's own default."""
    at_decoder = Site.parse(method.site).in_decoder
    if not texts:
        return "original" if at_decoder else method.positions
    if len(texts) > 1:
        raise UsageError("method-option 'positions' is given twice; give it once")
    _, equals, chosen = (part.strip() for part in texts[0].partition("="))
    if not equals:
        raise UsageError(f"method-option '{texts[0]}' is not of the form name=value")
    allowed = ("original",) if at_decoder else POSITIONS
    if chosen not in allowed:
        known = "original only (a decoder-site method)" if at_decoder else " or ".join(allowed)
        raise UsageError(f"method-option positions={chosen}: {method.name} takes {known}")
    return chosen


def _served_positions(request: Request, model: Checkpoint, positions: str) -> str:
    """The positions that the family has, where it has not both kinds; refused if they were asked for."""
    served, asked = model.family.positions, [text.partition("=")[0] for text in request.method_options]
    if positions in served:
        return positions
    if "positions" in (name.strip() for name in asked):
        raise UsageError(
            f"method-option positions={positions}: family {model.family.name} serves {' and '.join(served)}"
        )
    return served[0]


def _chains(
    request: Request, model: Checkpoint, method: type[Pruner] | None, options: dict[str, Any]
) -> list[Chain]:
    """One chain of pruners per keep-count, checked against what the family serves."""
    count = model.family.grid[0] * model.family.grid[1]
    if method is None:
        _refuse_keep_for_none(request, count)
        return []
    return make_chains(method, model.family, _keep_counts(request, method, count), options)


def _refuse_keep_for_none(request: Request, count: int) -> None:
    wanted = parse_keep(request.keep_tokens) if request.keep_tokens else [count]
    if check_keep(wanted, count) != [count] or request.prune_ratio:
        raise UsageError(f"method none keeps all {count} visual tokens; choose another --method to prune")


def _keep_counts(request: Request, method: type[Pruner], count: int) -> list[int]:
    if request.prune_ratio is not None:
        return [keep_for_ratio(request.prune_ratio, count)]
    if request.keep_tokens is not None:
        return check_keep(parse_keep(request.keep_tokens), count)
    return [method.default_keep(count)]


def _max_length(request: Request, model: Checkpoint) -> int:
    """Positions of one conversation: text, all N visual tokens and the answer."""
    count = model.family.grid[0] * model.family.grid[1]
    decoder = model.family.decoder
    window = None if decoder.windows else getattr(decoder.model.config, "sliding_window", None)
    most = min(model.max_positions, window or model.max_positions)
    if most < count + 2:
        raise VtpError(
            f"this model knows {most} positions: too few for its {count} visual tokens and some text"
        )
    if request.max_length is None:
        return min(most, count + ROOM_FOR_TEXT)
    if not count + 2 <= request.max_length <= most:
        raise UsageError(
            f"max-length {request.max_length} is outside {count + 2} to {most}: it must hold {count} visual "
            f"tokens and some text, and this model knows {most} positions"
        )
    return request.max_length


def _check_prompt(model: Checkpoint, folder: Path) -> None:
    """Refuse a tokenizer or chat template that no prompt can go through, before minutes are spent."""
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


def _emit_graphs(
    model: Checkpoint, plan: Plan, target: Target, store: WeightStore, progress: Callable[[str], None]
) -> None:
    with emitting(model.family.decoder.model, model.family.tower, target.attending):
        for spec in plan.graphs:
            progress(f"export {spec.name}")
            emit(spec, store, target.opset)
