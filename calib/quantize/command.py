"""vtp-calib quantize: a new bundle in fewer bits, measured against the old one on the same questions."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vtp.calib import stats
from vtp.calib.arguments import (
    PROG,
    beside,
    open_examiner,
    open_workers,
    read_samples,
    shared_arguments,
    threads_of,
)
from vtp.calib.data import Sample
from vtp.calib.keep.examiner import score
from vtp.calib.keep.journal import Answer, Journal
from vtp.calib.workers.local import Workers
from vtp.engines import UsageError, VtpError, choose_engine
from vtp.engines.disk.whole import whole_file
from vtp.engines.errors import shown
from vtp.runtime import Pipeline
from vtp.runtime.bundle.fewer_bits import bits_of
from vtp.runtime.bundle.folder import MANIFEST, Bundle, check_output, open_bundle, whole_bundle
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.commands.arguments import A_BUNDLE, add_overwrite, real, suggest, take_bundle, whole
from vtp.runtime.commands.console import Progress, say, say_json, table

if TYPE_CHECKING:
    from vtp.calib.quantize.quantizer import Quantizer

_TARGETS = ("ort", "tensorrt", "jetpack6")
_VISION, _DECODER, _ACTIVATIONS = ("int8", "none"), ("int4", "int8", "none"), ("auto", "uint8", "int8")
_HEADS, _PROMPTS = ("float", "int4", "int8"), ("decoder", "int8")
_BLOCKS = (32, 64, 128)
_ELSEWHERE = ("fp8", "int4-awq", "nvfp4")  # NVIDIA ModelOpt's, which pins other versions of everything
_MORE_FLOAT = (0.0, 0.1, 0.25, 0.5)  # shares of the layers, noisiest first, that stay in float, in this order
_TIMED = 15  # questions by which both bundles are timed, in turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of vtp-calib quantize."""
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help=A_BUNDLE)
    vision = add(
        "--vision", default="int8", help="vision encoder and projector: int8 or none (default: %(default)s)"
    )
    suggest(vision, _VISION)
    decoder = add(
        "--decoder", default="int4", help="the decoder's weights: int4, int8 or none (default: %(default)s)"
    )
    suggest(decoder, _DECODER)
    prompt = add(
        "--prompt",
        default="decoder",
        help="what reads prompts: decoder, or int8, a second graph beside the int4 one, for an earlier first "
        "token and more memory (default: %(default)s)",
    )
    suggest(prompt, _PROMPTS)
    add("-o", "--output", metavar="DIR", help="the new bundle (default: BUNDLE-quantized)")
    add_overwrite(parser)
    add(
        "--samples",
        type=whole,
        default=32,
        metavar="N",
        help="pictures to calibrate on (default: %(default)s)",
    )
    add(
        "--max-drop",
        type=real,
        default=1.0,
        metavar="P",
        help="points of accuracy that it may lose (default: %(default)s)",
    )
    add("--force", action="store_true", help="write the bundle even if it loses more")
    block = add(
        "--block", type=whole, default=32, help="int4 weights that share a scale (default: %(default)s)"
    )
    suggest(block, map(str, _BLOCKS))
    activations = add(
        "--activations", default="auto", help="auto, uint8 or int8: how int8 is stored (default: %(default)s)"
    )
    suggest(activations, _ACTIVATIONS)
    head = add(
        "--head",
        default="float",
        help="a head tied to the embedding: float, or as few bits as the decoder has (default: %(default)s)",
    )
    suggest(head, _HEADS)
    shared_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Do what the flags say."""
    _check_flags(args)
    bundle = open_bundle(take_bundle(PROG, args.bundle, args.json))
    output = Path(args.output) if args.output else beside(bundle, "quantized")
    _check_bundle(bundle, output, args)
    samples, metric = read_samples(args)
    chosen, held_out = split(samples, args.samples)
    out, progress = Path(args.out) if args.out else beside(bundle, "calib"), Progress()
    quantizer = _quantizer(bundle, args)
    with ExitStack() as stack:
        journal = Journal(out / "answers.jsonl")
        stack.callback(journal.close)
        aside = stack.enter_context(whole_bundle(output, args.overwrite))
        engine = choose_engine(args.engine, bundle.manifest.dtype, target=bundle.manifest.target).engine
        workers = open_workers(stack, args)
        quantizer.observe(aside / "probe", chosen, engine, threads_of(args), progress.step, workers)
        trial = _Trial(args, bundle.folder, aside, held_out, metric, journal, workers, progress.step)
        compared, left = _lower(quantizer, trial, args)
        timed = trial.time()
        figures = _figures(bundle, aside, compared, timed, metric, len(held_out) < len(samples))
        manifest = _finish(aside, figures, len(chosen))
    progress.end()
    write_csv(out / "quantize.csv", quantizer, left)
    if args.json:
        made = {"bundle": str(output), **figures, "quantization": manifest.quantization}
        say_json({**made, **bundle.stated_origin})
        return
    say(_text(quantizer, left, figures, metric))
    say(f"\nwritten: {shown(output)}; every layer: {shown(out / 'quantize.csv')}")


def split(samples: Sequence[Sample], pictures: int) -> tuple[list[Sample], list[Sample]]:
    """Questions to calibrate on, one each of `pictures` pictures all over the data, and those to measure by.

    The latter are about other pictures, unless that would leave fewer than half of the questions: then all.
    """
    names = list(dict.fromkeys(sample.image for sample in samples))
    count = min(pictures, len(names))
    chosen = {names[place * len(names) // count] for place in range(count)}
    first = {sample.image: sample for sample in reversed(samples)}
    rest = [sample for sample in samples if sample.image not in chosen]
    return [first[name] for name in names if name in chosen], (
        rest if 2 * len(rest) >= len(samples) else list(samples)
    )


# -- refusals ------------------------------------------------------------------------------------------------


def _check_flags(args: argparse.Namespace) -> None:
    known_values = {
        "vision": _VISION,
        "decoder": _DECODER,
        "prompt": _PROMPTS,
        "activations": _ACTIVATIONS,
        "head": _HEADS,
    }
    for name, known in known_values.items():
        value = getattr(args, name)
        if value in _ELSEWHERE:
            raise UsageError(
                f"--{name} {value} is made by NVIDIA ModelOpt, which needs an environment of its own: "
                "python -m venv modelopt && modelopt/bin/pip install 'nvidia-modelopt[onnx]', then "
                "modelopt/bin/python -m modelopt.onnx.quantization --calibration_eps cpu --onnx_path GRAPH; "
                f"here: {', '.join(known)}"
            )
        if value not in known:
            raise UsageError(f"--{name} {value} is not known; choose one of {', '.join(known)}")
    if args.vision == args.decoder == "none":
        raise UsageError("--vision none --decoder none leaves nothing to quantise; choose int8 or int4")
    if args.prompt == "int8" and args.decoder != "int4":
        raise UsageError(
            f"--prompt int8 is a second graph beside an int4 decoder, and --decoder is {args.decoder}; leave "
            "one of them out"
        )
    if args.head not in ("float", args.decoder) and args.decoder != "none":
        raise UsageError(
            f"--head {args.head} does not go with --decoder {args.decoder}; choose float or {args.decoder}"
        )
    if args.block not in _BLOCKS:
        raise UsageError(f"--block {args.block} is not one of {', '.join(map(str, _BLOCKS))}")
    if args.samples < 1:
        raise UsageError(f"--samples {args.samples} is not a valid number of pictures; choose at least 1")
    if not 0 <= args.max_drop <= 100:
        raise UsageError(f"--max-drop {args.max_drop:g} is outside 0 to 100 points")


def _check_bundle(bundle: Bundle, output: Path, args: argparse.Namespace) -> None:
    manifest = bundle.manifest
    if manifest.quantization or any(graph.cache_of for graph in manifest.graphs.values()):
        made = ", ".join(f"{part} {bits}" for part, bits in bits_of(manifest.quantization).items())
        raise UsageError(
            f"{bundle.folder} is quantised already ({made or 'into what it does not say'}); give the bundle "
            "that it was made from"
        )
    if manifest.target not in _TARGETS:
        raise UsageError(
            f"{bundle.folder} was made for target '{manifest.target}'; vtp-calib quantize serves "
            f"{', '.join(_TARGETS)}: export it with --target and one of them"
        )
    if args.vision != "none" and manifest.stream is not None:
        raise UsageError(
            f"{bundle.folder} has a vision tower that reuses a camera's earlier pictures (--tower stc), and "
            "that is not quantised: add --vision none"
        )
    if args.decoder == "int4" and manifest.target == "jetpack6":
        raise UsageError(
            f"{bundle.folder} was made for jetpack6, whose TensorRT 10.3 reads opset 20; int4 came "
            "with 21: add --decoder none"
        )
    dynamic = "--decoder int8" if args.decoder == "int8" else "--prompt int8" if args.prompt == "int8" else ""
    if dynamic and (manifest.target, manifest.dtype) != ("ort", "float32"):
        raise UsageError(
            f"{dynamic} is for target ort in float32, which ONNX Runtime runs on the CPU, and "
            f"{bundle.folder} was made for {manifest.target} in {manifest.dtype}: leave it out"
        )
    if args.activations == "uint8" and manifest.target != "ort":
        raise UsageError("TensorRT does not take --activations uint8; leave it at auto")
    if output.resolve() == bundle.folder.resolve():
        raise UsageError(f"--output {output} is the bundle itself; choose another folder")
    check_output(output, args.overwrite)


def _quantizer(bundle: Bundle, args: argparse.Namespace) -> Quantizer:
    try:
        from vtp.calib.quantize.quantizer import Quantizer, Wish
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise UsageError("vtp-calib quantize needs onnx: pip install 'vtp-edge[calib]'") from error
    wish = Wish(args.vision, args.decoder, args.block, args.activations, args.head, prompt=args.prompt)
    return Quantizer(bundle, wish)


# -- measuring -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """Scores per question of the bundle before and after, and the paired difference in points."""

    before: list[float]
    after: list[float]

    @property
    def change(self) -> stats.Estimate:
        """After minus before, in points of a hundred."""
        return stats.difference([100 * one for one in self.after], [100 * one for one in self.before])


@dataclass(frozen=True)
class Timed:
    """Milliseconds to the first token of both bundles on the same questions, taken in turn."""

    before: list[float]
    after: list[float]

    @property
    def faster(self) -> stats.Estimate:
        """How many times faster the bundle became: the medians' ratio, over the same questions (paired)."""
        before, after = np.asarray(self.before, float), np.asarray(self.after, float)
        return stats.of(
            len(before), lambda draws: np.median(before[draws], axis=1) / np.median(after[draws], axis=1)
        )


