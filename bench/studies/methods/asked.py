"""What one row of the table is asked with: its bundles, its answers, its operations, its times.

A method is one bundle that holds every keep-count. The smaller picture, the baseline that a method has to
beat (VTC-Bench, arXiv 2510.07143), is one bundle for each: `--tower downsample:SIZE` with nothing pruned, at
the size whose square of patches is nearest to the keep-count.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vtp.bench.common import flops
from vtp.bench.measure import Shapes, axes_of, noting, part_of
from vtp.calib.baselines.smaller import DOWNSAMPLE, nearest_side
from vtp.engines import UsageError, VtpError
from vtp.engines.disk.whole import whole_file
from vtp.export.exporter import Request, export
from vtp.runtime import Pipeline
from vtp.scenes import model_dir
from vtp.scenes.exam import Item, blank, by_picture, is_right

NONE = "none"
BLANK = "blank"  # answers to a grey picture
ANSWER_TOKENS = 12  # the longest answer of the exam has fewer


@dataclass(frozen=True)
class Cell:
    """Where a row answers for one column of the table.

    folder  of the bundle
    column  the column's keep-count
    tokens  visual tokens that the decoder reads: the keep-count, but for a smaller picture
    """

    folder: Path
    column: int
    tokens: int


def cells_of(name: str, keeps: Sequence[int], work: Path) -> list[Cell]:
    """The cells of a method, of none, or of the smaller picture; their bundles may not be there yet."""
    vision = json.loads((model_dir() / "config.json").read_text(encoding="utf-8"))["vision_config"]
    side = vision["image_size"] // vision["patch_size"]
    if name == NONE:
        return [Cell(work / name, side**2, side**2)]
    if name != DOWNSAMPLE:
        return [Cell(work / name, keep, keep) for keep in keeps]
    cells = []
    for keep in keeps:
        near = nearest_side(keep, side)
        cells.append(Cell(work / name / str(near * vision["patch_size"]), keep, near**2))
    return cells


def bundles(cells: Sequence[Cell]) -> list[Path]:
    """The bundles behind cells, each once."""
    return list(dict.fromkeys(cell.folder for cell in cells))


def export_cells(name: str, cells: Sequence[Cell]) -> None:
    """Write the bundles of a row, whatever lies there."""
    for folder in bundles(cells):
        if name == DOWNSAMPLE:
            request = Request(folder, None, NONE, tower=f"{DOWNSAMPLE}:{folder.name}", overwrite=True)
        else:
            keep = None if name == NONE else ",".join(str(cell.column) for cell in cells)
            request = Request(folder, None, name, keep, overwrite=True)
        export(request)


def ask(
    name: str, cells: Sequence[Cell], items: Sequence[Item], threads: int | None = None
) -> dict[str, Any]:
    """What a row answers and what it computes.

    right  column -> 1 or 0 for every question; of none also "blank": the same questions about a grey picture
    gflop  column -> {"tower", "decoder"}, in 10^9 operations up to the first token of the first question
    """
    right: dict[str, list[int]] = {}
    gflop: dict[str, dict[str, float]] = {}
    for folder in bundles(cells):
        own = [cell for cell in cells if cell.folder == folder]
        with Pipeline.load(folder, threads=threads) as pipe:
            gflop |= {str(cell.column): operations(pipe, items[0], cell.tokens) for cell in own}
        with Pipeline.load(folder, threads=threads, vision_feature_cache=1) as pipe:
            answered = take_exam(pipe, items)
            right |= {str(cell.column): answered[cell.tokens] for cell in own}
            if name == NONE:
                grey = blank(items[0].image)
                right[BLANK] = [_right(pipe, item, own[0].tokens, grey) for item in items]
    return {"right": right, "gflop": gflop}


def take_exam(pipe: Pipeline, items: Sequence[Item]) -> dict[int, list[int]]:
    """Answer every question at every keep-count of a bundle; 1 for a right answer, by keep-count.

    With a vision feature cache a picture is encoded once for its questions and keep-counts.
    """
    right: dict[int, list[int]] = {keep: [] for keep in pipe.manifest.visual.keep}
    for group in by_picture(items):
        for item in group:
            for keep, ones in right.items():
                ones.append(_right(pipe, item, keep))
    return right


def _right(pipe: Pipeline, item: Item, keep: int, picture: Image.Image | None = None) -> int:
    picture = item.image if picture is None else picture
    result = pipe.generate(picture, item.prompt, keep_tokens=keep, max_new_tokens=ANSWER_TOKENS)
    return int(is_right(result.text, item.answer))


def operations(pipe: Pipeline, item: Item, keep: int) -> dict[str, float]:
    """10^9 operations up to the first token, counted from the graphs: "tower" with the projector, "decoder"
    with all that reads the prompt. The pruner's own are left out, as its time is given apart."""
    shapes, work = Shapes(), Counter[str]()
    with noting(shapes):
        pipe.generate(item.image, item.prompt, keep_tokens=keep, max_new_tokens=1)
    names = {"encoder": "tower", "prefill": "decoder"}
    for stage, file, given in shapes.runs:
        part = part_of(pipe.manifest, stage)
        if part in names:
            counted = flops.count(pipe.bundle.path(file), axes_of(pipe.manifest, file, given))
            if counted.unknown:
                raise VtpError(f"{file}: {counted.unknown} operators' work could not be counted")
            work[names[part]] += counted.total
    return {name: round(work[name] / 1e9, 6) for name in names.values()}


def time_to_first_token(
    rows: Mapping[str, Sequence[Cell]], item: Item, rounds: int
) -> dict[str, dict[str, Any]]:
    """Median milliseconds by row and column: `ttft`, and `pruner` of it, over interleaved rounds."""
    if rounds < 1:
        raise UsageError(f"rounds {rounds} measures nothing; choose at least 1")
    seen: dict[str, dict[str, dict[str, list[float]]]] = {}
    with ExitStack() as stack:
        folders = bundles([cell for cells in rows.values() for cell in cells])
        pipes = {folder: stack.enter_context(Pipeline.load(folder)) for folder in folders}
        for number in range(rounds + 1):  # the first one warms up
            for name, cells in rows.items():
                for cell in cells:
                    times = _times(pipes[cell.folder], item, cell.tokens)
                    if number:
                        row = seen.setdefault(name, {}).setdefault(
                            str(cell.column), {part: [] for part in times}
                        )
                        for part, ms in times.items():
                            row[part].append(ms)
    return {
        name: {
            column: {part: round(statistics.median(values), 2) for part, values in row.items()}
            for column, row in columns.items()
        }
        for name, columns in seen.items()
    }


def _times(pipe: Pipeline, item: Item, keep: int) -> dict[str, float]:
    timings = pipe.generate(item.image, item.prompt, keep_tokens=keep, max_new_tokens=1).timings
    pruners = {stage.name for stage in pipe.manifest.stages_of("pruner")}
    return {
        "ttft": timings.ttft,
        "pruner": sum(ms for stage, ms in timings.stages.items() if stage in pruners),
    }


def held(file: Path, cells: Sequence[Cell], wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The answers that an earlier run left, if they are to the same questions and their bundles are there."""
    if not (file.exists() and all(folder.is_dir() for folder in bundles(cells))):
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if all(found.get(key) == value for key, value in wanted.items()) else None


def write(file: Path, data: object) -> None:
    """Write beside, then swap in: a kill leaves the old file or the new one."""
    with whole_file(file) as aside:
        aside.write_text(json.dumps(data) + "\n")
