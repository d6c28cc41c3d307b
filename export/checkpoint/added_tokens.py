"""Added tokens as a model folder spells them: what the tokenizers library would print about is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtp.engines import VtpError
from vtp.engines.errors import quoted
from vtp.export.checkpoint.model_folder import TEXT_BYTES, read_json

_KEYS = frozenset({"content", "single_word", "lstrip", "rstrip", "normalized", "special", "id", "__type"})
_FILES = {"tokenizer.json": ("added_tokens",), "tokenizer_config.json": (), "special_tokens_map.json": ()}


def check_added_tokens(folder: Path) -> None:
    """Refuse keys that no added token has.

    The tokenizers library leaves them out and prints each, as it stands in the file, on standard output:
    there a program's JSON may go, or a terminal that acts on escape sequences. Raises VtpError.
    """
    for name, under in _FILES.items():
        path = folder / name
        if not path.is_file():
            continue
        held = _read(path)
        for token in _tokens({key: held.get(key) for key in under} if under else held):
            unknown = next((key for key in token if key not in _KEYS), None)
            if unknown is not None:
                raise VtpError(
                    f"{path}: an added token has the key {quoted(unknown)}, which is not served; "
                    f"take it out (keys: {', '.join(sorted(_KEYS - {'__type'}))})"
                )


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, TEXT_BYTES)
    except VtpError as error:
        raise VtpError(f"cannot load the tokenizer in {path.parent}: {error}") from error


def _tokens(held: Any) -> Iterator[dict[str, Any]]:
    """Every object with `content`, however deep; `read_json` has bounded the depth."""
    if isinstance(held, dict):
        if isinstance(held.get("content"), str):
            yield held
        held = list(held.values())
    if isinstance(held, list):
        for value in held:
            yield from _tokens(value)
