"""vtp-watch: a standing question about a camera, a stream or a video, answered as often as the model can."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from vtp.engines import UsageError, VtpError, capabilities
from vtp.engines.errors import quoted, shown
from vtp.runtime.bundle.stream_info import grey_line
from vtp.runtime.commands.arguments import (
    A_BUNDLE,
    add_debug,
    add_engine,
    add_json,
    add_keep_tokens,
    add_threads,
)
from vtp.runtime.commands.console import Parser, note, real_number, run_command, whole_number
from vtp.runtime.decisions.question import LABELS, LETTERS
from vtp.runtime.hub.bundles import local_bundle
from vtp.runtime.media.cut_off import cut_off_line
from vtp.runtime.opening import NEVER_RUN, NEVER_TRIED
from vtp.runtime.pipeline import DEFAULT_NEW_TOKENS, Pipeline
from vtp.runtime.preprocess import ImageSpec
from vtp.serve.streams.alerts import Alert, AlertReading
from vtp.serve.streams.answer import FrameAnswer
from vtp.serve.streams.asking import feature_cache
from vtp.serve.streams.frames import Frame, Source
from vtp.serve.streams.gate import DEFAULT_CHANGE, Gate
from vtp.serve.streams.sinks.hooks import Command, Hook, Webhook
from vtp.serve.streams.sinks.kept import KeptPictures, KeptVideo, check_kept, is_video
from vtp.serve.streams.sinks.lines import Sink, alerted, json_lines, say_answer
from vtp.serve.streams.sinks.recording import McapAnswers, check_recording
from vtp.serve.streams.sinks.tally import Tally
from vtp.serve.streams.sources.names import without_secrets
from vtp.serve.streams.sources.opening import check_source, open_source
from vtp.serve.streams.typed import TypedPrompts, is_typed
from vtp.serve.streams.watcher import Watcher, check_asks, check_every, check_single, check_timeout

PROG = "vtp-watch"
PAGE_PORT = "8001"
_ENDED = "the watch is over"
_LARGEST_PORT = 2**16 - 1
_THRESHOLD, _COOLDOWN = "0.5", "10"
_HYSTERESIS = 0.1  # at most half of the threshold


class _Parser(Parser):
    """Its complaints quote what was given, and that may be a camera's address with a password."""

    def error(self, message: str) -> Any:
        """Print one line and leave with exit code 2."""
        super().error(without_secrets(message))


def build_parser() -> argparse.ArgumentParser:
    """The flags of vtp-watch."""
    parser = _Parser(prog=PROG, description="Ask about the newest frame of a stream, again and again.")
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help=A_BUNDLE)
    add(
        "source",
        metavar="SOURCE",
        help="a camera (/dev/video0), a URL (rtsp://, http://), a video file, a folder of pictures or "
        "mcap:FILE#TOPIC, or zenoh:TOPIC",
    )
    add("--prompt", metavar="TEXT", help="what to ask about each frame; type another one while it runs")
    add("--stdin", action="store_true", help="take new prompts from standard input, also from a program")
    _add_pace(parser)
    _add_alerts(parser)
    add_keep_tokens(parser, "one of the bundle's keep-counts (default: the bundle's)")
    add("--max-new-tokens", default=str(DEFAULT_NEW_TOKENS), metavar="N", help="default: %(default)s")
    add_engine(parser)
    add_threads(parser)
    add("--prefix-caching", action="store_true", help="read what the prompts of one frame share once")
    add(
        "--stream-reuse",
        action="store_true",
        help="make use of the frames before: of a bundle made with --tower stc or --method change",
    )
    add(
        "--page",
        nargs="?",
        const=PAGE_PORT,
        metavar="PORT",
        help="show frames and answers in a browser of this machine, and take questions there (default with "
        "--page: %(const)s; needs the extra [serve])",
    )
    add(
        "--show-kept",
        metavar="DIR|FILE",
        help="write each frame asked about there, with dropped patches dimmed: a picture each in a folder, "
        "or one video, as .mp4 or .mkv",
    )
    add("--mcap", metavar="FILE", help="record the answers there, as messages of ROS 2 (std_msgs/String)")
    add_json(parser, "print a JSON object a line")
    add_debug(parser)
    return parser


