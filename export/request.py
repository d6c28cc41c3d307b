"""What to export: the request as it was typed, and the job in which everything is decided."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vtp.engines import UsageError, VtpError
from vtp.engines.errors import quoted
from vtp.export.checkpoint.loading import DTYPES, Checkpoint
from vtp.export.keep_counts import check_keep, keep_for_ratio, parse_keep
from vtp.export.method_files import DEFAULT
from vtp.export.plan.bundle_layout import BundleLayout
from vtp.export.plan.schedule import Schedule, keep_of, make_schedules
from vtp.export.plan.then import FLAG, Then, parse_then
from vtp.export.pruners import POSITIONS, Site, parse_options, resolve_method
from vtp.export.pruners.base import Pruner
from vtp.export.targets import OLDEST, TARGETS, Target, Version
from vtp.export.towers import TowerReduction, parse_reduction
from vtp.runtime.bundle.folder import check_output
from vtp.runtime.bundle.manifest import PICTURE, SHARES
from vtp.runtime.preprocess import CLIP_FITS, FITS

VERIFY = ("full", "layers", "none")
MOST_FRAMES = 4096
ROOM_FOR_TEXT = 1472  # tokens of prompt and answer beside the picture, where the model has the positions


@dataclass(frozen=True)
class Job:
    """One export with nothing left to decide.

    model       the model, without its weights
    schedules   the pruners of every keep-count, ascending; none for method `none`
    positions   how kept tokens are numbered: "compact" or "original"
    max_length  positions of one conversation
    target      as it writes this model's decoder
    dtype       of weights and activations
    restore     whether kept visual tokens draw the attention of the dropped ones
    share       whose budget a keep-count is: "picture", "tile" or "frame"
    then        what prunes inside the decoder once more; None: nothing
    """

    model: Checkpoint
    schedules: list[Schedule]
    positions: str
    max_length: int
    target: Target
    dtype: str
    restore: bool = False
    share: str = PICTURE
    then: Then | None = None

    @property
    def layout(self) -> BundleLayout:
        """What the plan is made from."""
        return BundleLayout(
            self.model.family,
            self.schedules,
            self.positions,
            DTYPES[self.dtype],
            self.max_length,
            self.restore,
        )

    @property
    def count(self) -> int:
        """N, the visual tokens of one picture."""
        return visual_tokens(self.model)

    @property
    def keep(self) -> list[int]:
        """The keep-counts, ascending; N alone for method `none`."""
        return [keep_of(schedule) for schedule in self.schedules] or [self.count]


@dataclass(frozen=True)
class Choice:
    """The method and its options; method None is `none`.

    positions  how kept tokens are to be numbered: an option of every vision- and projector-site method, so
               the exporter reads it; decoder-site methods always keep original positions
    asked      whether that was said, or is the method's default
    """

    method: type[Pruner] | None
    options: dict[str, Any]
    positions: str
    asked: bool = False


@dataclass(frozen=True)
class Request:
    """What to export; the fields are vtp-export's flags."""

    output: Path
    model: str | None = None
    method: str = DEFAULT
    keep_tokens: str | None = None
    prune_ratio: float | None = None
    method_options: Sequence[str] = ()
    target: str = "ort"
    dtype: str | None = None  # the target's
    max_length: int | None = None
    image_size: tuple[int, int] | None = None  # (height, width)
    image_fit: str | None = None  # the model's own way, or letterbox
    frames: int | None = None  # of the videos that the bundle is for; None: pictures
    tower: str = "none"
    tower_options: Sequence[str] = ()
    restore: bool = False
    share: str = PICTURE  # whose budget the keep-count is
    then: str | None = None  # METHOD[:LAYER] that prunes inside the decoder what the method kept
    then_options: Sequence[str] = ()
    verify: str = "full"
    overwrite: bool = False
    oldest_onnxruntime: str | None = None  # that has to open the bundle; None: the oldest supported

    def check(self) -> None:
        """Raise UsageError for what can be refused before a model is loaded, VtpError for its output."""
        _check_words(self)
        _check_numbers(self)
        check_output(self.output, self.overwrite)
        if self.oldest_onnxruntime is not None and self.target != "ort":
            raise UsageError(
                f"target {self.target} is not for ONNX Runtime: leave out --oldest-onnxruntime, or give ort"
            )
        _ = self.oldest
        _check_then(self)
        _check_restore(self)
        _ = self.reduction  # looked up now, so that a wrong method or reduction is refused

    @cached_property
    def choice(self) -> Choice:
        """The method and its options, read once: an outside method's file is executed."""
        return _choose(self)

    @cached_property
    def reduction(self) -> TowerReduction | None:
        """What the vision tower does with fewer rows; None: it works on all of them."""
        return parse_reduction(self.tower, self.tower_options)

    @cached_property
    def second(self) -> Then | None:
        """What prunes once more inside the decoder; None: nothing."""
        return parse_then(self.then, self.then_options)

    @property
    def precision(self) -> str:
        """The dtype, the target's own if none was given."""
        return self.dtype or TARGETS[self.target].dtype

    @property
    def oldest(self) -> Version:
        """The oldest onnxruntime that has to open the bundle. UsageError for what is not a version of it."""
        return OLDEST if self.oldest_onnxruntime is None else _version(self.oldest_onnxruntime)

    def resolve(self, model: Checkpoint) -> Job:
        """Decide everything for one model. Raises UsageError or VtpError for what it cannot serve."""
        return Job(
            model=model,
            positions=_served_positions(self.choice, model),
            schedules=_schedules(self, model),
            max_length=_max_length(self, model),
            target=TARGETS[self.target].serving(model.family.decoder, self.oldest),
            dtype=self.precision,
            restore=_served_restore(self, model),
            share=self.share,
            then=self.second,
        )


