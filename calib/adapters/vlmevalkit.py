"""A bundle as a model of VLMEvalKit (https://github.com/open-compass/VLMEvalKit).

From a checkout of it, with its own flags behind the bundle:

    python -m vtp.calib.adapters.vlmevalkit BUNDLE[:K] --data TextVQA_VAL --work-dir out

or in a program: `register("vis-64", "path/to/vis:64")`, after which "vis-64" is one of `supported_VLM`.
VLMEvalKit has no plugins, so a model is known in the process that registered it.
"""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from vtp.calib.adapters.answering import NEW_TOKENS, Answerer, Part, generation_options, split_keep
from vtp.engines import AUTO, UsageError
from vtp.runtime.commands.console import DONE, run_command, say

PROG = "vtp.calib.adapters.vlmevalkit"
_USAGE = f"usage: python -m {PROG} BUNDLE[:K] --data SET ..., from a checkout of VLMEvalKit"


def __getattr__(name: str) -> Any:
    """`Vtp`, the model's class: made when it is asked for."""
    if name == "Vtp":
        return _vtp()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register(name: str, bundle: str, **options: Any) -> None:
    """Make a bundle one of VLMEvalKit's models in this process. `options`: see `Vtp`."""
    from vlmeval.config import supported_VLM

    supported_VLM[name] = partial(_vtp(), bundle, **options)


@cache
def _vtp() -> type:
    from vlmeval.vlm.base import BaseModel

    class Vtp(BaseModel):  # type: ignore[misc, unused-ignore]
        """A bundle. Pictures and text may stand in any order; the prompts are VLMEvalKit's own."""

        INSTALL_REQ = False
        INTERLEAVE = True
        allowed_types = ["text", "image"]  # noqa: RUF012  (as in the base class)

        def __init__(
            self,
            bundle: str,
            keep_tokens: int | None = None,
            engine: str = AUTO,
            threads: int | None = None,
            system: str = "",
            max_new_tokens: int = NEW_TOKENS,
            **wanted: Any,
        ) -> None:
            super().__init__()
            self._options = generation_options({"max_new_tokens": max_new_tokens, **wanted})
            self._answerer = Answerer(bundle, keep_tokens, engine, threads, system)

        def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
            return self._answerer.answer(parts_of(message), **self._options).text

    return Vtp


def parts_of(message: Iterable[Mapping[str, Any]]) -> Iterator[Part]:
    """The parts of a message of VLMEvalKit: type, value and, sometimes, role."""
    for item in message:
        yield Part(item["type"], item["value"], item.get("role", "user"))


def main(argv: Sequence[str] | None = None) -> int:
    """Register a bundle and run VLMEvalKit's own command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]):
        say(
            f"{_USAGE}\n\nWhat stands behind the bundle goes to VLMEvalKit's run.py; "
            "for its flags: python run.py --help"
        )
        return DONE
    return run_command(PROG, lambda: _run(words), "--debug" in words)


def _run(words: Sequence[str]) -> None:
    if not words or words[0].startswith("-"):
        raise UsageError(f"no bundle; {_USAGE}")
    bundle, rest = words[0], [word for word in words[1:] if word != "--debug"]
    name = model_name(bundle)
    try:
        register(name, bundle)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed, and VLMEvalKit needs it: pip install -e . in its checkout"
        ) from error
    sys.argv = ["run.py", *rest, "--model", name]
    script = Path("run.py")
    if script.is_file():
        runpy.run_path(str(script), run_name="__main__")
    else:
        runpy.run_module("vlmeval.run", run_name="__main__")


def model_name(bundle: str) -> str:
    """What VLMEvalKit calls a bundle, also in the names of its files: "vis-64" for path/to/vis:64."""
    folder, keep = split_keep(bundle)
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", Path(folder).name).strip("-.") or "bundle"
    return plain if keep is None else f"{plain}-{keep}"


if __name__ == "__main__":
    sys.exit(main())
