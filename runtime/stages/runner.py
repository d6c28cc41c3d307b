"""Walks a bundle's stages with one dictionary of named tensors. Names no family and no method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from vtp.engines import Binding, Engine, Value, VtpError
from vtp.runtime.bundle.folder import Bundle
from vtp.runtime.opening import Opening, open_stage
from vtp.runtime.result import Timings
from vtp.runtime.stages.image_stages import EncodedImages, choose_image_stages
from vtp.runtime.stages.kv_cache import KvCache
from vtp.runtime.stages.opened import OpenedStages
from vtp.runtime.stages.pieces import Pace, Pieces, whole
from vtp.runtime.stages.prefix_cache import Prefix
from vtp.runtime.stages.reference_picture import ReferencePicture
from vtp.runtime.stages.stage import Check, Stage, never_interrupt, run_stages, single_step_shape
from vtp.runtime.stages.stream_reuse import StreamedImages, check_stream_reuse
from vtp.runtime.stages.vision_feature_cache import VisionFeatureCache

__all__ = ["KvCache", "Row", "Stage", "StageRunner"]

_PADDING = 0  # an id that stands where a row has no token: what is there is never looked at
_NOTHING = "nothing"  # zeros [B,S]: no token sees further than itself, and nobody reads a cue


@dataclass(frozen=True)
class Row:
    """One prompt of a batch: its ids [T], and where in them its pictures' places begin, ascending."""

    ids: Sequence[int]
    image_starts: Sequence[int]


