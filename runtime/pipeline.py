"""The pipeline: a picture and a prompt in, text out, over whatever stages a bundle lists."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from PIL import Image

from vtp.engines import AUTO, Choice, VtpError
from vtp.engines.disk.whole import undisturbed
from vtp.engines.errors import quoted
from vtp.runtime.bundle.fit import check_fits, switched_off
from vtp.runtime.bundle.folder import Bundle, open_bundle
from vtp.runtime.decisions.answer import DecisionAnswer, decide
from vtp.runtime.decisions.decision import Decision, checked_heat
from vtp.runtime.decisions.question import Question
from vtp.runtime.engine_choice import StageEngines, choose_engines
from vtp.runtime.generation.answer import Answer
from vtp.runtime.generation.arguments import flag, prompts_kept, thread_count, whole
from vtp.runtime.generation.batch import check_lists, each_prompt, write_in_batches
from vtp.runtime.generation.keep_count import choose_keep, measured_times
from vtp.runtime.generation.loop import write
from vtp.runtime.generation.options import DEFAULT_NEW_TOKENS, GenerateOptions, OptionKeywords, takes_options
from vtp.runtime.generation.request import Request, RequestMaker
from vtp.runtime.generation.stopping import Clock, StopSignal
from vtp.runtime.generation.stream import Stream
from vtp.runtime.generation.turn import Turn, seconds_to_wait
from vtp.runtime.hub.bundles import local_bundle
from vtp.runtime.machine.conditions import Conditions, conditions
from vtp.runtime.machine.room import memory_room
from vtp.runtime.media.given import instead_of
from vtp.runtime.media.pictures import Images
from vtp.runtime.opening import Opening
from vtp.runtime.prompt.messages import Messages
from vtp.runtime.prompt.prompter import Prompter
from vtp.runtime.result import Result
from vtp.runtime.stages.prefix_cache import Prefix, check_prefix
from vtp.runtime.stages.runner import StageRunner
from vtp.runtime.stages.vision_feature_cache import VisionFeatureCache

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's own from Python 3.11 on

__all__ = ["DEFAULT_NEW_TOKENS", "Images", "Messages", "Pipeline", "Stream"]

_NO_MEMORY = "there is not enough memory to load this bundle; vtp-doctor says what it needs at least"


class Pipeline:
    """Answers prompts about pictures from one bundle.

    One Pipeline serves one thread and one generation at a time: a second call while one runs (or while a
    stream is open) raises `Busy`, at once or after `wait=` seconds. Use one Pipeline per thread. A context
    manager; `close()` frees the graphs.
    """

    def __init__(
        self,
        bundle: Bundle,
        choice: Choice | StageEngines,
        threads: int | None = None,
        vision_feature_cache: int = 0,
        prefix_caching: bool = False,
        opening: Opening | None = None,
    ) -> None:
        """Open every graph of a verified bundle; most users call `Pipeline.load`."""
        if prefix_caching:
            check_prefix(bundle)
        self.bundle = bundle
        self.manifest = bundle.manifest
        chosen = choice if isinstance(choice, StageEngines) else StageEngines(choice)
        self.engine, self.decisions = chosen.choice.engine, chosen.choice.decisions
        self.engines = chosen.by_stage(self.manifest)
        self._chosen = chosen
        self._prompter = Prompter(
            self.manifest.text, bundle.path("tokenizer.json"), self.manifest.model.max_length
        )
        self._prompter.check()
        self._requests = RequestMaker(self.manifest, self._prompter, self.engine)
        self._features = VisionFeatureCache(vision_feature_cache) if vision_feature_cache else None
        prefix = Prefix() if prefix_caching else None
        self._runner: StageRunner | None = StageRunner(
            bundle, self.engine, threads, chosen.opening(opening), prefix, self._features
        )
        self._turn = Turn()
        self._threads = threads

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        engine: str = AUTO,
        threads: int | None = None,
        check_hashes: bool = False,
        vision_feature_cache: int = 0,
        prefix_caching: bool = False,
        opening: Opening | None = None,
        *,
        check_memory: bool = True,
        revision: str | None = None,
        stream_reuse: bool = False,
        image_cache: int = 0,
        reuse_prompt: bool = False,
    ) -> Pipeline:
        """Open a bundle folder, or one of the Hugging Face hub.

        bundle        a folder; or, with huggingface_hub, "org/name", "org/name@revision" or "hf://org/name":
                      fetched into the hub's cache unless it is there, and held against its manifest's
                      sha256. A folder of that name wins. `bundle.origin` says which commit was opened
        engine        "auto" (the best that can run here), or one by name, such as "ort-cpu"; after it, each
                      behind a comma, stages that another engine runs:
                      "ort-cpu,vision_encoder=openvino-cpu". `engines` says who runs what
        threads       CPU threads of one operator; None: all cores
        check_hashes  also compare every file's sha256 with the manifest (reads all weights)
        vision_feature_cache  keep what the image stages gave for the pictures of the last N prompts, for a
                      next prompt about any of them: see `vision_feature_cache_bytes`
        prefix_caching  read a prompt on from what it shares with the one before (and its answer): a picture
                      and the turns of a conversation are then read once
        opening       where TensorRT's engines lie, and what CUDA may do (see `Opening`)
        check_memory  refuse a bundle that takes more than is left here; VTP_CHECK_MEMORY=0 turns it off too
        revision      branch, tag or commit of a bundle of the hub; None: main
        stream_reuse  take pictures for a camera's, one after the other: a bundle made with `--tower stc` or
                      `--method change` makes use of those before
        image_cache, reuse_prompt  the earlier names of `vision_feature_cache` and `prefix_caching`

        Caches change timings, and the last bits of logits (the vision feature cache if several pictures would
        run together), and stream_reuse changes answers: all are off unless asked for.

        Raises VtpError for a bundle that is damaged or cannot run here, UsageError for a bad argument.
        """
        threads = thread_count(threads)
        caches = {"vision_feature_cache": vision_feature_cache, "image_cache": image_cache}
        most = max(prompts_kept(name, value) for name, value in caches.items())
        hashed = flag("check_hashes", check_hashes)
        checked = flag("check_memory", check_memory) and not switched_off()
        caching, earlier = flag("prefix_caching", prefix_caching), flag("reuse_prompt", reuse_prompt)
        given, reuse = opening or Opening(), flag("stream_reuse", stream_reuse)
        how = replace(given, stream_reuse=reuse or given.stream_reuse)

        def load(folder: Path) -> Pipeline:
            opened = open_bundle(folder, hashed)
            choice = choose_engines(opened, engine, threads=threads)
            if checked:
                check_fits(opened, choice.choice.engine, memory_room(), how.skipped)
            try:
                return cls(opened, choice, threads, most, caching or earlier, how)
            except MemoryError as error:
                raise VtpError(_NO_MEMORY) from error

        # One bundle, even while another takes its place.
        return undisturbed(load)(local_bundle(bundle, revision))

    @takes_options
    def generate(
        self,
        image: Images | None = None,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        image_features: Any = None,
        image_embeds: Any = None,
        wait: bool | float = False,
        **options: Unpack[OptionKeywords],
    ) -> Result:
        """Answer a prompt about a picture, or about several; with a bundle made for videos, about one.

        image           path, bytes, PIL image, uint8 array [H,W,3] or torch tensor; or a list of such. A
                        video is a list of frames, a uint8 array [frames,H,W,3], a folder of pictures or a
                        file (see `vtp.runtime.media.videos`); of more frames than needed, a sample is used.
                        NO_PICTURE: the prompt has none
        prompt          the user's words; or
        messages        several turns, as chat templates take them: {"role": ..., "content": str or a list of
                        {"type": "image"} (or "video") and {"type": "text", "text": ...}}; without an image
                        entry the pictures join the first user turn
        image_features, image_embeds  instead of `image`, what an encoder elsewhere made of it: the tensor
                        of that name, as the vision encoder's graph or the projector's gives it (an array
                        [pictures,rows,width], or [rows,width] of one). image_features are all N rows before
                        any pruning; image_embeds are in the decoder's width: K rows where the method prunes
                        before the projector, else N. If the method needs more there (attention scores), a
                        dict of tensors by name; a refusal names them and their shapes
        wait            while the pipeline answers another thread: seconds to wait for its turn, True for as
                        long as it takes; `timeout_ms` counts meanwhile, and bounds it
        options         see `GenerateOptions`: max_new_tokens, keep_tokens or budget_ms, temperature, top_p,
                        seed, repetition_penalty, stop, skip_special_tokens, allow_special_tokens, timeout_ms,
                        logprobs, response_format, color ("bgr": arrays of OpenCV)

        Raises UsageError for a bad argument, VtpError for a picture or prompt that cannot be served, and
        `Busy` while the pipeline answers somebody else.
        """
        given = {"image_features": image_features, "image_embeds": image_embeds}
        stream = self.stream(image, prompt, messages=messages, wait=wait, **given, **options)
        for _ in stream:
            pass
        return stream.result

    @takes_options
    def stream(
        self,
        image: Images | None = None,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        image_features: Any = None,
        image_embeds: Any = None,
        wait: bool | float = False,
        **options: Unpack[OptionKeywords],
    ) -> Stream:
        """Like `generate`, piece by piece: iterate for text, then read `.result`; `.cancel()` ends it.

        The time between this call and the first `next()` is counted neither in timings nor in `timeout_ms`.
        """
        pictures = instead_of(image, image_features, image_embeds)
        asked = GenerateOptions(**options)
        answer = self.prepare(pictures, prompt, messages, asked)
        seconds = seconds_to_wait(wait, asked.timeout_ms)
        answer.request.pictures.load(answer.request.timings)
        answer.request.clock.pause()
        return Stream(answer, self._write(answer, seconds))

    def prepare_format(self, options: GenerateOptions) -> None:
        """Compile the form that answers are to have, as far as it is not known; safe from any thread.

        It may take seconds, which `prepare` then does not. Raises UsageError for one that is not served.
        """
        self._requests.formats.constraint(options.response_format)

    def prepare(
        self, image: Images, prompt: str | None, messages: Messages | None, options: GenerateOptions
    ) -> Answer:
        """A checked request, whose clock runs, and the answer that it will get: nothing is decoded or run.

        For what runs requests itself, such as a `Scheduler`. Raises as `generate` does.
        """
        return self._answer(self._request(image, prompt, messages, options))

    def decide(
        self,
        image: Images,
        question: str,
        options: Sequence[str] | Mapping[str, str] | None = None,
        *,
        kind: str | None = None,
        labels: str = "letters",
        temperature: float = 1.0,
        keep_tokens: int | None = None,
        budget_ms: float | None = None,
        allow_special_tokens: bool = False,
        timeout_ms: float | None = None,
        color: str = "rgb",
        wait: bool | float = False,
    ) -> Decision:
        """How likely each of a few answers is, from one prefill: no token is generated.

        question    what is asked about the picture
        options     the answers: 2 to 26 texts, or {text: what it means}. Without them, yes or no
        kind        "choice" or "yes_no" (what `options` says), or "score": `options` are then 2 to 10 levels,
                    from the lowest to the highest
        labels      "letters": the prompt lists the answers, and the model is to name one by its letter (of a
                    score by its number). "texts": the prompt is the question alone, and the answers' own
                    first tokens are compared, which must differ
        temperature of the answers among each other; 1: the model's own probabilities
        keep_tokens, budget_ms, allow_special_tokens, timeout_ms, color, wait  as in `generate`

        The model's rules about logits (penalties, bans) are not applied. Raises as `generate` does, and
        VtpError if the time is over before it is decided.
        """
        answer = self.prepare_decision(
            image,
            Question.of(question, options, kind, labels),
            GenerateOptions(
                max_new_tokens=1,
                keep_tokens=keep_tokens,
                budget_ms=budget_ms,
                allow_special_tokens=allow_special_tokens,
                timeout_ms=timeout_ms,
                color=color,
            ),
            temperature,
        )
        with self.claimed(seconds_to_wait(wait, timeout_ms)) as runner:
            return decide(runner, answer)

    def prepare_decision(
        self, image: Images, question: Question, options: GenerateOptions, temperature: float = 1.0
    ) -> DecisionAnswer:
        """The same for a question as `prepare` for a prompt."""
        heat = checked_heat(temperature)
        request = self._request(image, question.prompt, None, options)
        return DecisionAnswer(request, self.manifest, self._prompter, question, heat)

    @takes_options
    def generate_batch(
        self,
        images: Sequence[Images],
        prompts: Sequence[str] | None = None,
        *,
        messages: Sequence[Messages] | None = None,
        batch_size: int | None = None,
        wait: bool | float = False,
        **options: Unpack[OptionKeywords],
    ) -> list[Result]:
        """Answer several prompts, each about its own picture (or list of pictures), in batches.

        Prompts may differ in length, and each answer ends where it would alone: greedy answers are those of
        `generate`. The keyword arguments are `generate`'s, for all prompts, but for

        messages    a conversation for each entry of `images`, instead of `prompts`
        seed        prompt number i, from 0, samples with seed + i
        batch_size  most pictures that go through the graphs together; None: as many as the bundle was made
                    for. Prompts with equal numbers of pictures run together.
        timeout_ms  of the whole call: answers that have not ended by then end so, those of batches that have
                    not begun without any text

        The timings of a result's stages are those of its batch. Raises as `generate` does, and says which
        prompt it is about: for all prompts before any is answered, but for pictures whose file begins well
        and turns out damaged when it is decoded, batch by batch.
        """
        asked, clock = GenerateOptions(**options), Clock()
        count = check_lists(images, prompts, messages)
        stop_signal = StopSignal(clock, asked.timeout_ms)
        seconds = seconds_to_wait(wait, asked.timeout_ms)
        most = self.batch_size
        together = most if batch_size is None else min(most, whole("batch_size", batch_size))
        keep = self._keep(asked)
        requests = each_prompt(
            count,
            lambda place: self._requests.make(
                images[place],
                prompts[place] if prompts is not None else None,
                messages[place] if messages is not None else None,
                asked.for_prompt(place),
                keep,
                clock,
                stop_signal,
            ),
        )
        answers = [self._answer(request) for request in requests]
        with self.claimed(seconds) as runner:
            write_in_batches(runner, keep, answers, together)
        return [answer.result for answer in answers]

    @property
    def keep_counts(self) -> tuple[int, ...]:
        """What `keep_tokens` may be, ascending; `manifest.visual.default_keep` is taken without it."""
        return tuple(sorted(self.manifest.visual.keep))

    @property
    def batch_size(self) -> int:
        """Most pictures whose prompts go through the bundle's graphs together."""
        return self._open_runner().rows_together

    @property
    def vision_feature_cache_bytes(self) -> int:
        """Memory that the vision feature cache takes now, with the pictures of the last prompts."""
        return self._features.bytes if self._features else 0

    @property
    def image_cache_bytes(self) -> int:
        """The earlier name of `vision_feature_cache_bytes`."""
        return self.vision_feature_cache_bytes

    @property
    def notes(self) -> list[str]:
        """What is not as asked, a line each: CUDA graphs refused, stages that another engine has to run."""
        return [*self._chosen.notes, *self._open_runner().notes]

    def warmup(self) -> None:
        """Run every stage once on a blank picture, so that the first answer does not pay for set-up."""
        spec = self.manifest.image
        height, width = spec.image_size or (64, 64)
        blank = [Image.new("RGB", (width, height))] * (spec.frames or 1)
        for keep in self.manifest.visual.keep:
            self.generate(blank, "warm up", keep_tokens=keep, max_new_tokens=2)
        self._open_runner().images.forget()

    def close(self) -> None:
        """Free every graph; the pipeline cannot be used afterwards."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None
            if self._features:
                self._features.clear()

    def __repr__(self) -> str:
        visual, keeps = self.manifest.visual, ", ".join(map(str, self.keep_counts))
        runs = f"on {self._chosen.label}" if self._runner else "closed"
        tokens = f"{visual.count} → {visual.default_keep} visual tokens (keep_counts {keeps})"
        return f"<Pipeline {quoted(str(self.bundle.folder))} {runs}: {self.manifest.method.name}, {tokens}>"

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        """Refuse copies and pickles: graphs and locks belong to one process."""
        raise VtpError(
            "a Pipeline cannot be pickled or copied, since its graphs belong to this process; load the "
            f"bundle again, in the other process: Pipeline.load({quoted(self.bundle.given)})"
        )

    def _request(
        self, image: Images, prompt: str | None, messages: Messages | None, options: GenerateOptions
    ) -> Request:
        keep, clock = self._keep(options), Clock()
        stop_signal = StopSignal(clock, options.timeout_ms)
        return self._requests.make(image, prompt, messages, options, keep, clock, stop_signal)

    def _answer(self, request: Request) -> Answer:
        return Answer(request, self.manifest, self._prompter)

    def _write(self, answer: Answer, seconds: float) -> Generator[str, None, None]:
        """The pieces of an answer; leaving the generator by any door frees the pipeline."""
        answer.request.clock.go_on()
        with self.claimed(seconds) as runner:
            yield from write(runner, answer)

    def measured_times(self, what: str = "this") -> dict[int, float]:
        """Keep-count -> milliseconds to the first token, as vtp-calib measured them here.

        what  names the option that needs them. Raises UsageError where there are none that hold here
        """
        return measured_times(what, self.manifest, self._chosen.label, lambda: self._conditions)

    def _keep(self, options: GenerateOptions) -> int:
        return choose_keep(options, self.manifest, self._chosen.label, lambda: self._conditions)

    @cached_property
    def _conditions(self) -> Conditions:
        """What times measured here depend on; looked up at the first request with a budget."""
        return conditions(self._chosen.label, self._threads)

    @contextmanager
    def claimed(self, seconds: float = 0) -> Iterator[StageRunner]:
        """The stages, for one generation (or one scheduler) alone; `Busy` unless free within `seconds`."""
        self._open_runner()
        with self._turn.taken(seconds):
            yield self._open_runner()  # it may have been closed meanwhile

    def _open_runner(self) -> StageRunner:
        if self._runner is None:
            raise VtpError("this pipeline is closed; load the bundle again")
        return self._runner