class _Trial:
    """Asks both bundles the same questions."""

    def __init__(
        self,
        args: argparse.Namespace,
        before: Path,
        after: Path,
        samples: Sequence[Sample],
        metric: str,
        journal: Journal,
        workers: Workers,
        progress: Callable[[str], None],
    ) -> None:
        self._args, self._samples, self._metric = args, samples, metric
        self._folders, self._journal, self._progress = (before, after), journal, progress
        self._workers = workers
        self._before: list[Answer] | None = None

    def compare(self) -> Compared:
        """Score both; the old bundle answers once."""
        if self._before is None:
            self._before = self._answers(self._folders[0])
        after = self._answers(self._folders[1])
        pair = [
            score(answers, self._samples, self._metric, self._before) for answers in (self._before, after)
        ]
        return Compared(*pair)

    def time(self) -> Timed:
        """Time both in turn, so that what else the machine does meets both."""
        self._progress(f"time both on {min(_TIMED, len(self._samples))} questions, in turn")
        times: list[list[float]] = [[], []]
        with ExitStack() as stack:
            load = [Pipeline.load(one, self._args.engine, self._args.threads) for one in self._folders]
            pipes = [stack.enter_context(pipe) for pipe in load]
            for pipe in pipes:
                pipe.warmup()
            for sample in self._samples[:_TIMED]:
                for pipe, taken in zip(pipes, times, strict=True):
                    taken.append(pipe.generate(sample.image, sample.prompt, max_new_tokens=1).timings.ttft)
        return Timed(*times)

    def _answers(self, folder: Path) -> list[Answer]:
        one = open_examiner(
            self._args, str(folder), self._samples, self._journal, self._workers, self._progress
        )
        answers = one.answers(one.bundle.manifest.visual.default_keep)
        self._workers.release()  # the next round writes other files there
        return answers


