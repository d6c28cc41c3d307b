"""Model cards: what they say, and that words of a stranger's manifest stay words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from vtp.export.hub.card import card
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.hub.names import HubName

NAME = HubName("org/pruned")


@pytest.fixture
def manifest(exported: Callable[[str], Any]) -> Manifest:
    from vtp.runtime import open_bundle

    return open_bundle(exported("vispruner").folder).manifest


def front(text: str) -> dict[str, Any]:
    """What the hub reads of a card."""
    _, head, _ = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def test_the_facts(manifest: Manifest) -> None:
    case = {"equal": 16, "tokens": 16, "relative": 2.5e-6}
    named = dataclasses.replace(manifest.model, name="llava-hf/llava-1.5-7b-hf")
    parity = {"mode": "full", "generation": {"4": case}}
    text = card(dataclasses.replace(manifest, model=named, parity=parity), NAME)
    assert front(text) == {
        "library_name": "vtp",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vtp", "onnx", "visual-token-pruning", "vispruner"],
        "base_model": "llava-hf/llava-1.5-7b-hf",
    }
    assert "| 4 | 16 of 16 | 2.5e-06 |" in text and "site vision" in text
    total = sum(info.bytes for info in manifest.files.values())
    assert f"| all | {total / 1e6:.2f} |" in text
    assert "base_model" not in front(card(manifest, NAME))
    assert front(card(manifest, NAME, "org/base"))["base_model"] == "org/base"
    assert "Not checked" in card(manifest, NAME) and "quantised" not in card(manifest, NAME)
    bits = {"vision": "int8", "decoder": "int4", "prompt": "int8", "layers": {}}
    fewer = card(dataclasses.replace(manifest, quantization=bits), NAME)
    assert "quantised by vtp-calib quantize (vision int8, decoder int4, prompt int8); manifest.json" in fewer


HOSTILE = (
    "<script>alert(1)</script>",
    "[click](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "x\n---\nlicense: mit\n# Big",
    "`rm -rf /` | cell | *bold*",
    "https://evil.example www.evil.example a@evil.example",
    '"], evil: [1',
    "\u202eevil\x1b[2J",
)


@pytest.mark.parametrize("words", HOSTILE)
def test_words_of_a_stranger_stay_words(manifest: Manifest, words: str) -> None:
    """Read by CommonMark's rules with tables: nothing but text comes of them."""
    markdown = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")
    method = dataclasses.replace(manifest.method, name=words, paper=words, options={words: words}, site=words)
    hostile = dataclasses.replace(
        manifest,
        model=dataclasses.replace(manifest.model, name=words, architecture=words),
        method=method,
        versions={words: words},
        quantization={"vision": words, "decoder": [words], words: words},
        parity={"mode": "full", "generation": {words: {"equal": words, "tokens": [words]}, "x": words}},
    )
    parity = {"mode": "full", "generation": {"4": {}, "5": {}}}
    plain = dataclasses.replace(manifest, parity=parity, quantization={"vision": "int8"})
    text = card(hostile, NAME)
    assert front(text).keys() == {"library_name", "pipeline_tag", "tags"}
    parse = markdown.MarkdownIt("commonmark").enable("table").parse
    body = text.split("---\n", 2)[2]
    kinds = [[token.type for token in parse(one)] for one in (body, card(plain, NAME).split("---\n", 2)[2])]
    assert kinds[0] == kinds[1]  # the same blocks
    inline = {child.type for token in parse(body) for child in token.children or ()}
    assert inline <= {"text", "text_special", "softbreak", "code_inline"}
    assert not re.search(r"\w://|www\.|\w@\w", body)  # of which the hub's extensions make links
