"""A byte-level BPE tokenizer as GGUF keeps it: pieces, their kinds, merges, the cut into words."""

from __future__ import annotations

from typing import Any

from vtp.bench.compare.llamacpp.checkpoint import Checkpoint
from vtp.engines import VtpError

# llama.cpp's name for the cut that tokenizers calls ByteLevel with its own pattern, which is GPT-2's.
GPT2 = "gpt-2"
# Qwen2's own pattern in front of ByteLevel; llama.cpp knows it by that name.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# SmolLM2's, in front of ByteLevel: every digit is a word.
_DIGITS = {"type": "Digits", "individual_digits": True}


def add_vocabulary(writer: Any, checkpoint: Checkpoint) -> None:
    """Write the tokenizer of `checkpoint`; ids without a piece become unused ones.

    No token is added in front by llama.cpp: the prompt's text holds what the tokenizer adds. Raises VtpError
    for a tokenizer of another kind.
    """
    told = checkpoint.json("tokenizer.json")
    model, added = told["model"], told["added_tokens"]
    if model["type"] != "BPE" or model.get("byte_fallback") or told.get("normalizer"):
        raise VtpError(
            f"{checkpoint.folder}: its tokenizer is not a byte-level BPE, the only kind that the GGUF "
            "converter takes"
        )
    pieces, kinds = pieces_of(model["vocab"], added, checkpoint.config.text_config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut_of(told["pre_tokenizer"]))
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [one if isinstance(one, str) else " ".join(_escaped(part) for part in one) for one in model["merges"]]
    )
    writer.add_eos_token_id(_end(checkpoint))
    writer.add_add_bos_token(False)
    template = checkpoint.folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def pieces_of(
    vocabulary: dict[str, int], added: list[dict[str, Any]], size: int
) -> tuple[list[str], list[int]]:
    """The piece and the kind (gguf.TokenType) of every id below `size`."""
    from gguf import TokenType

    pieces, kinds = [f"[unused{at}]" for at in range(size)], [int(TokenType.UNUSED)] * size
    for piece, at in vocabulary.items():
        pieces[at], kinds[at] = piece, int(TokenType.NORMAL)
    for one in added:
        pieces[one["id"]] = one["content"]
        kinds[one["id"]] = int(TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED)
    return pieces, kinds


def cut_of(told: dict[str, Any]) -> str:
    """llama.cpp's name for a pre-tokenizer. VtpError for one that it is not known to have."""
    parts = told["pretokenizers"] if told["type"] == "Sequence" else [told]
    if len(parts) == 1 and _byte_level(parts[0], pattern=True):
        return GPT2
    if len(parts) == 2 and parts[0] == _DIGITS and _byte_level(parts[1], pattern=True):
        return "smollm"
    if len(parts) == 2 and parts[0].get("pattern") == {"Regex": _QWEN2} and _byte_level(parts[1], False):
        return "qwen2"
    kinds = ", ".join(part["type"] for part in parts)
    raise VtpError(f"the GGUF converter does not know this tokenizer's way to cut text into words ({kinds})")


def _byte_level(part: dict[str, Any], pattern: bool) -> bool:
    plain = part["type"] == "ByteLevel" and not part.get("add_prefix_space")
    return plain and part.get("use_regex", True) == pattern


def _escaped(part: str) -> str:
    """A merge's half without the blank that parts the two."""
    return part.replace(" ", chr(ord(" ") + 256))


def _end(checkpoint: Checkpoint) -> int:
    ends = checkpoint.json("generation_config.json")["eos_token_id"]
    return int(ends[0] if isinstance(ends, list) else ends)
