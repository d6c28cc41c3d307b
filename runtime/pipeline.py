"""The pipeline: a picture and a prompt in, text out, over whatever stages a bundle lists."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from vtp.engines import AUTO, Choice, UsageError, VtpError, choose_engine
from vtp.engines.trt import LIBRARIES
from vtp.engines.whole import undisturbed
from vtp.runtime.answer import Answer, Request
from vtp.runtime.batch import batches, check_lists, each_prompt, write_together
from vtp.runtime.bundle import Bundle, open_bundle
from vtp.runtime.conditions import Conditions, conditions
from vtp.runtime.images import ImageSource, load_image
from vtp.runtime.opening import Opening
from vtp.runtime.preprocess import preprocess
from vtp.runtime.result import Result, Timings
from vtp.runtime.reuse import ImageCache, Prefix, check_prefix
from vtp.runtime.sampling import Sampler
from vtp.runtime.stages import StageRunner
from vtp.runtime.text import Prompt, Prompter, StopStrings
from vtp.runtime.videos import VideoSource, load_video

Messages = Sequence[dict[str, Any]]
Images: TypeAlias = "ImageSource | VideoSource | Sequence[ImageSource]"  # of one prompt
DEFAULT_NEW_TOKENS = 128


class Pipeline:
    """Answers prompts about pictures from one bundle.

    One Pipeline serves one thread and one generation at a time: a second call while one runs (or while a
    stream is open) raises VtpError. Use one Pipeline per thread. A context manager; `close()` frees the
    graphs.
    """

    def __init__(
        self,
        bundle: Bundle,
        choice: Choice,
        threads: int | None = None,
        image_cache: int = 0,
        reuse_prompt: bool = False,
        opening: Opening | None = None,
    ) -> None:
        """Open every graph of a verified bundle; most users call `Pipeline.load`."""
        if reuse_prompt:
            check_prefix(bundle)
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.engine = choice.engine
        self.decisions = choice.decisions
        self._prompter = Prompter(
            self.manifest.text, bundle.path("tokenizer.json"), self.manifest.model.max_length
        )
        self._prompter.check()
        prefix = Prefix() if reuse_prompt else None
        self._runner: StageRunner | None = StageRunner(bundle, choice.engine, threads, opening, prefix)
        self._busy = threading.Lock()
        self._threads = threads
        self._images = ImageCache(image_cache)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        engine: str = AUTO,
        threads: int | None = None,
        check_hashes: bool = False,
        image_cache: int = 0,
        reuse_prompt: bool = False,
        opening: Opening | None = None,
    ) -> Pipeline:
        """Open a bundle folder.

        engine        "auto" (the best that can run here), or one by name, such as "ort-cpu"
        threads       CPU threads of one operator; None: all cores
        check_hashes  also compare every file's sha256 with the manifest (reads all weights)
        image_cache   keep what the image stages gave for the pictures of so many prompts, for a next prompt
                      about the same; `image_cache_bytes` says how much memory that takes
        reuse_prompt  read a prompt on from what it shares with the one before (and its answer): a picture and
                      the turns of a conversation are then read once
        opening       where TensorRT's engines lie, and what CUDA may do (see `Opening`)

        `image_cache` and `reuse_prompt` change timings, and the latter the last bits of logits: both are off
        unless asked for.

        Raises VtpError for a bundle that is damaged or cannot run here, UsageError for a bad argument.
        """
        threads = None if threads is None else _whole("threads", threads)
        if not _is_whole(image_cache) or image_cache < 0:
            raise UsageError(f"image_cache {image_cache!r} is not a number of prompts; give 0 (off) or more")

        def load(folder: Path) -> Pipeline:
            opened = open_bundle(folder, check_hashes)
            choice = choose_engine(engine, opened.manifest.dtype, target=opened.manifest.target)
            return cls(opened, choice, threads, image_cache, reuse_prompt, opening)

        return undisturbed(load)(bundle)  # one bundle, even while another takes its place

    def generate(
        self,
        image: Images,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        keep_tokens: int | None = None,
        budget_ms: float | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        skip_special_tokens: bool = True,
        allow_special_tokens: bool = False,
    ) -> Result:
        """Answer a prompt about a picture, or about several; with a bundle made for videos, about one.

        image           path, bytes, PIL image or uint8 RGB array [H,W,3]; or a list of such. A video is a
                        list of frames, a uint8 array [frames,H,W,3], a folder of pictures or a file (see
                        `vtp.runtime.videos`); of more frames than the bundle takes, so many are sampled
        prompt          the user's words; or
        messages        several turns, as chat templates take them: {"role": ..., "content": str or a list of
                        {"type": "image"} (or "video") and {"type": "text", "text": ...}}; without an image
                        entry the pictures join the first user turn
        max_new_tokens  at most so many tokens are generated
        keep_tokens     one of the bundle's keep-counts; None: its default
        budget_ms       instead: the largest keep-count whose time to first token, as vtp-calib measured it
                        here, is within so many milliseconds
        temperature     0 is greedy; otherwise sample, from the `top_p` nucleus, repeatable with `seed`
        stop            strings that end the answer and are not part of it
        skip_special_tokens   False: special tokens that the model writes, such as boxes or document tags,
                        stay in the answer's text; the token that ends it never does
        allow_special_tokens  True: the texts may hold the model's special tokens, which then mean what they
                        mean in transformers' prompts; refused otherwise. The picture's own token always is

        Raises UsageError for a bad argument and VtpError for a picture or prompt that cannot be served.
        """
        stream = self.stream(
            image,
            prompt,
            messages=messages,
            max_new_tokens=max_new_tokens,
            keep_tokens=keep_tokens,
            budget_ms=budget_ms,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            skip_special_tokens=skip_special_tokens,
            allow_special_tokens=allow_special_tokens,
        )
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        image: Images,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        keep_tokens: int | None = None,
        budget_ms: float | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        skip_special_tokens: bool = True,
        allow_special_tokens: bool = False,
    ) -> Stream:
        """Like `generate`, piece by piece: iterate for text, then read `.result`; `.cancel()` ends it."""
        request = self._request(
            time.perf_counter(),
            image,
            prompt,
            messages,
            keep=self._keep(keep_tokens) if budget_ms is None else self._keep_within(budget_ms, keep_tokens),
            max_new_tokens=max_new_tokens,
            sampler=Sampler(temperature=temperature, top_p=top_p, seed=seed),
            stop=stop,
            skip_special_tokens=skip_special_tokens,
            allow_special_tokens=allow_special_tokens,
        )
        return Stream(self, request)

    def generate_batch(
        self,
        images: Sequence[Images],
        prompts: Sequence[str] | None = None,
        *,
        messages: Sequence[Messages] | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        keep_tokens: int | None = None,
        budget_ms: float | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        skip_special_tokens: bool = True,
        allow_special_tokens: bool = False,
        batch_size: int | None = None,
    ) -> list[Result]:
        """Answer several prompts, each about its own picture (or list of pictures), in batches.

        Prompts may differ in length, and each answer ends where it would alone: greedy answers are those of
        `generate`. The keyword arguments are `generate`'s, for all prompts, but for

        messages    a conversation for each entry of `images`, instead of `prompts`
        seed        prompt number i, from 0, samples with seed + i
        batch_size  most pictures that go through the graphs together; None: as many as the bundle was made
                    for. Prompts with equal numbers of pictures run together.

        The timings of a result's stages are those of its batch. Raises as `generate` does, for all prompts
        before any is answered, and says which prompt it is about.
        """
        started, count = time.perf_counter(), check_lists(images, prompts, messages)
        most = self.batch_size
        together = most if batch_size is None else min(most, _whole("batch_size", batch_size))
        keep = self._keep(keep_tokens) if budget_ms is None else self._keep_within(budget_ms, keep_tokens)
        requests = each_prompt(
            count,
            lambda place: self._request(
                started,
                images[place],
                prompts[place] if prompts is not None else None,
                messages[place] if messages is not None else None,
                keep=keep,
                max_new_tokens=max_new_tokens,
                sampler=Sampler(temperature=temperature, top_p=top_p, seed=_later(seed, place)),
                stop=stop,
                skip_special_tokens=skip_special_tokens,
                allow_special_tokens=allow_special_tokens,
            ),
        )
        answers = [self._answer(request) for request in requests]
        with self._claimed() as runner:
            for places in batches(requests, together):
                write_together(runner, keep, [answers[place] for place in places])
        return [answer.result for answer in answers]

    @property
    def batch_size(self) -> int:
        """Most pictures whose prompts go through the bundle's graphs together."""
        return self._open_runner().rows_together

    @property
    def image_cache_bytes(self) -> int:
        """Memory that the image cache takes now; each entry is of one prompt's pictures."""
        return self._images.bytes

    @property
    def notes(self) -> list[str]:
        """What was asked for and could not be done on this machine, a line each: CUDA graphs refused."""
        return self._open_runner().notes

    def warmup(self) -> None:
        """Run every stage once on a blank picture, so that the first answer does not pay for set-up."""
        spec = self.manifest.image
        blank = [Image.new("RGB", (spec.image_width or 64, spec.image_height or 64))] * (spec.frames or 1)
        for keep in self.manifest.visual.keep:
            self.generate(blank, "warm up", keep_tokens=keep, max_new_tokens=2)

    def close(self) -> None:
        """Free every graph; the pipeline cannot be used afterwards."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None
            self._images.clear()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(
        self,
        started: float,
        image: Images,
        prompt: str | None,
        messages: Messages | None,
        *,
        keep: int,
        max_new_tokens: int,
        sampler: Sampler,
        stop: str | Sequence[str] | None,
        skip_special_tokens: bool,
        allow_special_tokens: bool,
    ) -> Request:
        timings = Timings()
        pictures = self._pictures(image, timings)
        request = Request(
            pictures=pictures,
            prompt=self._encode(prompt, messages, len(pictures), allow_special_tokens, timings),
            keep=keep,
            max_new_tokens=_whole("max_new_tokens", max_new_tokens),
            sampler=sampler,
            stops=StopStrings(() if stop is None else stop),
            timings=timings,
            started=started,
            skip_special_tokens=skip_special_tokens,
        )
        self._check_room(request)
        return request

    def _answer(self, request: Request) -> Answer:
        return Answer(request, self.manifest, self._prompter)

    def _pictures(self, image: Images, timings: Timings) -> list[np.ndarray]:
        """pixel_values of every picture of one prompt, or of its video."""
        spec = self.manifest.image
        if spec.frames is not None:
            with timings.measure("preprocess"):
                return [preprocess(load_video(image, spec.frames), spec)]
        sources: Sequence[Any] = image if isinstance(image, list | tuple) else [image]
        if not sources:
            raise UsageError("no picture is given; give one, or a list of at least one")
        if len(sources) > 1:
            self._check_several(len(sources))
        with timings.measure("preprocess"):
            return [preprocess(load_image(source), spec) for source in sources]

    def _check_several(self, count: int) -> None:
        """Refuse several pictures where a graph was made for one."""
        if self.engine in LIBRARIES:
            raise UsageError(
                f"engines for {self.engine} are built for one picture per prompt, not {count}; choose an "
                "ort engine"
            )
        single = self.manifest.single_picture_stages
        if any(stage.keep is None for stage in single):
            raise UsageError(
                f"this bundle takes one picture per prompt, not {count}: its graphs, of family "
                f"{self.manifest.model.family}, were made for one"
            )
        if single:
            raise UsageError(
                f"method {self.manifest.method.name} chooses inside the decoder and takes one picture per "
                f"prompt, not {count}; methods at the vision and projector sites take several "
                "(vtp-export --list-methods)"
            )

    def _encode(
        self, prompt: str | None, messages: Messages | None, pictures: int, special: bool, timings: Timings
    ) -> Prompt:
        if (prompt is None) == (messages is None):
            raise UsageError("give either a prompt or messages, not both and not neither")
        with timings.measure("tokenize"):
            if prompt is not None:
                turns: Messages = self._prompter.messages_for(prompt, pictures)
            else:
                assert messages is not None  # by the check above
                turns = _with_images(messages, pictures, self.manifest.text.media)
            return self._prompter.encode(turns, pictures, special)

    def _keep(self, wanted: int | None) -> int:
        visual = self.manifest.visual
        keep = visual.default_keep if wanted is None else wanted
        if keep not in visual.keep or not _is_whole(keep):
            held = ", ".join(map(str, visual.keep))
            raise UsageError(
                f"keep_tokens {wanted!r} is not in this bundle, which holds {held}; "
                "choose one of them, or export with --keep-tokens"
            )
        return int(keep)

    def _keep_within(self, budget_ms: float, keep_tokens: int | None) -> int:
        """The largest keep-count within a time, from what vtp-calib wrote into the manifest."""
        if keep_tokens is not None:
            raise UsageError("give either keep_tokens or budget_ms, not both")
        known = self.manifest.calibration
        if known.get("engine") != self.engine:
            made = f"measured on {known['engine']}" if "engine" in known else "not calibrated"
            raise UsageError(
                f"budget_ms needs times measured on {self.engine}; this bundle is {made}; run: vtp-calib keep"
            )
        if differs := self._conditions.differs_from(known.get("conditions")):
            raise UsageError(
                f"budget_ms needs times measured under these conditions; this bundle's were not: {differs}; "
                "run: vtp-calib keep"
            )
        times = {int(keep): tried["ttft_ms"] for keep, tried in known["tried"].items()}
        within = [keep for keep, time_ms in times.items() if time_ms <= budget_ms]
        if not within:
            raise UsageError(
                f"budget_ms {budget_ms:g} is too little for every keep-count; the fastest takes "
                f"{min(times.values()):.1f} ms"
            )
        return self._keep(max(within))

    @cached_property
    def _conditions(self) -> Conditions:
        """What times measured here depend on; looked up at the first request with a budget."""
        return conditions(self.engine, self._threads)

    def _check_room(self, request: Request) -> None:
        """Refuse a prompt that leaves no room for an answer, before anything runs."""
        pictures, text = len(request.pictures), request.prompt.text_tokens
        visual = pictures * self.manifest.visual.count
        room = self.manifest.model.max_length - visual - 1
        if text > room:
            beside = f"{visual} visual tokens" + (f" of {pictures} pictures" if pictures > 1 else "")
            fewer = ", give fewer pictures" if pictures > 1 else ""
            raise VtpError(
                f"the prompt has {text} tokens; beside {beside} this bundle has room for {max(room, 0)}; "
                f"shorten it{fewer}, or export with a larger --max-length"
            )

    @contextmanager
    def _claimed(self) -> Iterator[StageRunner]:
        """The stages, for one generation alone."""
        runner = self._open_runner()
        if not self._busy.acquire(blocking=False):
            raise VtpError(
                "this pipeline is busy: it serves one generation at a time; finish or cancel the open "
                "stream, or load one Pipeline per thread"
            )
        try:
            yield runner
        finally:
            self._busy.release()

    def _open_runner(self) -> StageRunner:
        if self._runner is None:
            raise VtpError("this pipeline is closed; load the bundle again")
        return self._runner


class Stream:
    """The pieces of one answer, as they become certain. Iterate it once, then read `result`."""

    def __init__(self, pipeline: Pipeline, request: Request) -> None:
        # The generator knows the answer but not this stream, so no cycle keeps an abandoned stream alive:
        # when the last reference goes, the pipeline is free.
        self._writing = _Writing(pipeline, request)
        self._pieces = self._writing.pieces()

    @property
    def result(self) -> Result:
        """The whole answer so far; complete once the iteration ended. VtpError before the first piece."""
        if self._writing.result is None:
            raise VtpError("this stream has not started; iterate it first")
        return self._writing.result

    def cancel(self) -> None:
        """End the answer before the next token; `result` holds what there is. Safe from another thread."""
        self._writing.cancelled = True

    def close(self) -> None:
        """Give the pipeline back without finishing."""
        self._pieces.close()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)


class _Writing:
    """One answer under way, piece by piece."""

    def __init__(self, pipeline: Pipeline, request: Request) -> None:
        self.cancelled = False
        self.result: Result | None = None
        self._pipeline = pipeline
        self._request = request

    def pieces(self) -> Generator[str, None, None]:
        """Generate; a generator, since leaving it by any door frees the pipeline."""
        with self._pipeline._claimed() as runner:
            yield from self._generate(runner)

    def _generate(self, runner: StageRunner) -> Iterator[str]:
        answer = self._pipeline._answer(self._request)
        if self.cancelled:
            self.result = answer.result
            return
        logits = self._prefill(runner, answer)
        self.result = answer.result
        while True:
            if piece := answer.add(logits):
                yield piece
            if self._over(runner, answer):
                break
            logits = runner.step(self._request.keep, answer.token, answer.position)
            answer.position += 1
        if piece := answer.finish():
            yield piece

    def _prefill(self, runner: StageRunner, answer: Answer) -> np.ndarray:
        """Run the image and prompt stages; returns the first logits [V]."""
        request = self._request
        seen = self._pipeline._images.find(request.pictures)
        values = runner.prefill_rows(request.keep, request.pictures, [request.row], request.timings, seen)
        kept = values["keep_indices"].numpy() if "keep_indices" in values else None
        answer.begin(kept, int(values["next_position"].numpy()[0]))
        return values["logits"].numpy()[0, 0]

    def _over(self, runner: StageRunner, answer: Answer) -> bool:
        """Whether nothing more comes: the text is complete, its reader has enough, or there is no room."""
        if not answer.stopped:
            if self.cancelled:
                return True  # which is what the result says until it knows better
            self._pipeline._open_runner()
        return answer.ends(runner.room())


def _with_images(messages: Messages, pictures: int, media: str) -> Messages:
    """Put the pictures before the first user turn's words where no turn says where they belong.

    `media` says what messages call them: "image" or "video".
    """
    if not isinstance(messages, Sequence) or not all(isinstance(turn, dict) for turn in messages):
        return messages  # malformed: the prompter says how
    contents = [turn.get("content") for turn in messages]
    parts = [part for content in contents if isinstance(content, list | tuple) for part in content]
    if any(isinstance(part, dict) and part.get("type") == media for part in parts):
        return messages
    turns = [dict(turn) for turn in messages]
    for turn in turns:
        if turn.get("role") == "user":
            content = turn.get("content")
            words = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if isinstance(words, list | tuple):  # anything else is malformed, as above
                turn["content"] = [*({"type": media} for _ in range(pictures)), *words]
            break
    return turns


def _later(seed: int | None, place: int) -> int | None:
    """The seed of prompt number `place`; what is no seed is for the sampler to refuse."""
    return seed + place if seed is not None and _is_whole(seed) else seed


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _whole(name: str, value: int) -> int:
    if not _is_whole(value) or value < 1:
        raise UsageError(f"{name} {value!r} is not a whole number of at least 1")
    return int(value)