def _lower(quantizer: Quantizer, trial: _Trial, args: argparse.Namespace) -> tuple[Compared, set[str]]:
    """Write the bundle, with ever more of the noisiest layers in float until it loses little enough."""
    for share in _MORE_FLOAT:
        left = quantizer.worst(share)
        for old in trial._folders[1].glob("*.*"):  # of the round before
            if not old.name.startswith("."):
                old.unlink()
        quantizer.write(trial._folders[1], left)
        compared = trial.compare()
        if -compared.change.value <= args.max_drop or args.force:
            return compared, left
    raise VtpError(
        f"it loses {-compared.change.value:.1f} points (95 % {-compared.change.high:.1f} to "
        f"{-compared.change.low:.1f}) even with half of the layers in float, and --max-drop allows "
        f"{args.max_drop:g}; quantise one part only (--vision none or --decoder none), or --force"
    )


def _figures(
    bundle: Bundle, aside: Path, compared: Compared, timed: Timed, metric: str, held_out: bool
) -> dict[str, Any]:
    """What was measured, for the manifest."""

    def triple(one: stats.Estimate) -> list[float]:
        return [round(one.value, 5), round(one.low, 5), round(one.high, 5)]

    sizes = [sum(info.bytes for info in one.manifest.files.values()) for one in (bundle, open_bundle(aside))]
    return {
        "accuracy": {
            "metric": metric,
            "questions": len(compared.before),
            "other_pictures_than_calibrated_on": held_out,
            "keep": bundle.manifest.visual.default_keep,
            "before": triple(stats.mean(compared.before)),
            "after": triple(stats.mean(compared.after)),
            "change_in_points": triple(compared.change),
        },
        "bytes": {"before": sizes[0], "after": sizes[1]},
        "ttft_ms": {
            "before": round(statistics.median(timed.before), 3),
            "after": round(statistics.median(timed.after), 3),
            "times_faster": triple(timed.faster),
        },
    }


