"""Files of strangers' model folders: headers of weights and JSON that lie or are broken."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from vtp.engines import VtpError
from vtp.export.checkpoint import loading as checkpoint

from ..test_bad_models import edit, write
from ..verify.test_streamed import shard
from .test_hostile_folders import CONFIG, INDEX, TOKENIZER, WEIGHTS, Change, refuse, same_as_transformers


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Rewrite the header of the weights, and leave the numbers as they are."""

    def act(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        told = json.loads(raw[8 : 8 + length])
        text = change(told)
        new = text if isinstance(text, bytes) else json.dumps(told).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])

    return act


def first(told: dict[str, Any]) -> dict[str, Any]:
    return told[next(name for name in told if name != "__metadata__")]


def twice(told: dict[str, Any]) -> bytes:
    name = next(name for name in told if name != "__metadata__")
    return json.dumps(told).replace("{", "{" + f"{json.dumps(name)}: {json.dumps(told[name])}, ", 1).encode()


def set_first(**changes: Any) -> Change:
    return header(lambda told: first(told).update(changes))


def length_of(number: int) -> Change:
    return lambda folder: (folder / WEIGHTS).write_bytes(
        struct.pack("<Q", number) + (folder / WEIGHTS).read_bytes()[8:]
    )


HEADERS: dict[str, Change] = {
    "empty": write(WEIGHTS, b""),
    "seven bytes": write(WEIGHTS, b"1234567"),
    "length of all": length_of(2**64 - 1),
    "length of a gigabyte": length_of(2**30),
    "length of none": length_of(0),
    "length too short": length_of(10),
    "a list": header(lambda told: b"[]"),
    "a number": header(lambda told: b"1"),
    "no UTF-8": header(lambda told: b'{"\xff": 1}'),
    "deep": header(lambda told: b"[" * 100_000),
    "deep metadata": header(lambda told: b'{"__metadata__":' * 5000),
    "offsets beyond": set_first(data_offsets=[0, 2**40]),
    "offsets reversed": set_first(data_offsets=[400, 0]),
    "offsets negative": set_first(data_offsets=[-4, 4]),
    "offsets in words": set_first(data_offsets="all"),
    "offsets overlap": header(
        lambda told: [
            part.update(data_offsets=[0, part["data_offsets"][1] - part["data_offsets"][0]])
            for name, part in told.items()
            if name != "__metadata__"
        ]
    ),
    "shape of all": set_first(shape=[2**40, 2**40]),
    "shape negative": set_first(shape=[-1]),
    "shape in words": set_first(shape="1"),
    "shape overflows to nothing": set_first(shape=[2**63, 2], data_offsets=[0, 0]),
    "dtype": set_first(dtype="F7"),
    "another dtype": set_first(dtype="F64"),
    "dtype is a number": set_first(dtype=4),
    "metadata is a number": header(lambda told: told.update(__metadata__=3)),
    "trailing bytes": lambda folder: (folder / WEIGHTS).open("ab").write(b"x" * 64),
    "cut by a byte": lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(folder: Path, name: str) -> None:
    HEADERS[name](folder)
    refuse(
        folder,
        r"model\.safetensors is not a complete safetensors file \(SafetensorError|cannot load the model",
    )


def test_a_name_twice_in_a_header_is_read_as_by_transformers(folder: Path) -> None:
    header(twice)(folder)
    same_as_transformers(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    shard(folder)
    files = sorted(folder.glob("model-*.safetensors"))
    parts = [load_file(file) for file in files]
    name = next(iter(parts[0]))
    save_file({**parts[1], name: parts[0][name] + 1}, files[1], metadata={"format": "pt"})
    refuse(folder, f"has the tensor {re.escape(name)} in two files")


def test_the_shard_is_named(folder: Path) -> None:
    shard(folder)
    os.truncate(folder / "model-00002-of-00003.safetensors", 100)
    refuse(folder, "model-00002-of-00003.safetensors is not a complete safetensors file")


# -- JSON ----------------------------------------------------------------------------------------------------

JSONS = [CONFIG, TOKENIZER, "generation_config.json", "preprocessor_config.json", "processor_config.json"]
JSONS += [
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "video_preprocessor_config.json",
]
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot read .*: JSONDecodeError"),
    "list": (b"[]", "does not hold a JSON object"),
    "number": (b"1", "does not hold a JSON object"),
    "null": (b"null", "does not hold a JSON object"),
    "string": (b'"x"', "does not hold a JSON object"),
    "cut": (b'{"a": [1, 2', "cannot read .*: JSONDecodeError"),
    "mark of order": (b"\xef\xbb\xbf{}", "cannot read .*: JSONDecodeError: Unexpected UTF-8 BOM"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "cannot read .*: UnicodeDecodeError"),
    "no UTF-8": (b'{"a": "\xff"}', "cannot read .*: UnicodeDecodeError"),
    "deep": (b'{"a":' * 100 + b"1" + b"}" * 100, "more than 64 levels deep"),
    "deeper": (b"[" * 200_000, "cannot read .*: RecursionError"),
    "a number of 5000 digits": (
        b'{"a": ' + b"9" * 5000 + b"}",
        "cannot read .*: ValueError: Exceeds the limit",
    ),
    "large": (b" " * ((16 << 20) + 1), "has 16777217 bytes; at most 16777216"),
}


@pytest.mark.parametrize("name", JSONS)
@pytest.mark.parametrize("kind", BROKEN)
def test_json_that_is_none(folder: Path, name: str, kind: str) -> None:
    content, message = BROKEN[kind]
    (folder / name).write_bytes(content)
    refuse(folder, message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (INDEX, b"[" * 200_000, "cannot read .*index.json: RecursionError"),
        (INDEX, b"[]", "index.json does not hold"),
        ("tokenizer.json", b"[" * 200_000, "cannot load the tokenizer"),
        ("tokenizer.json", b"[]", "cannot load the tokenizer"),
        ("tokenizer.json", b'{"version": "1.0"}', "cannot load the tokenizer"),
        ("quantize_config.json", b"[]", "does not hold a JSON object"),
        ("chat_template.jinja", b"\xff", "cannot load"),
    ],
)
def test_other_files_that_are_none(folder: Path, name: str, content: bytes, message: str) -> None:
    if name == INDEX:
        shard(folder)
    (folder / name).write_bytes(content)
    refuse(folder, message)


