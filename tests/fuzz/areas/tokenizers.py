"""Changed tokenizer.json files: their JSON, and their bytes. What is read must also encode, and decode."""

from __future__ import annotations

import json
import random
from pathlib import Path

from mutate import Step, change_bytes, change_json, draw_bytes, draw_json
from subject import Subject

from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.prompt.prompter import Detokenizer, Prompter

_TEXTS = ("what is red ?", "naïve 你好 🙂", "a" * 90, " x ", "\x00\x1b\n\t", "<s></s><pad>x")

# Parts that the format has, put where they do harm: text that grows, tokens that are not there.
_PARTS: dict[str, tuple[str, ...]] = {
    "normalizer": (
        '{"type":"Replace","pattern":{"String":"a"},"content":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}',
        '{"type":"Replace","pattern":{"Regex":"(a+)+$"},"content":""}',
        '{"type":"Replace","pattern":{"Regex":""},"content":"x"}',
        '{"type":"Replace","pattern":{"String":""},"content":"x"}',
        '{"type":"Prepend","prepend":"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}',
        '{"type":"Precompiled","precompiled_charsmap":"AAAA"}',
        '{"type":"Precompiled","precompiled_charsmap":""}',
        '{"type":"Sequence","normalizers":[]}',
        '{"type":"NFKD"}',
    ),
    "pre_tokenizer": (
        '{"type":"Metaspace","replacement":"a","prepend_scheme":"always","split":true}',
        '{"type":"Split","pattern":{"Regex":"(?=a)"},"behavior":"Removed","invert":true}',
        '{"type":"Punctuation","behavior":"Removed"}',
        '{"type":"Digits","individual_digits":true}',
        "null",
    ),
    "decoder": (
        '{"type":"Strip","content":"a","start":999999999,"stop":999999999}',
        '{"type":"WordPiece","prefix":"","cleanup":true}',
        '{"type":"CTC","pad_token":"","word_delimiter_token":"","cleanup":true}',
        '{"type":"Replace","pattern":{"Regex":"(a*)*"},"content":"a"}',
        '{"type":"Fuse"}',
        "null",
    ),
    "post_processor": (
        '{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"no","type_id":0}}],"pair":[],'
        '"special_tokens":{}}',
        '{"type":"BertProcessing","sep":["no",9999],"cls":["no",9999]}',
        "null",
    ),
    "model": (
        '{"type":"WordLevel","vocab":{"<image>":4},"unk_token":"no"}',
        '{"type":"WordPiece","vocab":{"<image>":4},"unk_token":"no","continuing_subword_prefix":"",'
        '"max_input_chars_per_word":99}',
        '{"type":"Unigram","unk_id":9,"vocab":[["a",0.0]],"byte_fallback":true}',
        '{"type":"Unigram","unk_id":null,"vocab":[["a",0.0]],"byte_fallback":false}',
        '{"type":"BPE","vocab":{},"merges":[],"unk_token":"no","byte_fallback":true}',
    ),
    "truncation": ('{"max_length":0,"strategy":"LongestFirst","stride":9,"direction":"Right"}',),
    "padding": (
        '{"strategy":{"Fixed":999999999},"direction":"Left","pad_to_multiple_of":7,"pad_id":0,'
        '"pad_type_id":0,"pad_token":"x"}',
        '{"strategy":"BatchLongest","direction":"Left","pad_to_multiple_of":0,"pad_id":99999,'
        '"pad_type_id":0,"pad_token":""}',
    ),
}


class Area:
    """Loads a tokenizer, encodes, decodes."""

    def __init__(self, subject: Subject, scratch: Path) -> None:
        bundle = open_bundle(subject.bundle)
        self._spec, self._path = bundle.manifest.text, scratch / "tokenizer.json"
        self._bytes = bundle.path("tokenizer.json").read_bytes()
        self._data = json.loads(self._bytes)

    def draw(self, rng: random.Random) -> list[Step]:
        """["json", change...] or ["bytes", change...]."""
        if rng.random() < 0.5:
            names = rng.sample(list(_PARTS), rng.choice([1, 1, 2]))
            return [["json", "set", [name], rng.choice(_PARTS[name])] for name in names]
        if rng.random() < 0.6:
            return [["json", *draw_json(rng, self._data)] for _ in range(rng.choice([1, 1, 2]))]
        return [["bytes", *draw_bytes(rng, len(self._bytes))] for _ in range(rng.choice([1, 2]))]

    def run(self, steps: list[Step]) -> None:
        """Raises VtpError where the tokenizer is refused; any ids will do."""
        data = self._bytes
        changes = [step[1:] for step in steps if step[0] == "json"]
        if changes:
            data = change_json(self._data, changes).encode("utf-8", "surrogatepass")
        self._path.unlink(missing_ok=True)
        self._path.write_bytes(change_bytes(data, [step[1:] for step in steps if step[0] == "bytes"]))
        prompter = Prompter(self._spec, self._path)
        for text in _TEXTS:
            prompter.encode(prompter.messages_for(text.replace("<s></s><pad>", "")))
        decoder = Detokenizer(prompter.tokenizer)
        for token in (0, 5, 6, 100, 300, 383):
            decoder.push(token)
        decoder.finish()
