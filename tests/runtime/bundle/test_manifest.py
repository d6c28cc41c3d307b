"""The manifest: written and read back the same, and refused in one line for anything else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vtp.engines import VtpError
from vtp.runtime.bundle.manifest import ROLES, SCHEMA, GenerationInfo, parse_manifest, role_of
from vtp.runtime.bundle.memory import cache_bytes

Data = dict[str, Any]


@pytest.fixture(scope="module")
def text(exported: Callable[[str], Any]) -> str:
    """The manifest of a bundle with two decoder stages and two keep-counts."""
    return (exported("adaptprune").folder / "manifest.json").read_text(encoding="utf-8")


@pytest.fixture
def data(text: str) -> Data:
    return json.loads(text)


def refuse(data: Any, match: str) -> None:
    with pytest.raises(VtpError, match=match) as caught:
        parse_manifest(data if isinstance(data, str) else json.dumps(data))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_round_trip(text: str) -> None:
    manifest = parse_manifest(text)
    assert manifest.to_json() == text
    assert parse_manifest(manifest.to_json()) == manifest


def test_stages_of_one_moment_and_keep(text: str) -> None:
    manifest = parse_manifest(text)
    names = [stage.name for stage in manifest.stages_for("prefill", 4)]
    assert names == ["embed_tokens", "splice", "decoder_head", "pruner", "decoder"]
    files = {stage.file for keep in (4, 7) for stage in manifest.stages_for("prefill", keep)}
    assert {"pruner_4.onnx", "pruner_7.onnx"} <= files


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "{}", "\ufeff{}", "[" * 100_000])
def test_what_is_no_manifest(text: str) -> None:
    refuse(text, "manifest.json")


@pytest.mark.parametrize("version", [0, 3, "1", "2", None, [], 1.5, True, 1.0])
def test_unknown_schema_says_which_is_read(data: Data, version: Any) -> None:
    refuse({**data, "schema": version}, f"schema version .*this vtp reads versions 1 to {SCHEMA}")


def of_schema_1(data: Data) -> Data:
    """The same manifest as it was written before stages had roles."""
    stages = [{key: value for key, value in stage.items() if key != "role"} for stage in data["stages"]]
    return {**data, "schema": 1, "stages": stages}


def test_an_older_manifest_is_read_as_its_newer_equal(data: Data) -> None:
    """The stages' names tell their roles; what is written again is of today's schema."""
    older = parse_manifest(json.dumps(of_schema_1(data)))
    assert older == parse_manifest(json.dumps(data)) and older.schema == SCHEMA
    assert json.loads(older.to_json())["schema"] == SCHEMA


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("vision_encoder", "encoder"),
        ("projector", "projector"),
        ("pruner", "pruner"),
        ("pruner_2", "pruner"),
        ("embed_tokens", "embed"),
        ("text_cues", "text_cues"),
        ("splice", "splice"),
        ("decoder_head", "decoder_head"),
        ("decoder_1", "decoder_head"),
        ("decoder", "decoder"),
    ],
)
def test_the_role_of_an_older_stage(name: str, role: str) -> None:
    assert role_of(name) == role


@pytest.mark.parametrize("role", ROLES)
def test_a_role_is_held_against_what_the_stage_does(data: Data, role: str) -> None:
    """Estimates of memory and reports go by it: every stage in turn gets a role that is not its own."""
    for stage in data["stages"]:
        own, stage["role"] = stage["role"], role
        telling = {own, role} & {"encoder", "embed", "pruner", "decoder"}
        if own != role and telling:
            refuse(data, "does not do what its role")
        stage["role"] = own


def test_ids_that_no_table_has(data: Data) -> None:
    for name in ("placeholder_ids", "eos_token_ids"):
        text = {**data["text"], name: [-5, *data["text"][name]]}
        refuse({**data, "text": text}, "names a token by a negative id")
    refuse({**data, "text": {**data["text"], "eos_token_ids": []}}, "eos_token_ids is empty")


def test_roles_that_are_not_known(data: Data) -> None:
    older = of_schema_1(data)
    refuse({**data, "schema": 1}, "unknown key 'role'")
    older["stages"][0]["name"] = "soup"
    refuse(older, "stage 'soup' tells no role")
    for stages in (None, [None], [{}], [{"name": 3}], "x"):
        refuse({**older, "stages": stages}, "manifest.stages")
    data["stages"][0]["role"] = "soup"
    refuse(data, "unknown role 'soup'; known: encoder")


def objects(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all objects that are sections of the manifest, one per kind of list or table entry."""
    if isinstance(value, dict):
        yield path
        for name, item in list(value.items()):
            if path[-1:] not in (
                ("parity",),
                ("calibration",),
                ("quantization",),
                ("options",),
                ("versions",),
            ):
                yield from objects(item, (*path, name))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from objects(value[0], (*path, 0))