def visual_tokens(model: Checkpoint) -> int:
    """N, the visual tokens of one of a model's pictures."""
    return model.family.grid[0] * model.family.grid[1]


# -- before a model is loaded --------------------------------------------------------------------------------


def _check_words(request: Request) -> None:
    for name, value, known in (
        ("target", request.target, tuple(TARGETS)),
        ("verify", request.verify, VERIFY),
        ("image-fit", request.image_fit, (None, *dict.fromkeys((*FITS, *CLIP_FITS)))),
        ("dtype", request.dtype, (None, *DTYPES)),
        ("share", request.share, SHARES),
    ):
        if value not in known:
            raise UsageError(f"unknown {name} '{value}'; choose one of {', '.join(filter(None, known))}")


def _check_numbers(request: Request) -> None:
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


def _version(text: str) -> Version:
    """1.30.1 -> (1, 30, 1)."""
    least = ".".join(map(str, OLDEST))
    if not re.fullmatch(r"\d{1,4}(\.\d{1,4}){1,2}", text, re.ASCII):
        raise UsageError(
            f"oldest-onnxruntime {quoted(text)} is not a version of onnxruntime, such as {least}"
        )
    version = tuple(map(int, text.split(".")))
    if version < OLDEST:
        raise UsageError(f"oldest-onnxruntime {text} is not supported; give {least} or newer")
    return version


def _choose(request: Request) -> Choice:
    method = resolve_method(request.method)
    texts = list(request.method_options)
    if method is None:
        if texts:
            raise UsageError(f"method none has no options; leave out --method-option {texts[0]}")
        return Choice(None, {}, "compact")
    places = [text for text in texts if text.partition("=")[0].strip() == "positions"]
    options = parse_options(method, [text for text in texts if text not in places])
    return Choice(method, options, _positions(method, places), asked=bool(places))


