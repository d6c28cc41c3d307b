"""A method made ready for one model: a pruner for every keep-count and, in that, for every site in turn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vtp.engines import UsageError, VtpError
from vtp.export.families.base import Family
from vtp.export.plan.share import Shared
from vtp.export.plan.then import FLAG, Then
from vtp.export.pruners import Site, find_method, method_names
from vtp.export.pruners.base import Pruner
from vtp.export.tower_cues import SCORES, of_whole_tower
from vtp.runtime.bundle.manifest import FRAME, PICTURE, TILE

# Cues of the decoder's attention, and in which layer they are read, counted from the one behind the site.
_LAYER_OF = {"attention_scores": -1, "text_attention": -1, "next_scores": 0, "keys": 0}
# The pruners of one keep-count, in the order of their sites: one, but for methods that prune repeatedly, and
# where a second method prunes inside the decoder what the first one kept (`Then`).
Schedule = tuple[Pruner, ...]


def make_schedules(
    method: type[Pruner],
    family: Family,
    keeps: Sequence[int],
    settings: Mapping[str, Any],
    share: str = PICTURE,
    then: Then | None = None,
) -> list[Schedule]:
    """One schedule per keep-count, checked against what the family serves.

    share  whose budget K is: one of SHARES
    then   what prunes inside the decoder once more

    Raises UsageError, in one line, for a method that this family or model cannot serve, and VtpError for one
    whose choice is not K indices, each once, in raster order.
    """
    _check_served(method, family, share)
    _check_second(then, family)
    made = _schedules(method, family, keeps, settings, share)
    return [_checked(_with_second(schedule, then, family), family) for schedule in made]


def _schedules(
    method: type[Pruner], family: Family, keeps: Sequence[int], settings: Mapping[str, Any], share: str
) -> list[Schedule]:
    """The method's own pruners of every keep-count."""
    if share != PICTURE:
        return list(_dealing(method, family, keeps, settings, share))
    count, layers = family.grid[0] * family.grid[1], len(family.decoder.layers)
    schedules: list[Schedule] = []
    for keep in keeps:
        sites = _sites(method, layers, count, keep, settings)
        schedules.append(_schedule(method, _grid(method, family), sites, settings))
    if len({tuple(pruner.site for pruner in schedule) for schedule in schedules}) > 1:
        raise UsageError(
            f"method {method.name} names other layers for other keep-counts; export them one by one"
        )
    return schedules


def _with_second(schedule: Schedule, then: Then | None, family: Family) -> Schedule:
    """The schedule, and behind it the second cut of what it keeps."""
    if then is None:
        return schedule
    with _blaming(then.method, "the constructor"):
        return (*schedule, then.pruner(keep_of(schedule), len(family.decoder.layers)))


def _checked(schedule: Schedule, family: Family) -> Schedule:
    _check_cuts(schedule, family)
    for number, pruner in enumerate(schedule):
        _check_layers(pruner, family)
        _check_choice(pruner, family, number)
    return schedule


def _dealing(
    method: type[Pruner], family: Family, keeps: Sequence[int], settings: Mapping[str, Any], share: str
) -> Iterator[Schedule]:
    """Schedules of one pruner each, that deals its K tokens to the tiles or frames."""
    parts = family.tiles if share == TILE else family.frame_tiles
    for keep in keeps:
        with _blaming(method, "the constructor"):
            yield (Shared(method, parts, keep, settings, share),)


def _grid(method: type[Pruner], family: Family) -> tuple[int, int]:
    """(rows, columns) of the tokens that a method chooses from; of one for videos (frames, their patches)."""
    if method.reads_frames and family.layout is not None:
        return family.layout.count, family.layout.patches // family.layout.count
    return family.grid if Site.parse(method.site).in_decoder else family.patch_grid


def site_of(schedule: Schedule) -> Site:
    """Where the method prunes: at the tower, at the projector, or before several decoder layers."""
    kind = Site.parse(schedule[0].site).kind
    return Site(kind, cuts_of(schedule) if kind == "decoder" else ())


def cuts_of(schedule: Schedule) -> tuple[int, ...]:
    """The decoder layers before which tokens are dropped, by the method or by the second cut."""
    return tuple(layer for pruner in schedule for layer in Site.parse(pruner.site).layers)


def keep_of(schedule: Schedule) -> int:
    """The keep-count: what the method leaves, whatever a second cut drops of it."""
    return schedule[-1 if site_of(schedule).in_decoder else 0].keep