def at(data: Data, path: tuple[Any, ...]) -> Any:
    for step in path:
        data = data[step]
    return data


# Tables whose keys are names, not fields: an entry more or less is judged by what it says.
TABLES = {"graphs", "files", "inputs", "outputs", "axes", "versions", "options", "special_tokens"}
TABLES |= {"parity", "calibration", "quantization"}  # what was measured, free in form


def sections(data: Data) -> list[tuple[Any, ...]]:
    return [path for path in objects(data) if not (path and path[-1] in TABLES)]


def test_unknown_keys_are_refused_at_every_level(data: Data) -> None:
    paths = sections(data)
    assert len(paths) > 20
    for path in paths:
        changed = copy.deepcopy(data)
        at(changed, path)["surprise"] = 1
        refuse(changed, "unknown key 'surprise'")


def test_missing_keys_are_refused_at_every_level(data: Data) -> None:
    optional = {
        "image",
        "text",
        "parity",
        "calibration",
        "quantization",
        "generation",
    }  # sections with defaults of their own; frame is of bundles for videos
    later = {"schema", "parity", "calibration", "quantization", "frame", "generation", "tower"}

    for path in sections(data):
        if path and path[0] in optional:
            continue
        for key in at(data, path):
            if key in later:
                continue
            changed = copy.deepcopy(data)
            del at(changed, path)[key]
            refuse(changed, f"lacks the key '{key}'")


