"""The file that `vtp-run --batch` takes: a prompt and its pictures a line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtp.engines import UsageError
from vtp.engines.disk.files import is_file
from vtp.engines.errors import shown
from vtp.engines.strict_json import read_json_lines

QUESTION_BYTES = 1 << 30


@dataclass(frozen=True)
class Line:
    """One prompt, and the paths of its pictures in their order."""

    images: list[Path]
    prompt: str


def read_lines(file: Path) -> list[Line]:
    """Read {"image": path or list of paths, "prompt": text} a line; paths are relative to the file.

    Blank lines and other keys are passed over, so that the questions of vtp-calib will do. Raises UsageError,
    in one line that names the file and the line, for what cannot be read and for pictures that are missing.
    """
    read = read_json_lines(file, QUESTION_BYTES, UsageError)
    lines = [_line(item, where, file.parent) for where, item in read]
    if not lines:
        raise UsageError(f"batch '{file}' holds no prompt")
    return lines


def _line(item: Any, where: str, folder: Path) -> Line:
    form = 'a line is {"image": path or list of paths, "prompt": text}'
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        raise UsageError(f'{where} has no "prompt"; {form}')
    image = item.get("image")
    images = [image] if isinstance(image, str) else image
    if not (isinstance(images, list) and images and all(isinstance(one, str) for one in images)):
        raise UsageError(f'{where} has no "image"; {form}')
    missing = next((one for one in images if not is_file(folder / one)), None)
    if missing is not None:
        raise UsageError(f"{where} names the picture '{shown(missing)}', which does not exist beside it")
    return Line([folder / one for one in images], item["prompt"])