def _check_served(method: type[Pruner], family: Family, share: str) -> None:
    site = Site.parse(method.site)
    if share != PICTURE:
        _check_share(method, family, site, share)
    if site.kind not in family.sites:
        raise UsageError(
            f"method {method.name} acts at {method.site}, which family {family.name} does not serve"
            f"{' for videos' if family.media == 'video' else ''}; "
            f"its sites: {', '.join(family.sites)}{_instead(method, family)}"
        )
    if method.reads_frames and family.layout is None:
        raise UsageError(
            f"method {method.name} compares the frames of a video, and this bundle is for pictures; give "
            f"--frames with a family that answers about videos, or choose another method"
            f"{_instead(method, family)}"
        )
    if "picture" in method.needs and (family.patches is not None or family.views > 1):
        raise UsageError(
            f"method {method.name} compares pictures pixel by pixel, and those of family {family.name} come "
            f"in as patches, tiles or frames{_instead(method, family)}"
        )
    for cue in _wants(method):
        if cue in family.lacks and not (cue == "grid" and share != PICTURE):  # a tile and a frame have one
            raise UsageError(
                f"method {method.name} needs {cue}, which family {family.name} does not have: "
                f"{family.lacks[cue]}{_instead(method, family)}"
            )
    early, reduction = of_whole_tower(method.needs), family.row_reduction or family.stream_reuse
    if early and reduction:
        raise UsageError(
            f"method {method.name} needs {early[0]}, which a tower with fewer rows does not give; leave out "
            f"--tower {reduction.name}, or choose a method that reads the last block alone"
        )
    layers, last = len(family.decoder.layers), max(site.layers, default=0)
    if last >= layers:
        raise UsageError(
            f"method {method.name} prunes before decoder layer {last}, but this model has {layers} layers"
        )


def _check_second(then: Then | None, family: Family) -> None:
    if then is not None and "decoder" not in family.sites:
        raise UsageError(
            f"{FLAG} prunes inside the decoder, which family {family.name} does not serve"
            f"{' for videos' if family.media == 'video' else ''}; leave it out"
        )


def _check_share(method: type[Pruner], family: Family, site: Site, share: str) -> None:
    """Refuse --share tile or frame where there are none, or where a method does not choose in each alone."""
    if share == TILE and not family.tiles:
        instead = ", or give --share frame" if family.frame_tiles else ""
        raise UsageError(
            f"--share tile needs pictures in tiles, and here family {family.name} looks at one in one piece; "
            f"leave it out{instead}, or choose a larger --image-size if the model cuts pictures into tiles"
        )
    if share == FRAME and not family.frame_tiles:
        raise UsageError(
            f"--share frame deals K to the frames of a video, and here family {family.name} has "
            f"{'a single one' if family.layout else 'pictures'}; leave it out, or give --frames 2 or more "
            "with a family that answers about videos"
        )
    if share == FRAME and method.reads_frames:
        raise UsageError(
            f"--share frame makes a method choose in every frame alone, and {method.name} compares each with "
            f"the one before; leave out --share{_instead(method, family)}"
        )
    if site.in_decoder:
        raise UsageError(
            f"--share {share} is for methods at the vision or projector site, and method {method.name} acts "
            f"at {method.site}, where it weighs all tokens together{_instead(method, family)}"
        )


def _check_cuts(schedule: Schedule, family: Family) -> None:
    """Refuse cuts between a layer and those that read its keys and values."""
    last, most = max(cuts_of(schedule), default=0), family.decoder.last_cut
    if last > most:
        raise UsageError(
            f"method {schedule[-1].name} prunes before decoder layer {last}, but later layers of this model "
            f"read the keys and values of layer {most}, which would still hold every token; choose a method "
            f"that prunes before layer {most} or earlier"
        )


def _check_layers(pruner: Pruner, family: Family) -> None:
    """Refuse a cue of attention where the layer that it is read in has none."""
    decoder = family.decoder
    for layer in Site.parse(pruner.site).layers:
        for cue in sorted(_LAYER_OF.keys() & set(pruner.needs)):
            read = layer + _LAYER_OF[cue]
            if not decoder.cached(read, read + 1):
                having = ", ".join(map(str, decoder.cached(0, len(decoder.layers))))
                raise UsageError(
                    f"method {pruner.name} prunes before decoder layer {layer} by {cue} of layer {read}, "
                    f"which has no attention in this model (layers {having} have)"
                    f"{_instead(type(pruner), family)}"
                )


def _wants(method: type[Pruner]) -> tuple[str, ...]:
    """Cues by name, and "grid" for a method that measures distances between patches."""
    return (*method.needs, "grid") if method.reads_grid else method.needs


def _instead(method: type[Pruner], family: Family) -> str:
    """The methods that this family serves, those of the same site first."""
    others = [find_method(name) for name in method_names()[1:]]
    lacking = {*family.lacks, *(_LAYER_OF if family.decoder.states else ())}
    served = [
        other
        for other in others
        if Site.parse(other.site).kind in family.sites
        and not set(_wants(other)) & (lacking if Site.parse(other.site).in_decoder else set(family.lacks))
        and not (other.reads_frames and family.layout is None)
    ]
    wanted = Site.parse(method.site).kind
    served.sort(key=lambda other: Site.parse(other.site).kind != wanted)
    return (
        f"; nearest methods that it serves: {', '.join(other.name for other in served[:4])}" if served else ""
    )


