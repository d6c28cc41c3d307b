"""Strangers' tokenizers: those that panic, lengthen text or lack their unknown token are one line at load."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from vtp.engines.errors import VtpError
from vtp.runtime.prompt import tokenizer as limits
from vtp.runtime.prompt.prompter import Detokenizer, Prompter

from .tokenizer_kinds import LLAVA_TEMPLATE, SPECIALS, TOKENIZERS, spec_for


def changed(change: Callable[[Tokenizer], None], name: str = "byte_level") -> Tokenizer:
    tokenizer = Tokenizer.from_str(TOKENIZERS[name].to_str())
    change(tokenizer)
    return tokenizer


def part(name: str, value: Any) -> Callable[[Tokenizer], None]:
    return lambda tokenizer: setattr(tokenizer, name, value)


def bare(model: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def opened(tokenizer: Tokenizer, folder: Path) -> Prompter:
    tokenizer.save(str(folder / "tokenizer.json"))
    return Prompter(spec_for(LLAVA_TEMPLATE), folder / "tokenizer.json")


VOCABULARY = {"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": 3, "a": 4}
DOUBLE = normalizers.Sequence([normalizers.Replace("a", "aa") for _ in range(30)])
HOSTILE: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "panics": (
        lambda: changed(part("pre_tokenizer", pre_tokenizers.Split(Regex("(.|..)+$(?!\n|.)x"), "isolated"))),
        "not a usable",
    ),
    "doubles": (lambda: changed(part("normalizer", DOUBLE)), "lengthens a text"),
    "doubles_nested": (
        lambda: changed(part("normalizer", normalizers.Sequence([DOUBLE, DOUBLE]))),
        "lengthens a text",
    ),
    "long_replacement": (
        lambda: changed(part("normalizer", normalizers.Replace("a", "b" * 100_000))),
        "lengthens a text",
    ),
    "replaces_nothing": (
        lambda: changed(part("normalizer", normalizers.Replace(Regex("x*"), "b" * 100_000))),
        "lengthens a text",
    ),
    "prepends": (
        lambda: changed(part("normalizer", normalizers.Prepend("b" * 1_000_000))),
        "lengthens a text",
    ),
    "decoder_doubles": (
        lambda: changed(part("decoder", decoders.Sequence([decoders.Replace("a", "a" * 100)] * 3))),
        "lengthens a text",
    ),
    "no_unknown_bpe": (lambda: bare(models.BPE(vocab=VOCABULARY, merges=[], unk_token="<none>")), "<none>"),
    "no_unknown_words": (lambda: bare(models.WordLevel(vocab=VOCABULARY, unk_token="<none>")), "unk|UNK"),
    "no_unknown_pieces": (lambda: bare(models.WordPiece(vocab=VOCABULARY, unk_token="<none>")), "unk|UNK"),
    "no_unknown_unigram": (
        lambda: bare(models.Unigram([(text, -1.0) for text in VOCABULARY], unk_id=None)),
        "unk",
    ),
    "long_words": (
        lambda: bare(models.WordPiece(vocab=VOCABULARY, unk_token="a", max_input_chars_per_word=10**9)),
        "in one piece",
    ),
    "random": (
        lambda: bare(models.BPE(vocab=VOCABULARY, merges=[], unk_token="a", dropout=0.5)),
        "dropout 0.5, which makes prompts random; set dropout to null",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_tokenizers_that_cannot_be_used_are_one_line_at_load(name: str, tmp_path: Path) -> None:
    make, match = HOSTILE[name]
    with pytest.raises(VtpError, match=match) as caught:
        opened(make(), tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_panic_that_only_some_prompts_meet_is_one_line(tmp_path: Path) -> None:
    """An expression that looks back too often for a text that the trial does not hold."""
    splits = pre_tokenizers.Split(Regex("(q+)+$"), "isolated")
    byte_level = TOKENIZERS["byte_level"].pre_tokenizer
    prompter = opened(changed(part("pre_tokenizer", pre_tokenizers.Sequence([splits, byte_level]))), tmp_path)
    with pytest.raises(VtpError, match="cannot encode the prompt") as caught:
        prompter.encode(prompter.messages_for("q" * 64 + "b"))
    assert "\n" not in str(caught.value)
    assert prompter.encode(prompter.messages_for("what ?")).text_tokens > 3


def test_a_file_that_is_too_large_or_no_tokenizer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokenizer.json"
    state = json.loads(TOKENIZERS["byte_level"].to_str())
    wrong: list[str] = ["{}", "[]", "null", "\x00" * 99, "[" * 100_000, '{"version": "1.0"}']
    wrong.append(json.dumps({**state, "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}))
    wrong.append(json.dumps({**state, "model": {**state["model"], "merges": ["x y"]}}))
    for text in wrong:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(VtpError, match=r"not a readable tokenizer\.json") as caught:
            Prompter(spec_for(None), path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    monkeypatch.setattr(limits, "LARGEST", 1000)
    with pytest.raises(VtpError, match="limit: 1000"):
        opened(TOKENIZERS["byte_level"], tmp_path)


def test_an_answer_does_not_grow_without_bound() -> None:
    tokenizer = Tokenizer.from_str(TOKENIZERS["byte_level"].to_str())
    tokenizer.add_tokens([AddedToken("y" * 1_000_000, normalized=False)])
    stream = Detokenizer(tokenizer)
    with pytest.raises(VtpError, match="has 1000000 characters"):
        stream.push(tokenizer.get_vocab_size() - 1)


def test_settings_that_sample_pieces_are_off_in_a_file(tmp_path: Path) -> None:
    """Dropout of 0 is none, and a file's alpha and nbest_size are not read: prompts stay the same."""
    opened(changed(lambda tokenizer: setattr(tokenizer.model, "dropout", 0.0)), tmp_path)
    pieces = [(text, -1.0) for text in [*VOCABULARY, "aa", "aaa"]]
    state = json.loads(bare(models.Unigram(pieces, unk_id=0)).to_str())
    state["model"] |= {"alpha": 0.1, "nbest_size": 64}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    prompter = Prompter(spec_for(LLAVA_TEMPLATE), tmp_path / "tokenizer.json")
    message = prompter.messages_for("a" * 40)
    assert len({tuple(prompter.encode(message).ids) for _ in range(20)}) == 1


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_tokenizers_of_every_kind_load(name: str, tmp_path: Path) -> None:
    prompter = opened(TOKENIZERS[name], tmp_path)
    prompter.check()
    prompt = prompter.encode(prompter.messages_for("what color is the star ?"))
    assert prompt.ids == TOKENIZERS[name].encode(prompt.text).ids


GROWTH = """
import ctypes, gc, sys
from pathlib import Path
from vtp.bench.common.resident import resident
from vtp.runtime.prompt.tokenizer import CheckedTokenizer

def left(times):
    for _ in range(times):
        CheckedTokenizer(Path(sys.argv[1]))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident()

left(200)
print(-left(0) + left(1500))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and trims glibc's heap")
@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_tokenizer_that_is_gone_leaves_no_memory(name: str, tmp_path: Path) -> None:
    """Robots load bundles for days: the library's word cache of BPE kept 3 to 5 KB of each."""
    TOKENIZERS[name].save(str(tmp_path / "tokenizer.json"))
    command = [sys.executable, "-c", GROWTH, str(tmp_path / "tokenizer.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2 * 2**20  # allocators move by half of one; that was 7 to 9
