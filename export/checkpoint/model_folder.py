"""The doors of a model folder: what lies in it is looked at before this package or transformers opens it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtp.engines import VtpError
from vtp.engines.disk.files import check_regular, read_bounded

_MB = 1 << 20
INDEX = "model.safetensors.index.json"
# Bytes that a JSON file may have; tokenizers and vocabularies hold all words of a language.
JSON_BYTES = 16 * _MB
TEXT_BYTES = 512 * _MB
_LARGE = {"tokenizer.json": TEXT_BYTES, "vocab.json": TEXT_BYTES, "tekken.json": TEXT_BYTES, INDEX: 64 * _MB}
# JSON files that are read when a model is loaded. The large ones are parsed by who reads them.
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)
_DEPTH = 64  # of brackets in brackets; real files have below 10
_OPENED = (".json", ".jinja", ".model", ".txt", ".spm", ".tiktoken", ".vocab", ".safetensors")
_TEMPLATES = "additional_chat_templates"


def check_folder(folder: Path) -> None:
    """Refuse a folder in which a file that may be opened is none, is a link out of it, or is too large.

    Links from a snapshot of the Hugging Face cache to that cache's blobs are followed.
    Raises VtpError, naming the file.
    """
    roots = _roots(folder)
    for path in _entries(folder):
        if path.is_symlink() and not path.exists():
            continue  # leads nowhere: missing, which is said where the file is needed
        if path.suffix in _OPENED:
            _check_file(path, roots)
        elif not path.is_dir():
            check_regular(path)
    for name in _SETTINGS:
        if (folder / name).is_file():
            read_json(folder / name)


def read_json(path: Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file, read as transformers reads it.

    Raises VtpError, naming the file, for a file that is not regular, larger than `most` bytes, no UTF-8, no
    JSON, no object, or deeper than 64 levels.
    """
    try:
        data = json.loads(read_bounded(path, most).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets without end
        raise VtpError(f"cannot read {path}: {type(error).__name__}: {_flat(error)}") from error
    if not isinstance(data, dict):
        raise VtpError(f"{path} does not hold a JSON object")
    if _deeper(data, _DEPTH):
        raise VtpError(f"cannot read {path}: its values lie more than {_DEPTH} levels deep")
    return data


def plain_name(name: object) -> bool:
    """Whether a name given in a file means a file of the same folder."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    return name.isprintable() and not set(name) & set("/\\:")


def inside(path: Path, folder: Path) -> bool:
    """Whether a file really lies in `folder`, or in the blobs of the cache that `folder` is a snapshot of."""
    real = path.resolve()
    return any(root in real.parents for root in _roots(folder))


def _roots(folder: Path) -> list[Path]:
    """Folders in which the files of a model folder may really lie.

    In the Hugging Face cache: CACHE/models--ORG--NAME/snapshots/REVISION, whose files are links into
    CACHE/models--ORG--NAME/blobs, and these may be links into CACHE/blobs.
    """
    real = folder.resolve()
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        return [real, repository / "blobs", repository.parent / "blobs"]
    return [real]


def _entries(folder: Path) -> Iterator[Path]:
    """What lies in the folder and among its further chat templates, hidden files left out."""
    try:
        found = sorted(folder.iterdir())
        if (folder / _TEMPLATES).is_dir():
            found += sorted((folder / _TEMPLATES).iterdir())
    except OSError as error:
        raise VtpError(f"cannot read the model folder {folder}: {error.strerror}") from error
    return (path for path in found if not path.name.startswith("."))


def _check_file(path: Path, roots: list[Path]) -> None:
    size = check_regular(path)
    real = path.resolve()
    if not any(root in real.parents for root in roots):
        raise VtpError(f"{path} is a link that leaves the model folder; put a copy of the file there")
    settings = path.name in _SETTINGS or path.suffix == ".jinja"
    most = JSON_BYTES if settings else _LARGE.get(path.name, TEXT_BYTES)
    if path.suffix != ".safetensors" and size > most:
        raise VtpError(f"{path} has {size} bytes; at most {most} are read of such a file")


def _deeper(data: Any, most: int) -> bool:
    level = [data]
    for _ in range(most):
        level = [
            part
            for value in level
            for part in (value.values() if isinstance(value, dict) else value)
            if isinstance(part, dict | list)
        ]
        if not level:
            return False
    return True


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())[:240]
