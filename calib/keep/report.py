"""What a calibration found, for people and for spreadsheets: a table, a CSV, a picture, the next command."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from vtp.calib.keep.search import Search, Tried
from vtp.calib.keep.wrong import Kinds
from vtp.engines.disk.whole import whole_file
from vtp.engines.errors import MESSAGE_LENGTH, shown
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.commands.console import table
from vtp.runtime.commands.tables import markdown_table
from vtp.runtime.shell import command_line

_BUILT_IN = ("model", "llava", 128, 512)  # its name, family, width and vocabulary
_HEADER = ["kept", "score (95 %)", "of unpruned (95 %)", "TTFT ms", ""]


def text(search: Search, floor: float | None) -> str:
    """A table of the keep-counts tried, the chosen one marked."""
    return table(_HEADER, [_row(tried, search, floor) for tried in search.tried])


def markdown(search: Search, floor: float | None, kinds: Kinds, caption: str) -> str:
    """The same with what is wrong, as a Markdown table to paste, under its caption."""
    header = [*_HEADER[:3], "wrong numbers", "wrong words", *_HEADER[3:]]
    lines = []
    for tried in search.tried:
        row, scores = _row(tried, search, floor), tried.marks.scores
        lines.append([*row[:3], str(kinds.numbers(scores)), str(kinds.words(scores)), *row[3:]])
    align = "r" * (len(header) - 1) + "l"
    return f"{shown(caption, MESSAGE_LENGTH)}\n\n{markdown_table(header, lines, align=align)}"


def _row(tried: Tried, search: Search, floor: float | None) -> list[str]:
    return [
        str(tried.keep),
        str(tried.score),
        str(tried.share),
        f"{tried.marks.ttft:.1f}",
        _remark(tried, search, floor),
    ]


def wrong(search: Search, kinds: Kinds, unpruned: Sequence[float]) -> str:
    """A line that tells wrong numbers from wrong words, at the chosen keep-count and unpruned."""
    chosen = search.chosen
    places = ((f"{chosen.keep} kept", chosen.marks.scores), ("unpruned", unpruned))
    told = [f"{name} {kinds.numbers(scores)} numbers, {kinds.words(scores)} words" for name, scores in places]
    return f"wrong: {'; '.join(told)}"


def _remark(tried: Tried, search: Search, floor: float | None) -> str:
    words = [] if floor is None else [tried.verdict(floor)]
    return ", ".join([*words, *(["chosen"] if tried is search.chosen else [])])


def write_csv(file: Path, search: Search, floor: float | None, kinds: Kinds) -> None:
    """One line per keep-count tried."""
    with whole_file(file) as part, part.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        names = ["keep", "score", "score_low", "score_high", "share", "share_low", "share_high", "ttft_ms"]
        wrong = ["wrong_numbers", "numbers", "wrong_words", "words"]
        writer.writerow([*names, "questions", "verdict", "chosen", *wrong])
        for tried in search.tried:
            estimates = [tried.score, tried.share]
            figures = [f"{part:.5f}" for one in estimates for part in (one.value, one.low, one.high)]
            verdict = "" if floor is None else tried.verdict(floor)
            marks = tried.marks
            row = [tried.keep, *figures, f"{marks.ttft:.3f}", len(marks.scores), verdict]
            shares = kinds.numbers(marks.scores), kinds.words(marks.scores)
            counts = [count for share in shares for count in (share.wrong, share.of)]
            writer.writerow([*row, int(tried is search.chosen), *counts])


def draw(file: Path, search: Search, title: str) -> bool:
    """Score and TTFT against tokens kept, the choice marked. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kept = [tried.keep for tried in search.tried]
    scores = [tried.score for tried in search.tried]
    away = [[one.value - one.low for one in scores], [one.high - one.value for one in scores]]
    figure, left = pyplot.subplots(figsize=(7, 4.5))
    right = left.twinx()
    left.errorbar(kept, [one.value for one in scores], away, marker="o", capsize=3, color="C0", label="score")
    right.plot(kept, [tried.marks.ttft for tried in search.tried], marker="s", color="C1", ls="--")
    left.axvline(search.chosen.keep, color="black", lw=0.8, ls=":")
    left.annotate(f"{search.chosen.keep}", (search.chosen.keep, search.chosen.score.value))
    left.set(xlabel="visual tokens kept", ylabel="score (95 % interval)", title=title)
    right.set_ylabel("time to first token, ms (dashed)")
    right.set_ylim(bottom=0)
    figure.tight_layout()
    with whole_file(file) as part:
        figure.savefig(part, dpi=100, format="png")
    pyplot.close(figure)
    return True


def finer(manifest: Manifest, keeps: Sequence[int], chosen: int) -> str:
    """The vtp-export line for a grid between the choice and the next smaller keep-count; "" if none is left.

    DIR stands for the model, unless it is the built-in one, and BUNDLE for the result.
    """
    below = max((keep for keep in keeps if keep < chosen), default=0)
    step = max(1, (chosen - below) // 4)
    if chosen - below <= 1 or manifest.method.site == "none":
        return ""
    chosen_options = dict(manifest.method.options)
    if not manifest.method.site.startswith("decoder"):
        chosen_options["positions"] = manifest.method.positions
    options = [
        word for key, value in chosen_options.items() for word in ("--method-option", f"{key}={value}")
    ]
    first = max(1, below + step)
    grid = f"{first}:{chosen}:{step}"
    options += ["--share", "tile"] if manifest.method.share == "tile" else []
    options += ["--restore"] if manifest.method.restore else []
    options += _then_options(manifest)
    words = ["--method", manifest.method.name, *options, "--keep-tokens", grid, "--dtype", manifest.dtype]
    model = [] if _is_built_in(manifest) else ["--model", "DIR"]
    return command_line("vtp-export", *model, *words, "-o", "BUNDLE")


def _then_options(manifest: Manifest) -> list[str]:
    """The flags that make the bundle's second cut, inside the decoder."""
    then = manifest.method.then
    if then is None:
        return []
    settings = {"share": then.share, **then.options}
    own = [word for key, value in settings.items() for word in ("--then-option", f"{key}={value}")]
    return ["--then", f"{then.name}:{then.layer}", *own]


def _is_built_in(manifest: Manifest) -> bool:
    """Whether vtp-export takes this model without --model: other folders are called model, of other sizes."""
    model = manifest.model
    return (model.name, model.family, model.hidden_size, model.vocab_size) == _BUILT_IN