def _add_pace(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pace").add_argument
    add("--every", default="0", metavar="S", help="ask at most once in S seconds (default: when it can)")
    add("--every-frame", action="store_true", help="of a file: ask about each frame, however long it takes")
    add("--fps", metavar="N", help="of a folder: pictures a second (default: the next when it can)")
    add("--until", metavar="N|Ss", help="end after N answers, or, with an s behind it, S seconds")
    add("--timeout", metavar="S", help="end if no frame came for S seconds (default: wait)")
    add(
        "--gate",
        nargs="?",
        const=str(DEFAULT_CHANGE),
        metavar="CHANGE",
        help="ask nothing while less than CHANGE of 1 differs from the last frame asked about, in the block "
        "that differs most (default with --gate: %(const)s)",
    )


def _add_alerts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("alerts").add_argument
    add(
        "--alert",
        action="append",
        default=[],
        metavar="QUESTION",
        help="of yes or no, or with its answers behind it, the alarming one first: "
        '"how is the door ? [open|closed]"; may be repeated',
    )
    add(
        "--labels",
        default=LETTERS,
        choices=LABELS,
        help="letters: the model is told to choose one; texts: it reads the question alone, and its own "
        "words are compared (default: %(default)s)",
    )
    add(
        "--threshold",
        action="append",
        default=[],
        metavar="P",
        help=f"probability that raises it, once for all or once for each (default: {_THRESHOLD})",
    )
    add(
        "--hysteresis",
        metavar="P",
        help=f"ends this far below (default: {_HYSTERESIS:g}, at most half of the threshold)",
    )
    add(
        "--cooldown", default=_COOLDOWN, metavar="S", help="seconds between two raises (default: %(default)s)"
    )
    add("--on-alert", metavar="COMMAND", help="run on each alert, with the alert as JSON on standard input")
    add("--webhook", metavar="URL", help="POST each alert there as JSON")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of vtp-watch; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_command(PROG, lambda: _run(args), args.debug, interrupted=_ENDED)


def _run(args: argparse.Namespace) -> None:
    if args.stdin and sys.stdin is None:
        raise UsageError("--stdin reads standard input, which is closed; leave it out, or give it a program")
    alerts, options = alerts_of(args), watch_options(args)
    answers, seconds = until_of(args.until)
    fps = None if args.fps is None else _above_zero("fps", args.fps)
    check_asks(args.prompt, alerts)
    check_source(args.source, fps)
    port = None if args.page is None else _port(args.page)
    _check_files(args)
    with ExitStack() as stack:
        hooks = [stack.enter_context(closing(hook)) for hook in _hooks(args)]
        pipe = stack.enter_context(_pipeline(args, len(alerts) + (args.prompt is not None)))
        _make_ready(pipe, options["keep_tokens"], args.stream_reuse)
        # Not before: what a live stream sends meanwhile would be old.
        source = stack.enter_context(closing(open_source(args.source, args.every_frame, fps, _tell)))

        def on_alert(reading: AlertReading, frame: Frame) -> None:
            for hook in hooks:
                hook.put(alerted(reading, frame, source.name))

        watcher = stack.enter_context(
            Watcher(pipe, source, args.prompt, alerts=alerts, on_alert=on_alert, tell=_tell, **options)
        )
        sinks = _sinks(args, pipe, source)
        if port is not None:  # before any file is begun, as the port may be taken
            sinks.append(stack.enter_context(closing(_page(watcher, port, source))))
        if args.show_kept:
            sinks.append(_kept_sink(stack, Path(args.show_kept), pipe, source))
        if args.mcap is not None:
            sinks.append(stack.enter_context(McapAnswers(Path(args.mcap))))
        if args.stdin or is_typed():
            stack.enter_context(closing(TypedPrompts(watcher, _tell)))
        if seconds is not None:
            stack.enter_context(_ending(watcher, seconds))
        _watch(watcher, pipe, sinks, answers)


def _watch(watcher: Watcher, pipe: Pipeline, sinks: Sequence[Sink], most: int | None) -> None:
    """Answer until it is over; the summary is told however it ends."""
    tally = Tally(watcher, pipe.manifest.stream)
    try:
        for answer in watcher:
            tally.add(answer)
            for sink in sinks:
                sink(answer)
            if watcher.asked == most:
                return
    finally:
        watcher.stop()
        _tell(tally.line())


def _pipeline(args: argparse.Namespace, questions: int) -> Pipeline:
    """The bundle; of several questions about a frame only the first runs the image stages."""
    return Pipeline.load(
        local_bundle(args.bundle, say=_tell, bars=not args.json),
        args.engine,
        None if args.threads is None else whole_number("threads", args.threads),
        vision_feature_cache=feature_cache(questions, args.stream_reuse),
        prefix_caching=args.prefix_caching,
        stream_reuse=args.stream_reuse,
    )


def _make_ready(pipe: Pipeline, keep: int | None, stream_reuse: bool) -> None:
    """Run it once, so that the first frame does not wait for set-up."""
    check_single(pipe)
    for engine in dict.fromkeys(pipe.engines.values()):
        if not capabilities(engine).proven:
            _tell(NEVER_RUN if capabilities(engine).built else NEVER_TRIED.format(engine=engine))
    for line in pipe.notes:
        _tell(line)
    if not stream_reuse and (line := grey_line(pipe.manifest.stages, "--stream-reuse")):
        _tell(line)
    pipe.generate(Image.new("RGB", (64, 64)), "warm up", keep_tokens=keep, max_new_tokens=2)


def _sinks(args: argparse.Namespace, pipe: Pipeline, source: Source) -> list[Sink]:
    sinks: list[Sink] = [json_lines(source.name, pipe.engine) if args.json else say_answer]
    return [_sides_note(pipe.manifest.image), _doubt_note(), *sinks]


def _kept_sink(stack: ExitStack, path: Path, pipe: Pipeline, source: Source) -> Sink:
    """Pictures in a folder, or a video, which is ended when `stack` is."""
    if is_video(path):
        return stack.enter_context(KeptVideo(path, pipe.manifest, getattr(source, "every_frame", False)))
    return KeptPictures(path, pipe.manifest)


def _sides_note(spec: ImageSpec) -> Sink:
    """Says once, of the first frame that is answered, how much of its sides the model does not see."""
    told: list[bool] = []

    def note_sides(answer: FrameAnswer) -> None:
        if not told and (line := cut_off_line(spec, *answer.picture().size)):
            _tell(line)
        told.append(True)

    return note_sides


def _doubt_note() -> Sink:
    """Says once for each alert that the model would write something other than its answers."""
    told: set[str] = set()

    def note_doubt(answer: FrameAnswer) -> None:
        for reading in answer.alerts:
            if reading.question not in told and (line := reading.decision.doubt):
                told.add(reading.question)
                _tell(f"alert {quoted(reading.question, 40)}: {line}")

    return note_doubt


def _check_files(args: argparse.Namespace) -> None:
    """Refuse what can be refused of the files to be written before a model is loaded."""
    if args.show_kept:
        folder = Path(args.show_kept)
        check_kept(folder)
        if folder.is_dir() and "://" not in args.source and _same(folder, Path(args.source)):
            raise UsageError(
                f"--show-kept '{shown(folder)}' is the folder that is watched, whose pictures would be "
                "overwritten; give another one"
            )
    if args.mcap is not None:
        check_recording(Path(args.mcap))


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def _port(text: str) -> int:
    """The page's port. Raises UsageError."""
    number = whole_number("page", text, least=0)
    if number > _LARGEST_PORT:
        raise UsageError(
            f"page {number} is not a valid port; choose 1 to {_LARGEST_PORT}, or 0 for a free one"
        )
    return number


def _page(watcher: Watcher, port: int, source: Source) -> Any:
    """The live page, told where it is. Raises VtpError where its library is not installed."""
    try:
        from vtp.serve.streams.sinks.page import Page
    except ImportError as error:
        raise VtpError(
            f"--page needs {error.name}, which is not installed; run: pip install 'vtp-edge[serve]'"
        ) from error
    page = Page(watcher, port, source.name)
    _tell(f"the page is at {page.address}")
    return page


def _hooks(args: argparse.Namespace) -> list[Hook]:
    hooks = []
    if args.on_alert is not None:
        hooks.append(Hook("--on-alert", Command(args.on_alert), _tell))
    if args.webhook is not None:
        hooks.append(Hook("--webhook", Webhook(args.webhook), _tell))
    return hooks


@contextmanager
def _ending(watcher: Watcher, seconds: float) -> Iterator[None]:
    """Stop the watcher after some seconds."""
    timer = threading.Timer(seconds, watcher.stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _tell(line: str) -> None:
    note(PROG, line)


# -- what was asked for --------------------------------------------------------------------------------------


def alerts_of(args: argparse.Namespace) -> list[Alert]:
    """The alerts. UsageError for flags that do not fit them."""
    if not args.alert and (args.on_alert is not None or args.webhook is not None or args.threshold):
        raise UsageError('--on-alert, --webhook and --threshold need an --alert "QUESTION"')
    thresholds = args.threshold or [_THRESHOLD]
    if len(thresholds) not in (1, len(args.alert) or 1):
        raise UsageError(
            f"{len(thresholds)} thresholds are given for {len(args.alert)} alerts; give one for all, or one "
            "for each"
        )
    each = thresholds * len(args.alert) if len(thresholds) == 1 else thresholds
    wide = None if args.hysteresis is None else real_number("hysteresis", args.hysteresis)
    cool = real_number("cooldown", args.cooldown)
    numbers = [real_number("threshold", text) for text in each]
    return [
        Alert.of(text, one, min(_HYSTERESIS, one / 2) if wide is None else wide, cool, args.labels)
        for text, one in zip(args.alert, numbers, strict=True)
    ]


def watch_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of the watcher."""
    return {
        "gate": None if args.gate is None else Gate(real_number("gate", args.gate)),
        "every": check_every(real_number("every", args.every)),
        "every_frame": args.every_frame,
        "timeout": check_timeout(None if args.timeout is None else real_number("timeout", args.timeout)),
        "max_new_tokens": whole_number("max-new-tokens", args.max_new_tokens),
        "keep_tokens": None if args.keep_tokens is None else whole_number("keep-tokens", args.keep_tokens),
    }


def until_of(text: str | None) -> tuple[int | None, float | None]:
    """Answers, seconds: after which of them it ends."""
    if text is None:
        return None, None
    if text.endswith("s"):
        return None, _above_zero("until", text[:-1])
    return whole_number("until", text, least=1), None


def _above_zero(name: str, text: str) -> float:
    value = real_number(name, text)
    if not 0 < value <= 31_536_000:
        raise UsageError(f"{name} '{shown(text, 40)}' is not a number above 0, up to 31536000")
    return value


if __name__ == "__main__":
    sys.exit(main())
