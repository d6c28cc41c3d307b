"""A bundle as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval, 0.7).

    python -m lmms_eval --model vtp --model_args bundle=vis,keep_tokens=64 --tasks pope --batch_size 1

lmms-eval finds it by the entry point `lmms_eval.models`, which an installed vtp-edge has. Questions are put
one at a time; every kind of request but `generate_until` is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from vtp.calib.adapters.answering import Answerer, Part, generation_options
from vtp.engines import AUTO, UsageError

NAME = "vtp"
_ARGUMENTS = "bundle, keep_tokens, engine, threads, system"
_IGNORED = {"batch_size", "max_batch_size", "device"}  # lmms-eval hands them to every model


def manifest() -> Any:
    """What lmms-eval's registry is told of this model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, chat_class_path=f"{__name__}.Vtp")


def __getattr__(name: str) -> Any:
    """`Vtp`, the model's class: made when lmms-eval asks for it."""
    if name == "Vtp":
        return _vtp()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _vtp() -> type:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms

    class Vtp(lmms):  # type: ignore[misc, unused-ignore]
        """A bundle; see `Answerer` for the arguments."""

        is_simple = False

        def __init__(
            self,
            bundle: str,
            keep_tokens: int | None = None,
            engine: str = AUTO,
            threads: int | None = None,
            system: str = "",
            **more: Any,
        ) -> None:
            super().__init__()
            unknown = sorted(set(more) - _IGNORED)
            if unknown:
                raise UsageError(f"model_args {unknown[0]} is not known; choose of {_ARGUMENTS}")
            self._answerer = Answerer(str(bundle), keep_tokens, engine, threads, system)

        def generate_until(self, requests: Any) -> list[Any]:
            return [self._one(*request.args) for request in requests]

        def _one(
            self, context: str, to_messages: Any, wanted: dict[str, Any], doc: Any, task: str, split: str
        ) -> Any:
            messages = to_messages(self.task_dict[task][split][doc])
            result = self._answerer.answer(parts_of(messages), **generation_options(wanted))
            self.cache_hook.add_partial("generate_until", (context, wanted), result.text)
            read = result.prompt_tokens + result.visual_tokens.after
            counts = TokenCounts(input_tokens=read, output_tokens=len(result.token_ids))
            return GenerationResult(text=result.text, token_counts=counts)

        def generate_until_multi_round(self, requests: Any) -> list[str]:
            raise NotImplementedError(
                "a bundle of vtp answers generate_until tasks, not those of several rounds"
            )

        def loglikelihood(self, requests: Any) -> list[Any]:
            raise NotImplementedError("a bundle of vtp answers generate_until tasks, not loglikelihood ones")

        def clean(self) -> None:
            self._answerer.pipe.close()
            super().clean()

    return Vtp


def parts_of(messages: Iterable[Any]) -> Iterator[Part]:
    """The parts of lmms-eval's chat messages; of a picture, what stands under "url"."""
    for message in messages:
        for content in message["content"]:
            value = content.get("text") if content["type"] == "text" else content.get("url")
            yield Part(content["type"], value, message["role"])