def _sites(
    method: type[Pruner], layers: int, count: int, keep: int, settings: Mapping[str, Any]
) -> list[tuple[Site, int]]:
    """(site, tokens kept there) in order."""
    site = Site.parse(method.site)
    if site.layers or not site.in_decoder:
        return [(site, keep)]
    with _blaming(method, "sites()"):
        pairs = [
            (layer, left) for layer, left in method.sites(layers, count, keep, {**method.options, **settings})
        ]
    cuts, kept = [pair[0] for pair in pairs], [count, *(pair[1] for pair in pairs)]
    rising = all(low < high for low, high in zip([0, *cuts], [*cuts, layers], strict=True))
    falling = all(after <= before for before, after in pairwise(kept))
    if not (cuts and rising and falling and kept[-1] == keep):
        raise VtpError(
            f"method {method.name} prunes at {pairs} of {layers} layers: layers must ascend from 1 to "
            f"{layers - 1}, counts may not rise, and the last is the keep-count {keep}"
        )
    return [(Site("decoder", (layer,)), number) for layer, number in pairs]


def _schedule(
    method: type[Pruner],
    grid: tuple[int, int],
    sites: Sequence[tuple[Site, int]],
    settings: Mapping[str, Any],
) -> Schedule:
    schedule: list[Pruner] = []
    for site, keep in sites:
        with _blaming(method, "the constructor"):
            pruner = method(grid, keep, **settings)
        pruner.site = str(site)
        schedule.append(pruner)
        grid = (1, keep)
    return tuple(schedule)


@contextmanager
def _blaming(method: Pruner | type[Pruner], part: str) -> Iterator[None]:
    """Say in one line which part of a method raised: it may be a user's own."""
    try:
        yield
    except VtpError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise VtpError(
            f"method {method.name}: {part} fails: {type(error).__name__}: {reason} (--debug shows where)"
        ) from error


def _check_choice(pruner: Pruner, family: Family, number: int) -> None:
    """Run a pruner once on random cues: what it returns must be K indices, each once, in raster order."""
    generator = torch.Generator().manual_seed(number)
    shapes = cue_shapes(pruner, family, batch=2, text=5)
    with torch.no_grad(), _blaming(pruner, "forward()"):
        answer = pruner(**{name: torch.rand(shapes[name], generator=generator) for name in pruner.needs})
    keep = _check_rows(pruner, answer, shapes) if pruner.merges else answer
    if not isinstance(keep, Tensor) or keep.dtype != torch.int64 or keep.shape != (2, pruner.keep):
        found = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
        raise VtpError(
            f"method {pruner.name} returns {found}; keep_indices must be torch.int64 [batch, {pruner.keep}]"
        )
    inside = int(keep.min()) >= 0 and int(keep.max()) < pruner.count
    if not inside or not bool((keep[:, 1:] > keep[:, :-1]).all()):
        raise VtpError(
            f"method {pruner.name} returns keep_indices that are not ascending, without repeats, within "
            f"0 to {pruner.count - 1}; sort them"
        )


def _check_rows(pruner: Pruner, answer: object, shapes: Mapping[str, tuple[int, ...]]) -> object:
    """Return the indices of a merging method's answer once its rows are found to fit."""
    rows = merged_rows(pruner)
    wanted = (2, pruner.keep, shapes[rows][-1])
    pair = isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Tensor)
    if not pair or tuple(answer[1].shape) != wanted or not answer[1].is_floating_point():  # type: ignore[index]
        raise VtpError(
            f"method {pruner.name} merges, so it must return (keep_indices, rows) with rows of {rows}' "
            f"dtype and shape [batch, {pruner.keep}, {wanted[2]}]"
        )
    return answer[0]  # type: ignore[index]


def merged_rows(pruner: Pruner) -> str:
    """The cue whose rows a merging method merges: one of every kind of site."""
    kinds = {"vision": "image_features", "projector": "image_embeds", "decoder": "hidden_states"}
    return kinds[Site.parse(pruner.site).kind]


def cue_shapes(pruner: Pruner, family: Family, batch: int, text: int) -> dict[str, tuple[int, ...]]:
    """Shapes of every cue for a pruner that N tokens reach, beside `text` tokens of text."""
    count, decoder = pruner.count, family.decoder
    cut = max(Site.parse(pruner.site).layers, default=0)
    return {
        "image_features": (batch, count, family.feature_width),
        "vision_keys": (batch, count, family.feature_width),
        **dict.fromkeys(("picture", "reference_picture"), (batch, 3, *family.image_size)),
        **dict.fromkeys(SCORES, (batch, count)),
        "next_scores": (batch, count),
        "image_embeds": (batch, count, decoder.width),
        "hidden_states": (batch, count, decoder.width),
        "keys": (batch, count, math.prod(decoder.kv_shape(cut))),
        "text_attention": (batch, decoder.heads, text, count),
        "text_gravity": (batch, text, count),
        "text_embeds": (batch, text, decoder.width),
        "text_mask": (batch, text),
    }