def _finish(aside: Path, figures: dict[str, Any], calibrated_on: int) -> Manifest:
    """Write what was measured into the new bundle's manifest."""
    manifest = open_bundle(aside).manifest
    record = {**manifest.quantization, "calibrated_on_pictures": calibrated_on}
    record |= {name: figures[name] for name in ("bytes", "ttft_ms")}
    parity = {"mode": "accuracy", **figures["accuracy"]}
    manifest = dataclasses.replace(manifest, quantization=record, parity=parity)
    (aside / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


# -- reports -------------------------------------------------------------------------------------------------


def write_csv(file: Path, quantizer: Quantizer, also_left: set[str]) -> None:
    """One line per layer."""
    record = quantizer.record(also_left)
    left, prompts = record["left_in_float"], record.get("in_prompts", {})
    with whole_file(file) as part, part.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        parts = ["layer", "inputs", "outputs", "bits", "signal_to_noise_db", "left_in_float"]
        writer.writerow([*parts, "db_in_prompts"])  # in int8; empty: as everywhere
        for one in quantizer.judged:
            label = one.layer.label
            bits = "float" if label in left else one.bits
            row = [label, *one.layer.shape, bits, f"{one.decibels:.1f}", left.get(label, "")]
            writer.writerow([*row, prompts[label]["db"] if label in prompts else ""])


def _text(quantizer: Quantizer, also_left: set[str], figures: dict[str, Any], metric: str) -> str:
    """The report for people."""
    record, lines = quantizer.record(also_left), []
    left, prompts = record["left_in_float"], record.get("in_prompts", {})
    for bits in ("int8", "dynamic int8", "int4"):
        made = [one for one in quantizer.judged if one.bits == bits and one.layer.label not in left]
        count = sum(one.bits == bits for one in quantizer.judged)
        if made:
            worst = min(made, key=lambda one: one.decibels)
            lines.append(
                f"{bits}: {len(made)} of {count} layers; the noisiest, {shown(worst.layer.label)}, has "
                f"{worst.decibels:.1f} dB"
            )
    if prompts:
        label, worst = min(prompts.items(), key=lambda item: item[1]["db"])
        lines.append(
            f"prompts are read in int8 by {len(prompts)} layers; the noisiest, {shown(label)}, has "
            f"{worst['db']:.1f} dB"
        )
    lines += [f"left in float: {shown(label)}: {shown(reason)}" for label, reason in sorted(left.items())]
    accuracy, size, ttft = figures["accuracy"], figures["bytes"], figures["ttft_ms"]
    change = stats.Estimate(*accuracy["change_in_points"])
    faster = stats.Estimate(*ttft["times_faster"])
    rows = [
        [
            f"{metric}, {accuracy['questions']} questions",
            *(f"{100 * accuracy[name][0]:.1f} %" for name in ("before", "after")),
            f"{change.value:+.1f} points ({change.low:+.1f} to {change.high:+.1f})",
        ],
        ["MB", *(f"{size[name] / 1e6:.1f}" for name in ("before", "after")), _share(size)],
        [
            "TTFT, ms",
            *(f"{ttft[name]:.1f}" for name in ("before", "after")),
            f"{faster.value:.2f} times faster ({faster.low:.2f} to {faster.high:.2f})",
        ],
    ]
    return "\n".join([*lines, "", table(["", "before", "after", ""], rows)])


def _share(size: dict[str, int]) -> str:
    return f"{100 * size['after'] / size['before']:.0f} % of it"
