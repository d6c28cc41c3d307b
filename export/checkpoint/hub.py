"""Where a model comes from: a folder, the built-in one, or the Hugging Face hub and its cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vtp.engines import VtpError

_WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_HUB_ID = re.compile(f"{_PART}/{_PART}")
_PATIENCE = 5.0  # seconds that the hub has to answer


def resolve(model: str | None) -> Path:
    """Folder of the model: the built-in one for None, a local folder, or a download of a hub id.

    Raises VtpError when there is no such folder and the hub cannot be reached.
    """
    if model is None:
        from vtp.scenes import model_dir

        return Path(model_dir())
    try:
        folder = Path(model).expanduser()
        found, is_folder = folder.exists(), folder.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a home that is not there
        raise VtpError(f"no such model folder: {model[:80]}: {error}") from error
    if is_folder:
        return folder
    if found:
        raise VtpError(f"model {model} is a file; give the folder that holds its config.json")
    if not _HUB_ID.fullmatch(model):
        raise VtpError(
            f"no such model folder: {model}; give a folder in Hugging Face layout, or a hub id ORG/NAME"
        )
    return _download(model)


def model_name(folder: Path) -> str:
    """What a model is called: its folder's name, or "org/name" for a snapshot in the hub's cache."""
    real = folder.resolve()
    kind, _, repo = real.parent.parent.name.partition("--")
    repo = repo.replace("--", "/")
    in_cache = real.parent.name == "snapshots" and kind == "models" and _HUB_ID.fullmatch(repo)
    return repo if in_cache else real.name


def _download(model: str) -> Path:
    """The newest snapshot from the hub; the cached one if the hub is not reached. It is asked once."""
    from huggingface_hub import HfApi, constants, snapshot_download

    wanted: dict[str, Any] = {"allow_patterns": list(_WANTED)}
    unreached: Exception | None = None
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().model_info(model, timeout=_PATIENCE)
            return Path(snapshot_download(model, **wanted))
        except Exception as error:  # the hub library's errors share no base class
            unreached = error
    try:
        return Path(snapshot_download(model, local_files_only=True, **wanted))
    except Exception as error:
        raise VtpError(_unreached(model, unreached)) from (unreached or error)


def _unreached(model: str, error: Exception | None) -> str:
    what = f"no such model folder: {model}; it is not whole in the hub's cache, and "
    if error is None:
        what += "HF_HUB_OFFLINE is set: unset it"
    else:
        reason = " ".join(str(error).split())[:120]
        what += f"the hub did not give it ({type(error).__name__}: {reason}): check name and network"
    return f"{what}, or download it elsewhere (hf download {model} --local-dir DIR) and give --model DIR"
