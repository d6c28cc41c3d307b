"""Which files hold a model's weights: the choice that transformers' `from_pretrained` makes, checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vtp.engines import VtpError
from vtp.engines.disk.files import check_regular
from vtp.export.checkpoint.model_folder import INDEX, inside, plain_name, read_json

ONE = "model.safetensors"
_INDEX_BYTES = 64 << 20
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads for a model folder, in its order.

    These are, the first that is there: the file that config.json names in `transformers_weights`,
    model.safetensors, and the shards that model.safetensors.index.json names. Other files are left alone, as
    transformers does.

    Raises VtpError if there is none, and for a name that is not that of a regular file in the folder.
    """
    config = folder / "config.json"
    named = read_json(config).get("transformers_weights") if config.is_file() else None
    if named is not None:
        return _named(folder, named)
    _refuse_distributed(folder)
    if (folder / ONE).is_file():
        return [_checked(folder, ONE)]
    if (folder / INDEX).is_file():
        return _shards(folder, INDEX)
    raise VtpError(_nothing(folder))


def _named(folder: Path, name: Any) -> list[Path]:
    if not plain_name(name) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise VtpError(
            f"transformers_weights of {folder / 'config.json'} is {name!r}; give the name of a *.safetensors "
            "file, or of its index, in the folder"
        )
    if name.endswith(".json"):
        return _shards(folder, name)
    return [_checked(folder, name)]


def _shards(folder: Path, index: str) -> list[Path]:
    path = folder / index
    places = read_json(path, _INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise VtpError(f"{path} has no weight_map of tensors and files; download the model anew")
    names = list(places.values())
    bad = [name for name in names if not plain_name(name) or not name.endswith(".safetensors")]
    if bad:
        raise VtpError(
            f"{path} names {str(bad[0])[:120]!r} as a file of weights; only *.safetensors files in the same "
            "folder are read"
        )
    return [_checked(folder, name) for name in sorted(set(names))]


def _checked(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise VtpError(
            f"cannot load the model in {folder}: No such file or directory: {path}; download it whole"
        )
    check_regular(path)
    if not inside(path, folder):
        raise VtpError(f"{path} is a link that leaves the model folder; put a copy of the file there")
    return path


def _refuse_distributed(folder: Path) -> None:
    """transformers prefers these to all others and loads them with torch's distributed loader."""
    found = sorted(path.name for path in folder.iterdir() if _DISTRIBUTED.fullmatch(path.name))
    if found:
        raise VtpError(
            f"{folder} holds a distributed checkpoint ({found[0]}); load it with transformers and write it "
            "with save_pretrained first"
        )


def _nothing(folder: Path) -> str:
    found = sorted(path.name for path in folder.iterdir())
    near = [name for name in found if name.endswith(".safetensors")]
    if near:
        return (
            f"{folder} has {near[0]}, but neither {ONE} nor {INDEX}, which are what transformers loads; "
            f"rename it, or download the whole model"
        )
    gguf = [name for name in found if name.endswith(".gguf")]
    if gguf:
        return f"{folder} has {gguf[0]} and no *.safetensors; GGUF is not supported: give the original model"
    return f"{folder} has no *.safetensors; vtp loads no pickled weights: convert the model first"
