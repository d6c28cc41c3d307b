"""Whatever is drawn among the allowed tokens is JSON of the schema, with every kind of tokenizer."""

from __future__ import annotations

import builtins
import threading
from pathlib import Path
from typing import Any

import pytest

from vtp.engines.errors import UsageError, VtpError
from vtp.runtime.constrained import formats as module
from vtp.runtime.constrained.formats import Formats, schema_of
from vtp.runtime.constrained.vocabulary import check_installed

from .writing import REVIEW, SCHEMAS, check, prompter, written


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("name", ["byte_level", "byte_level_prefix", "llama"])
def test_answers_satisfy_their_schema(name: str, schema: str, tmp_path: Path) -> None:
    words = prompter(name, tmp_path)
    formats = Formats(words)
    texts = {written(formats, words, SCHEMAS[schema], seed) for seed in range(8)}
    for text in texts:
        check(text, SCHEMAS[schema])
    assert len(texts) > 1 or schema == "tree"


def test_the_forms_that_clients_send(tmp_path: Path) -> None:
    """OpenAI's two, and Ollama's two."""
    words = prompter("byte_level", tmp_path)
    formats = Formats(words)
    strict = {"type": "json_schema", "json_schema": {"name": "review", "schema": REVIEW, "strict": True}}
    for wanted in (strict, {**strict, "json_schema": {"schema": REVIEW}}, REVIEW):
        check(written(formats, words, wanted, 1), REVIEW)
    for wanted in ({"type": "json_object"}, "json"):
        assert isinstance(check(written(formats, words, wanted, 1), {}), dict)
    for wanted in (None, {"type": "text"}):
        assert formats.constraint(wanted) is None


@pytest.mark.parametrize("name", ["wordpiece", "rewriting", "metaspace_first", "words_only", "end_of_word"])
def test_tokenizers_that_cannot_be_held_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"response_format: this model's tokenizer (changes|has no token)"):
        Formats(prompter(name, tmp_path)).constraint({"type": "object"})


BAD: list[tuple[Any, str]] = [
    (5, "response_format: 5 is not known; give an object"),
    ("yaml", "response_format: 'yaml' is not known"),
    (["x"], r"response_format: \['x'\] is not known"),
    ({"type": "json_schema"}, "type json_schema lacks"),
    ({"type": "json_schema", "json_schema": {"name": "x"}}, "type json_schema lacks"),
    ({"type": "json_schema", "json_schema": {"schema": []}}, r"a JSON schema must be an object, not \[\]"),
    ({"type": "strng"}, "response_format: type 'strng' is not known; give .*did you mean 'string'"),
    ({"not": {"type": "string"}}, "response_format: not is not served; leave it out"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems is not served"),
    ({"type": "string", "format": "foo"}, "format 'foo' is not served; give a pattern"),
    ({"type": "string", "pattern": "^(?=a)b"}, "the pattern .* is not served; .*look-around"),
    ({"type": "string", "pattern": "("}, r"the pattern '\(' is not served"),
    ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength 5 is more than maxLength 2"),
    ({"$ref": "#/$defs/none"}, r"\$ref '#/\$defs/none' leads nowhere"),
    ({"oneOf": [{"type": "string"}, {"maxLength": 3, "type": "string"}]}, "parts that exclude each other"),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_is_not_served_is_one_line(
    wanted: Any, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    formats = Formats(prompter("byte_level", tmp_path))
    with pytest.raises(UsageError, match=message) as caught:
        formats.constraint(wanted)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 and text.startswith("response_format")
    assert "panicked" not in capfd.readouterr().err


def test_a_grammar_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats, compiled = Formats(prompter("byte_level", tmp_path)), []
    real = formats._compiled_grammar

    def compiling(schema: str, vocabulary: Any) -> Any:
        compiled.append(schema)
        return real(schema, vocabulary)

    monkeypatch.setattr(formats, "_compiled_grammar", compiling)
    for _ in range(3):
        formats.constraint(REVIEW)
    assert compiled == [schema_of(REVIEW)]
    for number in range(20):
        formats.constraint({"const": number})
    assert len(formats._compiled) == module._REMEMBERED
    formats.constraint(REVIEW)
    assert len(compiled) == 22


def test_one_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait no longer than it may take, and are served once it is over."""
    formats, go_on = Formats(prompter("byte_level", tmp_path)), threading.Event()
    real = formats._compiled_grammar

    def slowly(schema: str, vocabulary: Any) -> Any:
        go_on.wait(60)
        return real(schema, vocabulary)

    monkeypatch.setattr(formats, "_compiled_grammar", slowly)
    monkeypatch.setattr(module, "_SECONDS", 0.05)
    with pytest.raises(UsageError, match=r"takes more than 0.05 s to compile; make it simpler"):
        formats.constraint({"const": 1})
    with pytest.raises(VtpError, match="another schema is still being compiled; try again later"):
        formats.constraint({"const": 2})
    go_on.set()
    monkeypatch.setattr(module, "_SECONDS", 60)
    assert formats.constraint({"const": 3}) is not None


def test_panics_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def panic(*_: Any) -> None:
        raise PanicException("index out of bounds")

    formats = Formats(prompter("byte_level", tmp_path))
    constraint = formats.constraint({"type": "object"})
    assert constraint is not None
    monkeypatch.setattr(constraint, "_matcher", type("Broken", (), {"compute_bitmask": panic}))
    with pytest.raises(VtpError, match=r"the answer's form cannot be held: .*index out of bounds"):
        constraint.allowed(10)
    with monkeypatch.context() as patch:
        patch.setattr(formats, "_compiled_grammar", panic)
        with pytest.raises(PanicException):
            formats.constraint({"const": 1})
    assert not formats._compiling.locked() and formats.constraint({"const": 1}) is not None
    monkeypatch.setattr(module, "make_vocabulary", panic)
    formats._vocabulary = None
    with pytest.raises(VtpError, match="tokenizer is not served; ask for the form in the prompt"):
        formats.constraint({"const": 2})
    assert not formats._lock.locked()


def test_a_token_that_must_not_come_ends_it(tmp_path: Path) -> None:
    words = prompter("byte_level", tmp_path)
    constraint = Formats(words).constraint({"type": "object"})
    assert constraint is not None
    with pytest.raises(VtpError, match="the answer's form cannot be held: ") as caught:
        constraint.add(words.tokenizer.token_to_id("x"))
    assert "\n" not in str(caught.value) and not constraint.complete


def test_without_llguidance_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *rest)

    check_installed.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    formats = Formats(prompter("byte_level", tmp_path))
    with pytest.raises(
        VtpError, match=r"needs llguidance, which is not installed; run: pip install 'vtp-edge\[serve"
    ):
        formats.constraint({"type": "object"})
    assert formats.constraint(None) is None
    monkeypatch.undo()
    check_installed.cache_clear()


def test_tokens_beyond_the_tokenizer_are_never_allowed(tmp_path: Path) -> None:
    """Embedding tables have more rows than vocabularies."""
    words = prompter("byte_level", tmp_path)
    constraint = Formats(words).constraint({"type": "string"})
    assert constraint is not None
    size = words.tokenizer.get_vocab_size()
    for count in (size - 7, size, size + 1, size + 100):
        allowed = constraint.allowed(count)
        assert allowed.shape == (count,) and not allowed[size:].any()
    assert constraint.allowed(size).any()