def _positions(method: type[Pruner], texts: Sequence[str]) -> str:
    """What `--method-option positions=...` says, else the method's own default."""
    in_decoder = Site.parse(method.site).in_decoder
    if not texts:
        return "original" if in_decoder else method.positions
    if len(texts) > 1:
        raise UsageError("method-option 'positions' is given twice; give it once")
    _, equals, chosen = (part.strip() for part in texts[0].partition("="))
    if not equals:
        raise UsageError(f"method-option '{texts[0]}' is not of the form name=value")
    allowed = ("original",) if in_decoder else POSITIONS
    if chosen not in allowed:
        known = "original only (a decoder-site method)" if in_decoder else " or ".join(allowed)
        raise UsageError(f"method-option positions={chosen}: {method.name} takes {known}")
    return chosen


def _check_then(request: Request) -> None:
    """Refuse --then for a method that it does not go with."""
    method, second = request.choice.method, request.second
    if second is None:
        return
    if method is None:
        raise UsageError(f"{FLAG} prunes once more what a method kept; method none keeps all visual tokens")
    if Site.parse(method.site).in_decoder:
        raise UsageError(
            f"{FLAG} goes with a method at the vision or projector site, and method {method.name} prunes "
            f"inside the decoder itself ({method.site}); leave it out, or choose another method"
        )


def _check_restore(request: Request) -> None:
    """Refuse --restore for a method that it does not go with; the method is looked up in any case."""
    method = request.choice.method
    if not request.restore:
        return
    if method is None:
        raise UsageError("--restore goes with a method that drops tokens; method none keeps all of them")
    for one in (method, *([request.second.method] if request.second else [])):
        if one.merges:
            raise UsageError(
                f"--restore adds log(N/K) for tokens that are dropped, and method {one.name} merges them "
                "into the kept ones, unequally; leave out --restore, or choose a method that selects"
            )


# -- for one model -------------------------------------------------------------------------------------------


def _served_positions(choice: Choice, model: Checkpoint) -> str:
    """The positions that the family has, where it has not both kinds; refused if they were asked for."""
    served = model.family.positions
    if choice.positions in served:
        return choice.positions
    if choice.asked:
        raise UsageError(
            f"method-option positions={choice.positions}: family {model.family.name} serves "
            f"{' and '.join(served)}"
        )
    return served[0]


def _served_restore(request: Request, model: Checkpoint) -> bool:
    """Whether to restore; refused where the logits are bent after the bias."""
    config = model.family.decoder.model.config
    if request.restore and getattr(config, "attn_logit_softcapping", None) is not None:
        raise UsageError(
            f"--restore adds to attention logits, and this model's decoder ({config.model_type}) bends them "
            f"to within {config.attn_logit_softcapping:g} afterwards (attn_logit_softcapping); leave it out"
        )
    decoder = model.family.decoder
    if request.restore and (decoder.states or decoder.owners or decoder.numbered):
        raise UsageError(
            f"--restore is not served for family {model.family.name}, whose decoder has layers that carry "
            "states or read other layers' keys; leave it out"
        )
    return request.restore


def _schedules(request: Request, model: Checkpoint) -> list[Schedule]:
    """One schedule of pruners per keep-count, checked against what the family serves."""
    choice, count = request.choice, visual_tokens(model)
    if choice.method is None:
        _refuse_keep_for_none(request, count)
        if request.share != PICTURE:
            raise UsageError("--share deals out the tokens that are kept; method none keeps all of them")
        return []
    counts = _keep_counts(request, choice.method, count)
    _check_rows(model, counts[-1])
    return make_schedules(choice.method, model.family, counts, choice.options, request.share, request.second)


def _check_rows(model: Checkpoint, keep: int) -> None:
    """Refuse to keep more tokens than a reduced tower has rows of their own for."""
    reduced = model.family.reduced
    most = reduced.reduction.most_kept(model.family.tower_shape, visual_tokens(model)) if reduced else keep
    if reduced and keep > most:
        raise UsageError(
            f"keep-tokens {keep} is more than tower {reduced.reduction.name} leaves apart: {reduced.rows} "
            f"of {reduced.of} rows make {most} different tokens; keep fewer, or reduce the tower less"
        )


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
    count, decoder = visual_tokens(model), model.family.decoder
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
