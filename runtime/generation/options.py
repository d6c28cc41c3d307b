"""How one answer, or a batch of answers, is generated: the keyword arguments of `Pipeline.generate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, TypedDict, TypeVar, cast

from vtp.engines.errors import nearest, quoted_argument
from vtp.runtime.generation.arguments import is_whole
from vtp.runtime.generation.sampling import Sampler

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class GenerateOptions:
    """What a caller chose; each value is checked when a request is made of it.

    max_new_tokens  generate at most this number of tokens
    keep_tokens     one of the bundle's keep-counts; None: its default
    budget_ms       instead: the largest keep-count whose time to first token, as vtp-calib measured it here,
                    is within this number of milliseconds
    temperature     0 is greedy; otherwise sample, from the `top_p` nucleus, repeatable with `seed`
    repetition_penalty  above 1 makes tokens of the prompt and the answer so far less likely, as in
                    transformers; None: the model's own (see `Manifest.generation`), 1: off
    stop            strings that end the answer and are not part of it
    skip_special_tokens   False: special tokens that the model writes, such as boxes or document tags, stay
                    in the answer's text; the token that ends it never does
    allow_special_tokens  True: the texts may hold the model's special tokens, which then mean what they mean
                    in transformers' prompts; refused otherwise. The picture's own token is always refused
    response_format  hold the answer to a form, token by token: {"type": "json_object"}, {"type":
                    "json_schema", "json_schema": {"schema": …}}, or a JSON schema itself; None: any text.
                    Needs llguidance (extra [serve]). The answer is then JSON of that form, unless its
                    finish_reason or a stop string says that it was cut short
    logprobs        also return how likely each token was, with this number of alternatives at its place: 0
                    (none) to 20; None: off (see `vtp.runtime.generation.logprobs`)
    timeout_ms      end the answer this number of milliseconds after the call, with the text so far and
                    finish_reason "timeout"; checked before each stage and each token, so that a stage that
                    has begun ends first
    color           the order of channels in pictures given as arrays or tensors: "rgb" (or RGBA), or "bgr"
                    (BGRA), as OpenCV's frames have it; files and PIL images say theirs themselves
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    keep_tokens: int | None = None
    budget_ms: float | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float | None = None
    stop: str | Sequence[str] | None = None
    skip_special_tokens: bool = True
    allow_special_tokens: bool = False
    timeout_ms: float | None = None
    logprobs: int | None = None
    response_format: Mapping[str, Any] | str | None = None
    color: str = "rgb"

    def for_prompt(self, place: int) -> GenerateOptions:
        """The options of prompt number `place` of a batch, which samples with its own seed."""
        if self.seed is None or not is_whole(self.seed):  # an invalid seed is the sampler's to refuse
            return self
        return replace(self, seed=int(self.seed) + place)

    def sampler(self) -> Sampler:
        """Chooses the tokens; UsageError for a bad temperature, top_p or seed."""
        return Sampler(temperature=self.temperature, top_p=self.top_p, seed=self.seed)


class OptionKeywords(TypedDict, total=False):
    """The fields of `GenerateOptions` as keyword arguments, for type checkers and editors."""

    max_new_tokens: int
    keep_tokens: int | None
    budget_ms: float | None
    temperature: float
    top_p: float
    seed: int | None
    repetition_penalty: float | None
    stop: str | Sequence[str] | None
    skip_special_tokens: bool
    allow_special_tokens: bool
    timeout_ms: float | None
    logprobs: int | None
    response_format: Mapping[str, Any] | str | None
    color: str


_Method = TypeVar("_Method", bound=Callable[..., Any])


def takes_options(method: _Method) -> _Method:
    """Show the fields of `GenerateOptions` in the signature of a method that takes them as **options.

    A keyword that is neither one of them nor the method's own is a TypeError of the method's name.
    """
    own = inspect.signature(method)
    named = [one for one in own.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [
        inspect.Parameter(
            item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=item.type
        )
        for item in fields(GenerateOptions)
    ]
    known = [one.name for one in (*named, *added)][1:]  # without self

    @wraps(method)
    def called(*args: Any, **keywords: Any) -> Any:
        if unknown := next((name for name in keywords if name not in known), None):
            raise TypeError(
                f"{method.__qualname__}() got an unexpected keyword argument {quoted_argument(unknown)}"
                f"{nearest(unknown, known)}"
            )
        return method(*args, **keywords)

    called.__signature__ = own.replace(parameters=[*named, *added])  # type: ignore[attr-defined]
    return cast(_Method, called)
