"""From what a caller asks (`response_format`) to the constraint of one answer; grammars are compiled once."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from vtp.engines import VtpError
from vtp.engines.errors import quoted_argument
from vtp.runtime.constrained.bounds import check_schema
from vtp.runtime.constrained.constraint import Constraint
from vtp.runtime.constrained.errors import FormatBusy, FormatError, refused
from vtp.runtime.constrained.reasons import explained
from vtp.runtime.constrained.vocabulary import check_installed, make_vocabulary
from vtp.runtime.prompt.panics import without_panic_lines
from vtp.runtime.prompt.prompter import Prompter
from vtp.runtime.prompt.tokenizer import failing_as

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["Formats", "schema_of"]

_REMEMBERED = 8  # grammars
_SECONDS = 5.0  # that compiling one may take
_TYPES = ("text", "json_object", "json_schema")
_LIMITS = {
    "initial_lexer_fuel": 400_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# Between values: a space, or a new line and some indentation, so that no model fills its answer with blanks.
# Letters of escapes in strings: without \u, whose pairs would count as two characters.
_JSON = {"whitespace_pattern": r"(\n {0,8}| )", "json_allowed_escapes": 'nrbtf"\\'}


def schema_of(wanted: object) -> str | None:
    """The JSON schema, as checked text, of a `response_format`: None for text.

    wanted  None; {"type": "text"}; {"type": "json_object"}, or "json" as Ollama says it; {"type":
            "json_schema", "json_schema": {"schema": …}} as OpenAI does; or a JSON schema itself

    Raises FormatError.
    """
    if wanted is None:
        return None
    if wanted == "json":
        return check_schema({"type": "object"})
    if not isinstance(wanted, Mapping):
        raise refused(
            f"{quoted_argument(wanted)} is not known; give an object: its type is one of "
            f"{', '.join(_TYPES)}, or it is a JSON schema"
        )
    kind = wanted.get("type")
    if kind == "json_schema":
        return check_schema(_nested(wanted))
    if kind == "json_object":
        return check_schema({"type": "object"})
    return None if kind == "text" else check_schema(wanted)


def _nested(wanted: Mapping[str, Any]) -> object:
    named = wanted.get("json_schema")
    if not isinstance(named, Mapping) or "schema" not in named:
        raise refused('type json_schema lacks {"json_schema": {"schema": …}}')
    return named["schema"]


class Formats:
    """The forms that answers of one bundle may have. Safe from any thread."""

    def __init__(self, prompter: Prompter) -> None:
        self._prompter = prompter
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()  # of the vocabulary and the remembered grammars
        self._compiling = threading.Lock()  # one at a time: slow ones hold up only each other

    def constraint(self, wanted: object) -> Constraint | None:
        """The constraint of a new answer; None: any text. Compiles what is not remembered, so it may take
        seconds. FormatError for a schema that is not served, FormatBusy if it waits too long for others', and
        VtpError where llguidance is not installed."""
        schema = schema_of(wanted)
        if schema is None:
            return None
        check_installed()
        with self._lock:
            matcher = self._compiled.get(schema)
        if matcher is None:
            matcher = self._remember(schema, self._compile(schema))
        return Constraint(matcher.deep_copy())

    def _remember(self, schema: str, matcher: LLMatcher) -> LLMatcher:
        with self._lock:
            self._compiled[schema] = matcher
            while len(self._compiled) > _REMEMBERED:
                self._compiled.popitem(last=False)
        return matcher

    def _compile(self, schema: str) -> LLMatcher:
        """In a thread of its own, which may go on for nobody: nothing in llguidance can be interrupted."""
        vocabulary = self._made_vocabulary()
        if not self._compiling.acquire(timeout=_SECONDS):
            raise FormatBusy("response_format: another schema is still being compiled; try again later")
        found: list[LLMatcher] = []
        failed: list[BaseException] = []

        def work() -> None:
            try:
                found.append(self._compiled_grammar(schema, vocabulary))
            except BaseException as error:  # also panics: it is raised where the caller waits
                failed.append(error)
            finally:
                self._compiling.release()

        try:
            thread = threading.Thread(target=work, name="vtp-format", daemon=True)
            thread.start()
        except RuntimeError:  # no further thread can be had
            self._compiling.release()
            raise
        thread.join(_SECONDS)
        if thread.is_alive():
            raise refused(f"the schema takes more than {_SECONDS:g} s to compile; make it simpler")
        if failed:
            raise failed[0]
        return found[0]

    def _made_vocabulary(self) -> LLTokenizer:
        """Made once, which takes a second or two of large vocabularies."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._prompter)
            return self._vocabulary

    def _compiled_grammar(self, schema: str, vocabulary: LLTokenizer) -> LLMatcher:
        """FormatError, in our own words, for what llguidance does not take; its own are the cause's."""
        try:
            return _built(schema, vocabulary)
        except VtpError as error:
            raise explained(json.loads(schema), partial(_is_served, vocabulary)) from error


def _vocabulary(prompter: Prompter) -> LLTokenizer:
    try:
        with without_panic_lines(), failing_as("llguidance"):
            return make_vocabulary(prompter)
    except FormatError:
        raise
    except VtpError as error:
        raise refused("this model's tokenizer is not served; ask for the form in the prompt") from error


def _built(schema: str, vocabulary: LLTokenizer) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    with without_panic_lines(), failing_as("llguidance"):
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_JSON)  # type: ignore[arg-type]
        limits = LLParserLimits(**_LIMITS)  # type: ignore[arg-type]
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        trial = matcher.deep_copy()
        trial.compute_bitmask()
    if message := matcher.get_error() or trial.get_error():
        raise VtpError(f"llguidance: {message}")
    return matcher


def _is_served(vocabulary: LLTokenizer, schema: Mapping[str, Any]) -> bool:
    try:
        _built(json.dumps(schema, ensure_ascii=False), vocabulary)
    except VtpError:
        return False
    return True