class StageRunner:
    """Walks all stages of a bundle: `prefill_rows` once for each batch of prompts, then `step_rows`.

    open_engine  opens a graph by its file name; None: the bundle's own, on `engine` as `opening` says
    prefix, features  what is kept of earlier prompts; None: nothing
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: str,
        threads: int | None,
        opening: Opening | None = None,
        prefix: Prefix | None = None,
        features: VisionFeatureCache | None = None,
        open_engine: Callable[[str], Engine] | None = None,
    ) -> None:
        opening = opening or Opening()
        if open_engine is None:
            open_engine = partial(open_stage, bundle, engine=engine, threads=threads, how=opening)
        check_stream_reuse(bundle.manifest, opening, features)
        self._opened = OpenedStages(bundle, engine, open_engine, prefix, opening.skipped)
        self.images = choose_image_stages(self._opened, opening, engine, features)
        if opening.stream_reuse and bundle.manifest.stream is not None:
            self.images = StreamedImages(self._opened, bundle.manifest.stream)
        if opening.stream_reuse and self._opened.compares:
            self.images.reference = ReferencePicture()
        self._encoded = EncodedImages(self._opened)
        self._manifest = bundle.manifest
        self._prefix = prefix
        self._batch = 1
        self._closed = False
        self._steps: dict[int, tuple[dict[str, Value], list[tuple[Stage, Binding]]]] = {}

    @property
    def any_engine(self) -> Engine:
        """An engine that can make values for any stage: all of a bundle run on one device."""
        return self._opened.any_engine

    @property
    def caches(self) -> Mapping[str, KvCache]:
        """Decoder graph's file -> its cache, which other graphs of the same layers may work on as well."""
        return self._opened.caches

    @property
    def notes(self) -> list[str]:
        """What engines could not do as asked, a line each."""
        return self._opened.notes

    @property
    def pictures_together(self) -> int:
        """Most pictures that go through the image stages in one run; 1 where one makes up a whole batch."""
        return self._opened.pictures_together

    @property
    def rows_together(self) -> int:
        """Most prompts that go through the prompt stages in one run."""
        return self._opened.rows_together

    def dtype_of(self, name: str) -> str:
        """The dtype in which the first stage that reads a pipeline tensor wants it."""
        return self._opened.dtype_of(name)

    def stages(self, when: str, keep: int) -> list[Stage]:
        """The stages of one moment for one keep-count, in order."""
        return self._opened.stages(when, keep)

    @property
    def shares_rows(self) -> bool:
        """Whether `on_rows` can give parts of a batch."""
        return self._opened.shares_rows

    @property
    def prefix(self) -> Prefix | None:
        """What is known of the prompt before, where prompts are read on from it."""
        return self._prefix

    def resize(self, batch: int) -> None:
        """Empty the caches, for a batch of this number of rows."""
        if batch != self._batch:
            self._steps.clear()  # bound to the buffers that go
            self._batch = 0  # of no size, should memory run out on the way
            for cache in self._opened.caches.values():
                cache.resize(batch)
            self._batch = batch
        self.reset()

    def on_rows(self, first: int, count: int, prefix: Prefix | None = None) -> StageRunner:
        """A runner of some rows of this one's batch, in the same memory; it serves until `resize` or `close`.

        prefix  what it knows of prompts before
        """
        part = copy(self)
        part._opened = self._opened.on_rows(first, count, prefix)
        part._prefix, part._batch, part._steps = prefix, count, {}
        return part

    def reset(self) -> None:
        """Start a new conversation."""
        for cache in self._opened.caches.values():
            cache.reset()

    def run(
        self,
        when: str,
        keep: int,
        values: dict[str, Value],
        timings: Timings,
        padding: int | np.ndarray = 0,
        check: Check = never_interrupt,
    ) -> None:
        """Run the stages of one moment in order; see `run_stages`."""
        run_stages(self._opened.stages(when, keep), values, timings, padding, check)

    def prefill(
        self,
        keep: int,
        pixels: np.ndarray,
        ids: Sequence[int],
        image_start: int,
        timings: Timings,
    ) -> dict[str, Value]:
        """Start a new conversation about one picture: see `prefill_rows`."""
        return self.prefill_rows(keep, [pixels], [Row(ids, [image_start])], timings)

    def prefill_rows(
        self,
        keep: int,
        pictures: Sequence[Any],
        rows: Sequence[Row],
        timings: Timings,
        check: Check = never_interrupt,
        encoded: dict[str, Value] | None = None,
    ) -> dict[str, Value]:
        """Start new conversations: image stages on every picture, then prompt stages on all rows together.

        pictures  pixel_values of one picture each, in the order of the rows and of the places within them;
                  every row has the same number of them, which may be 0. Or a dict each of what earlier
                  stages would give (see `EncodedImages`)
        check     is called before each stage, and may raise to end the run there
        encoded   what `encode` gave for these pictures; None: they go through the image stages here

        Rows of unequal length are padded on the right. Returns every tensor that flowed, by the pipeline's
        names: logits [B,1,V] and next_position [B] among them.
        """
        self.resize(len(rows))
        put = self._opened.put
        lengths = np.array([len(row.ids) for row in rows], np.int32)
        padding = lengths.max() - lengths
        ids = [[*row.ids, *[_PADDING] * int(short)] for row, short in zip(rows, padding, strict=True)]
        values = whole(self.encode(keep, pictures, len(rows), timings, check)) if encoded is None else encoded
        values["input_ids"] = put(np.array(ids, np.int64))
        values["text_length"] = put(lengths.astype(np.int64))
        if pictures:
            values["image_start"] = put(np.array([row.image_starts for row in rows], np.int64))
            self.run("prefill", keep, values, timings, padding, check)
        else:
            self._run_text(keep, values, timings, padding, check)
        timings.reused_tokens = self._prefix.reused if self._prefix else 0
        if padding.any():  # graphs count it
            values["next_position"] = put(values["next_position"].numpy() - padding)
        return values

    def encode(
        self,
        keep: int,
        pictures: Sequence[Any],
        prompts: int,
        timings: Timings,
        check: Check = never_interrupt,
    ) -> Pieces[dict[str, Value]]:
        """The image stages of `prefill_rows` alone, in pieces: others may take steps between them, and after
        the last one; no other pictures may be encoded before the prompt was read."""
        if not pictures:
            return {}
        pace = Pace(timings, check)
        images = self._encoded if any(isinstance(one, dict) for one in pictures) else self.images
        values = yield from images.pieces(keep, pictures, prompts, pace)
        yield from pace.pause()
        return values

    def _run_text(
        self, keep: int, values: dict[str, Value], timings: Timings, padding: np.ndarray, check: Check
    ) -> None:
        """Read prompts without pictures: the stages of a step, with all of a prompt's tokens at once.

        Where positions begin does not matter: decoders tell tokens apart by how far they are from each other.
        """
        batch, length = values["input_ids"].shape
        numbers = np.empty((batch, length, *self._numbers_shape(keep)[2:]), np.int64)
        numbers.T[...] = np.arange(length)[:, None]
        values["position_ids"] = self._opened.put(numbers)
        values[_NOTHING] = self._opened.put(np.zeros((batch, length), np.int64))
        steps = self._opened.stages("step", keep)
        stages = [_reading_text(self._opened.reading(stage)) for stage in steps]
        run_stages(stages, values, timings, padding, check)
        values["next_position"] = self._opened.put(np.full(batch, length, np.int64))

    def step(self, keep: int, token: int, position: int) -> np.ndarray:
        """Feed one token at its position; returns the next logits float32 [V]: see `step_rows`."""
        return self.step_rows(keep, [token], [position])[0]

    def step_rows(
        self,
        keep: int,
        tokens: Sequence[int],
        positions: Sequence[int] | np.ndarray,
        going: np.ndarray | None = None,
    ) -> np.ndarray:
        """Feed one token a row at its position; returns the next logits float32 [B,V], which the step after
        that may overwrite.

        going  bool [B]: rows that go on; the others take up no more room, and their logits mean nothing
        """
        values, bindings = self._step_bindings(keep)
        values["input_ids"].update(np.array(tokens, np.int64)[:, None])
        numbers = np.empty(values["position_ids"].shape, np.int64)
        numbers.T[...] = positions  # a new token's position is the same number on every axis
        values["position_ids"].update(numbers)
        more = 1 if going is None else going.astype(np.int32)
        for stage, binding in bindings:
            if stage.cache is not None:
                stage.cache.advance(more)
            binding.run()
            if stage.cache is not None:
                stage.note(stage.feeds(values))
        return values["logits"].view()[:, 0]

    def room(self) -> int:
        """Tokens that still fit every cache, of the longest row; 0 without any."""
        return min((cache.capacity - cache.length for cache in self._opened.caches.values()), default=0)

    def rooms(self) -> np.ndarray:
        """Tokens that still fit every cache, [B]; 0 without any."""
        left = [cache.capacity - cache.lengths for cache in self._opened.caches.values()]
        return np.min(left, axis=0) if left else np.zeros(self._batch, np.int64)

    def check_open(self) -> None:
        """VtpError after `close`."""
        if self._closed:
            raise VtpError("this pipeline is closed; load the bundle again")

    def close(self) -> None:
        """Free every graph and cache."""
        self._closed = True
        self._steps.clear()
        self.images.close()
        self._opened.close()

    def _step_bindings(self, keep: int) -> tuple[dict[str, Value], list[tuple[Stage, Binding]]]:
        if keep not in self._steps:
            engine = self._opened.any_engine
            values: dict[str, Value] = {
                "input_ids": engine.zeros((self._batch, 1), "int64"),
                "position_ids": engine.zeros(self._numbers_shape(keep), "int64"),
            }
            self._steps[keep] = (
                values,
                [(stage, stage.bind(values, self._batch)) for stage in self._opened.stages("step", keep)],
            )
        return self._steps[keep]

    def _numbers_shape(self, keep: int) -> list[int]:
        """Shape of a step's position_ids: [B,1], or [B,1,A] for decoders that count along A axes."""
        for info in self._manifest.stages_for("step", keep):
            for name, source in info.inputs.items():
                if source == "position_ids":
                    return single_step_shape(self._manifest.graphs[info.file].inputs[name], self._batch)
        raise VtpError("no step of this bundle reads 'position_ids'; export the bundle again")


def _reading_text(stage: Stage) -> Stage:
    """A step's stage for a whole prompt: of one token, ids serve as numbers that mean nothing."""
    if stage.info.role == "embed":
        return stage
    inputs = {
        name: _NOTHING if source == "input_ids" else source for name, source in stage.info.inputs.items()
    }
    return replace(stage, info=replace(stage.info, inputs=inputs))
