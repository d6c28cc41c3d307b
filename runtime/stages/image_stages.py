"""How a bundle's image stages are run: plainly, cached, replayed or elsewhere; chosen once, at load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from vtp.engines import Binding, UsageError, Value, capabilities
from vtp.runtime.bundle.stream_info import PICTURE
from vtp.runtime.opening import Opening
from vtp.runtime.stages.boundary import EMBEDS, FEATURES, find_boundary
from vtp.runtime.stages.opened import OpenedStages
from vtp.runtime.stages.pieces import Pace, Pieces, run_in_pieces
from vtp.runtime.stages.reference_picture import ReferencePicture
from vtp.runtime.stages.stage import Stage
from vtp.runtime.stages.vision_feature_cache import (
    Features,
    Put,
    StageKey,
    VisionFeatureCache,
    recall,
    rows_of,
    store,
)

ByOthers: TypeAlias = "Callable[[int, np.ndarray], Mapping[str, np.ndarray]]"


def choose_image_stages(
    opened: OpenedStages, opening: Opening, engine: str, cache: VisionFeatureCache | None
) -> PlainImages:
    """The kind of image stages that was asked for."""
    if opening.image is not None:
        return DelegatedImages(opened, opening.image)
    if cache is not None:
        return CachedImages(opened, cache)
    replays = opening.cuda_graph and capabilities(engine).replays and not opening.elsewhere
    if replays and not opened.compares:
        return ReplayedImages(opened)
    return PlainImages(opened)


class PlainImages:
    """Image stages that run on every picture, on as many of them at a time as the graphs take.

    reference  what pictures are compared with if they are a camera's, and a method compares them; None: grey
    """

    def __init__(self, opened: OpenedStages) -> None:
        self._opened = opened
        self.reference: ReferencePicture | None = None

    def pieces(
        self, keep: int, pictures: Sequence[np.ndarray], prompts: int, pace: Pace
    ) -> Pieces[dict[str, Value]]:
        """What the image stages give for the pictures, by the pipeline's names, one after the other.

        pictures  pixel_values of one picture each
        prompts   how many prompts they belong to, of which each has equally many
        """
        most = self._together(prompts)
        groups = [list(range(first, len(pictures)))[:most] for first in range(0, len(pictures), most)]
        return (yield from self._run_groups(keep, pictures, groups, pace))

    def forget(self) -> None:
        """Let the next picture be the first of a stream."""
        if self.reference is not None:
            self.reference.forget()

    def close(self) -> None:
        """Let go of what is kept from run to run."""

    def _together(self, prompts: int) -> int:
        """Most pictures in one run. With a reference several have to be told from a camera's single one."""
        apart = prompts == 1 and self._opened.in_pieces and self.reference is None
        return 1 if apart else self._opened.pictures_together

    def _run_groups(
        self, keep: int, pictures: Sequence[np.ndarray], groups: Sequence[list[int]], pace: Pace
    ) -> Pieces[dict[str, Value]]:
        """Run groups of pictures one after the other; what they give, in the pictures' order."""
        runs = []
        for places in groups:
            pixels = self._stacked([pictures[place] for place in places])
            pace.check()
            runs.append((places, (yield from self._run_one_group(keep, pixels, places, pace))))
        return runs[0][1] if len(runs) == 1 else _in_order(runs, self._opened.put)

    def _run_one_group(
        self, keep: int, pixels: np.ndarray, places: Sequence[int], pace: Pace
    ) -> Pieces[dict[str, Value]]:
        values = self._given(pixels)
        for stage in self._opened.stages("image", keep):
            yield from run_in_pieces(stage, values, pace, self._opened.in_pieces)
        return values

    def _given(self, pixels: np.ndarray) -> dict[str, Value]:
        """What the first stages are given for pictures: pixel_values and, where a method compares, others."""
        values = {"pixel_values": self._opened.put(pixels)}
        if self._opened.compares:
            single = self.reference is not None and len(pixels) == 1
            other = self.reference.of(pixels) if single and self.reference else np.zeros_like(pixels)
            values[PICTURE] = self._opened.put(other)
        return values

    def _stacked(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """pixel_values of several pictures, as the graphs want them."""
        pixels = pictures[0] if len(pictures) == 1 else np.concatenate(pictures)
        return pixels.astype(self._opened.dtype_of("pixel_values"), copy=False)


class EncodedImages(PlainImages):
    """Image stages from a boundary on: what the earlier ones give was made elsewhere.

    A picture is then a dict of its tensors by the pipeline's names, as `vtp.runtime.media.given` checks them.
    """

    def _together(self, prompts: int) -> int:
        del prompts  # no encoder runs
        return self._opened.pictures_together

    def _run_one_group(
        self, keep: int, pixels: Any, places: Sequence[int], pace: Pace
    ) -> Pieces[dict[str, Value]]:
        values = {name: self._opened.put(array) for name, array in pixels.items()}
        stages = self._opened.stages("image", keep)
        entered = find_boundary(self._opened.manifest, keep, EMBEDS if EMBEDS in values else FEATURES)
        for stage in stages[entered.after :]:
            yield from run_in_pieces(stage, values, pace, by_tiles=False)
        return values

    def _stacked(self, pictures: Sequence[Any]) -> Any:
        if any(not isinstance(one, dict) or set(one) != set(pictures[0]) for one in pictures):
            raise UsageError("the prompts of one batch were given different tensors; ask them one by one")
        return {name: np.concatenate([one[name] for one in pictures]) for name in pictures[0]}


class DelegatedImages(PlainImages):
    """Image stages that something else runs, such as Triton's ensemble."""

    def __init__(self, opened: OpenedStages, image: ByOthers) -> None:
        super().__init__(opened)
        self._image = image

    def _run_one_group(
        self, keep: int, pixels: np.ndarray, places: Sequence[int], pace: Pace
    ) -> Pieces[dict[str, Value]]:
        put = self._opened.put
        yield from pace.pause()
        with pace.timings.measure("image"):
            given = self._image(keep, pixels)
        pace.worked = True
        return {"pixel_values": put(pixels), **{name: put(array) for name, array in given.items()}}


class CachedImages(PlainImages):
    """Image stages that run only on pictures that the vision feature cache does not know."""

    def __init__(self, opened: OpenedStages, cache: VisionFeatureCache) -> None:
        super().__init__(opened)
        self._cache = cache
        self._known: list[Features] = []  # an entry for each picture of this run

    def pieces(
        self, keep: int, pictures: Sequence[np.ndarray], prompts: int, pace: Pace
    ) -> Pieces[dict[str, Value]]:
        """See `PlainImages.pieces`; only pictures of which the same stages are known go through together."""
        each, most = len(pictures) // prompts, self._together(prompts)
        rows = [pictures[row * each : (row + 1) * each] for row in range(prompts)]
        self._known = [entry for row in rows for entry in self._cache.find(row)]
        alike: dict[frozenset[StageKey], list[int]] = {}
        for place, entry in enumerate(self._known):
            alike.setdefault(frozenset(entry), []).append(place)
        groups = [
            places[first : first + most] for places in alike.values() for first in range(0, len(places), most)
        ]
        return (yield from self._run_groups(keep, pictures, groups, pace))

    def _run_one_group(
        self, keep: int, pixels: np.ndarray, places: Sequence[int], pace: Pace
    ) -> Pieces[dict[str, Value]]:
        put, entries = self._opened.put, [self._known[place] for place in places]
        values = self._given(pixels)
        owner = None  # from a stage of one keep-count on, everything belongs to that keep-count
        for stage in self._opened.stages("image", keep):
            pace.check()
            owner = owner or stage.info.keep
            name, key, timings = stage.info.name, (stage.info.file, owner), pace.timings
            with timings.measure(name):
                known = recall(entries, key, put)
            if known is not None:
                values.update(known)
                timings.reused_stages += [name] if name not in timings.reused_stages else []
                continue
            yield from run_in_pieces(stage, values, pace, self._opened.in_pieces)
            with timings.measure(name):
                store(entries, key, {to: values[to] for to in stage.info.outputs.values()}, put)
        return values


class ReplayedImages(PlainImages):
    """Image stages on buffers that stay, each recorded at its first run (on CUDA) and replayed.

    What they give is overwritten by the next pictures.
    """

    def __init__(self, opened: OpenedStages) -> None:
        super().__init__(opened)
        self.pixels: dict[tuple[int, ...], Value] = {}  # by their shape
        self.bindings: dict[tuple[str, tuple[int, ...]], Binding | None] = {}  # by graph and inputs

    def pieces(
        self, keep: int, pictures: Sequence[np.ndarray], prompts: int, pace: Pace
    ) -> Pieces[dict[str, Value]]:
        """See `PlainImages.pieces`; more pictures than go through together run plainly."""
        if len(pictures) > self._opened.pictures_together:
            return (yield from super().pieces(keep, pictures, prompts, pace))
        pace.check()
        values = {"pixel_values": self._placed(self._stacked(pictures))}
        staying = True
        for stage in self._opened.stages("image", keep):
            pace.check()
            with pace.timings.measure(stage.info.name):
                binding = self._bound(stage, values) if staying else None
                if binding is None:
                    staying = False  # nor do the inputs of those that follow
                    stage.run(values)
                    continue
                binding.run()
                values |= {target: binding.outputs[name] for name, target in stage.info.outputs.items()}
        return values

    def close(self) -> None:
        """Let go of the buffers and what is bound to them."""
        self.bindings.clear()
        self.pixels.clear()

    def _placed(self, pixels: np.ndarray) -> Value:
        """The buffer for pixels of this shape, with these in it."""
        if pixels.shape not in self.pixels:
            self.pixels[pixels.shape] = self._opened.any_engine.zeros(pixels.shape, str(pixels.dtype))
        self.pixels[pixels.shape].update(pixels)
        return self.pixels[pixels.shape]

    def _bound(self, stage: Stage, values: Mapping[str, Value]) -> Binding | None:
        """The binding of a stage to inputs that stay: one for each graph and set of inputs."""
        feeds = stage.feeds(values)
        place = stage.info.file, tuple(map(id, feeds.values()))
        if place not in self.bindings:
            self.bindings[place] = stage.bind_whole(feeds)
        return self.bindings[place]


def _in_order(runs: Sequence[tuple[list[int], dict[str, Value]]], put: Put) -> dict[str, Value]:
    """What several runs gave, as one: picture by picture."""
    joined = {}
    for name in runs[0][1]:
        if name not in ("pixel_values", PICTURE):
            rows: dict[int, np.ndarray] = {}
            for places, values in runs:
                rows.update(zip(places, rows_of(values[name], len(places)), strict=True))
            joined[name] = put(np.concatenate([rows[place] for place in sorted(rows)]))
    return joined
