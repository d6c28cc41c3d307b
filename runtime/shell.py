"""Command lines that are printed to be pasted: whatever a path holds, the shell hands it over unchanged."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from vtp.engines.errors import UNSAFE


def command_line(*words: str | Path) -> str:
    """Words as one line for a shell; paths that begin with a dash get "./" in front, flags are plain str."""
    return " ".join(_word(word) for word in words)


def _word(word: str | Path) -> str:
    text = f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
    if UNSAFE.search(text) is None:
        return shlex.quote(text)
    plain = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{UNSAFE.sub(_as_bytes, plain)}'"  # bash's and zsh's way to write control characters


def _as_bytes(found: re.Match[str]) -> str:
    return "".join(f"\\x{byte:02x}" for byte in found[0].encode("utf-8", "surrogateescape"))