@pytest.mark.parametrize("wrong", [None, "x", -1, True, [None], {"a": None}])
def test_wrong_types_are_refused_everywhere(data: Data, wrong: Any) -> None:
    """Put a wrong value in every field: it is refused, or it was allowed there (and then it parses)."""
    for path in sections(data):
        for key in at(data, path):
            changed = copy.deepcopy(data)
            at(changed, path)[key] = wrong
            try:
                parse_manifest(json.dumps(changed))
            except VtpError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("visual", "grid"), [4], "grid"),
        (("visual", "grid"), [2, 4], "count is not rows x columns"),
        (("visual", "grid"), [-4, -4], "grid"),
        (("visual", "keep"), [], "default_keep"),
        (("visual", "keep"), [4, 99], "keep is out of range"),
        (("visual", "default_keep"), 5, "default_keep"),
        (("stages", 0, "when"), "later", "unknown moment 'later'; known: image, prefill, step"),
        (("stages", 0, "file"), "other.onnx", "does not describe"),
        (("stages", 0, "keep"), 5, "unknown keep 5"),
        (("stages", 0, "inputs"), {}, r"feeds nothing to input \['pixel_values'\]"),
        (("stages", 0, "inputs"), {"pixel_values": "nowhere"}, r"reads \['nowhere'\] before any stage"),
        (("stages", 0, "outputs"), {"ghost": "ghost"}, "reads 'ghost'"),
        (("stages", 0, "outputs"), {}, r"reads \['image_features'\] before"),
        (("stages",), [], "do not give"),
        (("graphs", "decoder.onnx", "kv", "capacity"), 0, "cache of decoder.onnx has 0 places"),
        (("graphs", "decoder.onnx", "kv", "capacity"), 10**15, "cache of decoder.onnx"),
        (("graphs", "decoder.onnx", "kv", "layers"), [77], "does not fit its inputs at layer 77"),
        (("graphs", "decoder.onnx", "kv", "layers"), [], "is empty"),
        (("graphs", "decoder.onnx", "kv", "dtype"), "object", "does not fit its inputs"),
        (("graphs", "decoder.onnx", "kv", "heads"), -2, "is empty"),
        (("graphs", "decoder.onnx", "kv", "heads"), 77, "does not fit its inputs at layer"),
        (("graphs", "decoder.onnx", "kv", "head_dim"), 77, "does not fit its inputs at layer"),
        (("files", "tokenizer.json"), ..., "lacks tokenizer.json"),
        (("files", "decoder.onnx"), ..., "decoder.onnx is not one of manifest.files"),
        (("image", "kind"), "hologram", "unknown image preprocessing 'hologram'"),
        (("image", "mean"), [0.5], "mean must be three numbers"),
        (("text", "placeholder_ids"), [], "placeholder_ids is empty"),
        (("generation", "repetition_penalty"), 0, "repetition_penalty 0.0 is not above 0"),
        (("generation", "repetition_penalty"), 1e-46, "penalty 1e-46 is not above 0 and finite in float32"),
        (("generation", "repetition_penalty"), 1e39, r"penalty 1e\+39 is not above 0 and finite in float32"),
        (("generation", "min_new_tokens"), -1, "min_new_tokens is negative"),
        (("generation", "bad_words_ids"), [[5], []], "bad_words_ids holds an empty word"),
        (("generation", "bad_words_ids"), [[9999]], "names tokens that do not exist"),
        (("generation", "forced_eos_token_id"), [-1], "names tokens that do not exist"),
    ],
)
def test_contradictions_are_refused(data: Data, path: tuple[Any, ...], value: Any, message: str) -> None:
    place = at(data, path[:-1])
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    refuse(data, message)


def test_layers_may_differ_in_heads_and_head_dim(data: Data) -> None:
    """The cache says what the first layer has, the inputs what each has; a size is a number above 0."""
    graph = data["graphs"]["decoder.onnx"]
    [first] = graph["kv"]["layers"]
    graph["kv"]["layers"] = [first, 77]
    for part in ("key", "value"):
        other = {"dtype": "float32", "shape": ["batch", 7, "capacity", 24]}
        graph["inputs"][f"past_key_values.77.{part}"] = other
        graph["outputs"][f"present.77.{part}"] = other
    info = parse_manifest(json.dumps(data)).graphs["decoder.onnx"]
    assert info.kv is not None and (info.kv.heads, info.kv.head_dim) == (2, 8)
    assert cache_bytes(info) == 2 * (2 * 8 + 7 * 24) * info.kv.capacity * 4
    for layer, size in ((first, 77), (77, 0), (77, "width")):
        changed = copy.deepcopy(data)
        changed["graphs"]["decoder.onnx"]["inputs"][f"past_key_values.{layer}.value"]["shape"][3] = size
        refuse(changed, f"does not fit its inputs at layer {layer}")


def test_a_manifest_from_before_generation_settings_asks_for_none(data: Data) -> None:
    del data["generation"]
    assert parse_manifest(json.dumps(data)).generation == GenerationInfo()


def test_a_prefill_tensor_is_not_there_at_a_step(data: Data) -> None:
    step = next(
        stage for stage in data["stages"] if (stage["name"], stage["when"]) == ("decoder_head", "step")
    )
    step["inputs"]["inputs_embeds"] = "prompt_embeds"
    refuse(data, r"decoder_head \(step\) reads \['prompt_embeds'\] before any stage gives it")