def test_a_tokenizer_beyond_all_size(folder: Path) -> None:
    """512 MB that take no room on the disk."""
    os.truncate(folder / "tokenizer.json", (512 << 20) + 1)
    refuse(folder, "tokenizer.json has 536870913 bytes; at most")


TYPES = [None, -1, "x", [1], {"a": {}}, True]


@pytest.mark.parametrize("value", TYPES, ids=repr)
@pytest.mark.parametrize(
    ("file", "key"),
    [
        (TOKENIZER, "eos_token"),
        (TOKENIZER, "added_tokens_decoder"),
        (TOKENIZER, "extra_special_tokens"),
        (TOKENIZER, "tokenizer_class"),
        (TOKENIZER, "model_max_length"),
        (TOKENIZER, "fast_tokenizer_files"),
        ("generation_config.json", "eos_token_id"),
        ("preprocessor_config.json", "size"),
        ("preprocessor_config.json", "image_mean"),
        ("preprocessor_config.json", "crop_size"),
        ("preprocessor_config.json", "image_processor_type"),
        (CONFIG, "rope_scaling"),
        (CONFIG, "dtype"),
        (CONFIG, "id2label"),
        (CONFIG, "image_token_index"),
        (CONFIG, "return_dict"),
    ],
)
def test_types_of_values(folder: Path, file: str, key: str, value: Any) -> None:
    """Loaded or refused in one line: nothing else comes out."""
    edit(file, **{key: value})(folder)
    try:
        checkpoint.load(folder, "float32")
    except VtpError as error:
        assert "\n" not in str(error) and "still waiting" not in str(error)


ESCAPE = "\x1b[2J"
STRANGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "tokenizer.json": lambda told: told["added_tokens"][0].update({ESCAPE: True}),
    TOKENIZER: lambda told: told.update(pad_token={"__type": "AddedToken", "content": "<pad>", ESCAPE: 1}),
    "special_tokens_map.json": lambda told: told.update(pad_token={"content": "<pad>", ESCAPE: 1}),
}


@pytest.mark.parametrize("name", STRANGE)
def test_unknown_keys_of_added_tokens_are_refused(folder: Path, name: str, capfd: Any) -> None:
    """The library would print them as they stand."""
    file = folder / name
    told = json.loads(file.read_text()) if file.exists() else {}
    STRANGE[name](told)
    file.write_text(json.dumps(told))
    refuse(folder, f"{name}: an added token has the key '.x1b.2J', which is not served; take it out")
    assert capfd.readouterr() == ("", "")
