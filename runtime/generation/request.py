"""One prompt about its pictures, checked: what can be refused without running anything is refused here."""

from __future__ import annotations

from dataclasses import dataclass

from vtp.engines import UsageError, capabilities
from vtp.engines.errors import RequestError, quoted_argument
from vtp.runtime.bundle.manifest import GenerationInfo, Manifest
from vtp.runtime.constrained.constraint import Constraint
from vtp.runtime.constrained.formats import Formats
from vtp.runtime.generation.arguments import flag, whole
from vtp.runtime.generation.logits_rules import with_penalty
from vtp.runtime.generation.logprobs import alternatives
from vtp.runtime.generation.options import GenerateOptions
from vtp.runtime.generation.sampling import Sampler
from vtp.runtime.generation.stopping import Clock, StopSignal
from vtp.runtime.media.cut_off import CutOffWarner
from vtp.runtime.media.given import Encoded, encoded_pictures
from vtp.runtime.media.images import COLORS
from vtp.runtime.media.pictures import Images, Pictures
from vtp.runtime.prompt.messages import Messages, with_media
from vtp.runtime.prompt.prompter import Prompt, Prompter, PromptTooLong, StopStrings
from vtp.runtime.result import Timings
from vtp.runtime.stages.runner import Row


@dataclass(frozen=True)
class Request:
    """Everything one generation needs, checked; `pictures` are loaded before it begins."""

    pictures: Pictures
    prompt: Prompt
    keep: int
    max_new_tokens: int
    sampler: Sampler
    generation: GenerationInfo
    stops: StopStrings
    timings: Timings
    clock: Clock
    stop_signal: StopSignal
    skip_special_tokens: bool = True
    logprobs: int | None = None
    constraint: Constraint | None = None

    def load(self) -> None:
        """Decode the pictures, if there is time left to answer about them."""
        if self.stop_signal.reason is None:
            self.pictures.load(self.timings)

    @property
    def row(self) -> Row:
        """The prompt as the stages take it."""
        return Row(self.prompt.ids, self.prompt.image_starts)


class RequestMaker:
    """Makes the requests of one bundle, on one engine; `formats` knows the forms that answers may have."""

    def __init__(self, manifest: Manifest, prompter: Prompter, engine: str) -> None:
        self._manifest = manifest
        self._prompter = prompter
        self._engine = engine
        self._cut_off = CutOffWarner(manifest.image)
        self.formats = Formats(prompter)

    def make(
        self,
        image: Images | Encoded | Pictures,
        prompt: str | Prompt | None,
        messages: Messages | None,
        options: GenerateOptions,
        keep: int,
        clock: Clock,
        stop_signal: StopSignal,
    ) -> Request:
        """Everything but the pixels, checked; errors that show without them come before any is decoded.

        image   also what was made of the pictures elsewhere, or pictures that are ready
        prompt  also one that is tokenized
        """
        timings, sampler = Timings(), options.sampler()
        skip = flag("skip_special_tokens", options.skip_special_tokens)
        special = flag("allow_special_tokens", options.allow_special_tokens)
        pictures = self._pictures(image, keep, options.color, timings)
        request = Request(
            pictures=pictures,
            prompt=self._encode(prompt, messages, len(pictures), special, timings),
            keep=keep,
            max_new_tokens=whole("max_new_tokens", options.max_new_tokens),
            sampler=sampler,
            generation=with_penalty(self._manifest.generation, options.repetition_penalty),
            stops=StopStrings(() if options.stop is None else options.stop),
            timings=timings,
            clock=clock,
            stop_signal=stop_signal,
            skip_special_tokens=skip,
            logprobs=alternatives(options.logprobs),
            constraint=self.formats.constraint(options.response_format),
        )
        self._check_room(request)
        return request

    def _pictures(
        self, image: Images | Encoded | Pictures, keep: int, color: str, timings: Timings
    ) -> Pictures:
        """The pictures of one prompt, or its video, checked and not yet decoded."""
        if color not in COLORS:
            raise UsageError(f"color {quoted_argument(color)} is not known; choose {' or '.join(COLORS)}")
        if isinstance(image, Encoded):
            pictures: Pictures = encoded_pictures(image, self._manifest, keep)
        elif isinstance(image, Pictures):
            pictures = image
        else:
            pictures = Pictures(image, self._manifest.image, color, self._cut_off.see)
        if len(pictures) > 1:
            self._check_several(len(pictures))
        pictures.check(timings)
        return pictures

    def _check_several(self, count: int) -> None:
        """Refuse several pictures where a graph was made for one."""
        if capabilities(self._engine).largest_batch == 1:
            raise UsageError(
                f"engines for {self._engine} are built for one picture per prompt, not {count}; choose an "
                "ort engine"
            )
        single = self._manifest.single_picture_stages
        if any(stage.keep is None for stage in single):
            raise UsageError(
                f"this bundle takes one picture per prompt, not {count}: its graphs, of family "
                f"{self._manifest.model.family}, were made for one"
            )
        if single:
            raise UsageError(
                f"method {self._manifest.method.name} chooses inside the decoder and takes one picture per "
                f"prompt, not {count}; methods at the vision and projector sites take several "
                "(vtp-export --list-methods)"
            )

    def _encode(
        self,
        prompt: str | Prompt | None,
        messages: Messages | None,
        pictures: int,
        special: bool,
        timings: Timings,
    ) -> Prompt:
        if (prompt is None) == (messages is None):
            raise UsageError("give either a prompt or messages, not both and not neither")
        if isinstance(prompt, Prompt):
            self._check_ids(prompt)
            return prompt
        with timings.measure("tokenize"):
            if prompt is not None:
                turns: Messages = self._prompter.messages_for(prompt, pictures)
            else:
                assert messages is not None  # by the check above
                text, most = self._manifest.text, self._manifest.model.max_length
                turns = with_media(messages, pictures, text.media, most)
            encoded = self._prompter.encode(turns, pictures, special)
        self._check_ids(encoded)
        return encoded

    def _check_ids(self, prompt: Prompt) -> None:
        """Refuse tokens that the model does not have; the image token's own place is never looked up."""
        rows, image = self._manifest.model.vocab_size, self._manifest.text.image_token_id
        if outside := next((one for one in prompt.ids if one >= rows and one != image), None):
            token = self._prompter.tokenizer.id_to_token(outside)
            raise RequestError(
                f"the prompt holds the token {token!r:.60} of id {outside}, and this model's embedding table "
                f"has {rows} rows; leave it out"
            )

    def _places(self, pictures: int) -> int:
        """Tokens that a prompt and its answer may have, visual ones before pruning among them.

        Parts of the decoder after a pruner have room for fewer: that is felt without a picture only.
        """
        longest = self._manifest.model.max_length
        if pictures:
            return longest
        caches = [graph.kv.capacity for graph in self._manifest.graphs.values() if graph.kv]
        return min(caches, default=longest)

    def _check_room(self, request: Request) -> None:
        """Refuse a prompt that leaves no room for an answer, before anything runs."""
        pictures, text = len(request.pictures), request.prompt.text_tokens
        visual = pictures * self._manifest.visual.count
        room = self._places(pictures) - visual - 1
        if text > room:
            beside = f"beside {visual} visual tokens" + (f" of {pictures} pictures" if pictures > 1 else "")
            beside = beside if pictures else "without a picture"
            fewer = ", give fewer pictures" if pictures > 1 else ""
            raise PromptTooLong(
                f"the prompt has {text} tokens; {beside} this bundle has room for {max(room, 0)}; "
                f"shorten it{fewer}, or export with a larger --max-length"
            )
