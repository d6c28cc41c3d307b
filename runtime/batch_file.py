"""The file that `vtp-run --batch` takes: a prompt and its pictures a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vtp.engines import UsageError


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
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"batch '{file}' cannot be read: {getattr(error, 'strerror', '') or error}"
        ) from error
    numbered = enumerate(text.splitlines(), start=1)
    lines = [_line(line, f"{file} line {number}", file.parent) for number, line in numbered if line.strip()]
    if not lines:
        raise UsageError(f"batch '{file}' holds no prompt")
    return lines


def _line(text: str, where: str, folder: Path) -> Line:
    try:
        item = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}") from error
    form = 'a line is {"image": path or list of paths, "prompt": text}'
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        raise UsageError(f'{where} has no "prompt"; {form}')
    image = item.get("image")
    images = [image] if isinstance(image, str) else image
    if not (isinstance(images, list) and images and all(isinstance(one, str) for one in images)):
        raise UsageError(f'{where} has no "image"; {form}')
    missing = next((one for one in images if not (folder / one).is_file()), None)
    if missing is not None:
        raise UsageError(f"{where} names the picture '{missing}', which does not exist beside the file")
    return Line([folder / one for one in images], item["prompt"])
