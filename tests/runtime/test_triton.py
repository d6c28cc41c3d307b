"""A Triton model repository: its configs, and its front and ensembles run on a stand-in for the server."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtp.engines import open_graph
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands import build
from vtp.runtime.triton.repository import write_repository

Config = dict[str, Any]  # every field is a list of what stands under its name


def parse(text: str) -> Config:
    """Protobuf's text format, as far as these files use it."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[\w.+-]+|[{}\[\]]', text)

    def block(place: int) -> tuple[Config, int]:
        found: Config = {}
        while place < len(tokens) and tokens[place] != "}":
            name, value = tokens[place], tokens[place + 1]
            if value == "{":
                item, place = block(place + 2)
                found.setdefault(name, []).append(item)
            elif value == "[":
                end = tokens.index("]", place)
                if tokens[place + 2] == "{":
                    item, place = block(place + 3)
                    found.setdefault(name, []).append(item)
                    place += 1
                else:
                    found[name] = [int(one) for one in tokens[place + 2 : end]]
                    place = end
            else:
                found.setdefault(name, []).append(value.strip('"'))
                place += 1
            place += 1
        return found, place

    return block(0)[0]


@pytest.fixture(scope="module")
def repository(exported: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "models"
    write_repository(open_bundle(exported("vispruner").folder), folder)
    return folder


def configs(repository: Path) -> dict[str, Config]:
    return {path.name: parse((path / "config.pbtxt").read_text()) for path in repository.iterdir()}


# -- the files -----------------------------------------------------------------------------------------------


def test_every_model_has_its_config_and_files(repository: Path) -> None:
    found = configs(repository)
    assert sorted(found) == [
        "vtp",
        "vtp_image_3",
        "vtp_image_6",
        "vtp_projector",
        "vtp_pruner_3",
        "vtp_pruner_6",
        "vtp_vision_encoder",
    ]
    assert all(config["name"] == [name] for name, config in found.items())
    for name, config in found.items():
        kind = (config.get("platform") or config["backend"])[0]
        files = {path.name for path in (repository / name / "1").iterdir()}
        assert {
            "ensemble": not files,
            "python": "model.py" in files,
            "onnxruntime_onnx": "model.onnx" in files,
        }[kind]
    assert open_bundle(repository / "vtp" / "1" / "bundle", check_hashes=True)


def test_graphs_say_the_tensors_of_their_files(repository: Path) -> None:
    for name, config in configs(repository).items():
        if config.get("platform") != ["onnxruntime_onnx"]:
            continue
        engine = open_graph(repository / name / "1" / "model.onnx", "ort-cpu")
        for kind, specs in (("input", engine.inputs), ("output", engine.outputs)):
            said = {one["name"][0]: one["dims"] for one in config[kind]}
            assert said == {
                spec.name: [axis if isinstance(axis, int) else -1 for axis in spec.shape]
                for spec in specs.values()
            }


@pytest.mark.skipif(
    importlib.util.find_spec("tritonclient") is None,
    reason="no tritonclient: pip install 'tritonclient[grpc]'",
)
def test_configs_are_of_triton_s_schema(repository: Path) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    for path in repository.glob("*/config.pbtxt"):
        config = text_format.Parse(path.read_text(), ModelConfig())
        assert config.name == path.parent.name and config.input and config.output


# -- the server ----------------------------------------------------------------------------------------------


class Server:
    """Stands in for Triton: serves a repository's graphs and ensembles as their configs say."""

    def __init__(self, repository: Path) -> None:
        self.repository, self.configs, self.asked = repository, configs(repository), list[str]()

    def infer(self, name: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        config = self.configs[name]
        assert set(tensors) == {one["name"][0] for one in config["input"]}
        self.asked.append(name)
        if config["platform"] == ["ensemble"]:
            known = dict(tensors)
            for step in config["ensemble_scheduling"][0]["step"]:
                fed = {one["key"][0]: known[one["value"][0]] for one in step["input_map"]}
                made = self.infer(step["model_name"][0], fed)
                for one in step["output_map"]:
                    assert one["value"][0] not in known, "two steps give one tensor"
                    known[one["value"][0]] = made[one["key"][0]]
            return {one["name"][0]: known[one["name"][0]] for one in config["output"]}
        engine = open_graph(self.repository / name / "1" / "model.onnx", "ort-cpu")
        return {
            key: value.numpy()
            for key, value in engine.run({k: engine.put(v) for k, v in tensors.items()}).items()
        }


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array


def backend_of(server: Server) -> types.ModuleType:
    """triton_python_backend_utils, as far as the front uses it."""
    module = types.ModuleType("triton_python_backend_utils")

    class InferenceResponse:
        def __init__(self, output_tensors: list[Tensor], error: Any = None) -> None:
            self.tensors, self._error = {tensor.name: tensor for tensor in output_tensors}, error

        def has_error(self) -> bool:
            return self._error is not None

        def error(self) -> Any:
            return self._error

    class TritonError:
        def __init__(self, message: str) -> None:
            self._message = message

        def message(self) -> str:
            return self._message

    class InferenceRequest:
        def __init__(
            self, model_name: str, requested_output_names: list[str], inputs: list[Tensor], **_: Any
        ) -> None:
            self.call = (model_name, {tensor.name: tensor.array for tensor in inputs})
            self.names = requested_output_names

        def exec(self) -> InferenceResponse:
            try:
                made = server.infer(*self.call)
            except KeyError as error:
                return InferenceResponse([], TritonError(f"no model {error}"))
            return InferenceResponse([Tensor(name, made[name]) for name in self.names])

    parts: dict[str, Any] = {
        "Tensor": Tensor,
        "InferenceRequest": InferenceRequest,
        "InferenceResponse": InferenceResponse,
        "TritonError": TritonError,
        "PreferredMemory": lambda kind, place: (kind, place),
        "TRITONSERVER_MEMORY_CPU": 0,
        "get_input_tensor_by_name": lambda request, name: request.get(name),
        "get_output_tensor_by_name": lambda response, name: response.tensors.get(name),
    }
    for key, value in parts.items():
        setattr(module, key, value)
    return module


@pytest.fixture
def front(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The front, started as Triton starts it: by its model.py."""
    server = Server(repository)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend_of(server))
    spec = importlib.util.spec_from_file_location("model", repository / "vtp" / "1" / "model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    parameters = {
        one["key"][0]: {"string_value": one["value"][0]["string_value"][0]}
        for one in server.configs["vtp"]["parameters"]
    }
    config = {"name": "vtp", "parameters": parameters}
    model.initialize(
        {
            "model_config": json.dumps(config),
            "model_repository": str(repository / "vtp"),
            "model_version": "1",
        }
    )
    model.server = server
    yield model
    model.finalize()


def request(picture: Path, **more: Any) -> dict[str, Tensor]:
    given = {
        "IMAGE": np.frombuffer(picture.read_bytes(), np.uint8),
        "PROMPT": np.array([b"what color is the star ?"], dtype=object),
        "MAX_NEW_TOKENS": np.array([5], np.int32),
        **more,
    }
    return {name: Tensor(name, array) for name, array in given.items() if array is not None}


def test_the_front_answers_as_the_pipeline(
    front: Any, picture_file: Path, exported: Callable[[str], Any]
) -> None:
    keep = np.array([3], np.int32)
    responses = front.execute([request(picture_file), request(picture_file, KEEP_TOKENS=keep)])
    assert (
        front.server.asked[:2] == ["vtp_image_6", "vtp_vision_encoder"]
        and "vtp_image_3" in front.server.asked
    )
    with Pipeline.load(exported("vispruner").folder, "ort-cpu") as pipe:
        for response, kept in zip(responses, (6, 3), strict=True):
            wanted = pipe.generate(
                picture_file, "what color is the star ?", max_new_tokens=5, keep_tokens=kept
            )
            found = {name: tensor.array.tolist() for name, tensor in response.tensors.items()}
            assert found["TOKEN_IDS"] == wanted.token_ids and found["KEPT"] == wanted.kept
            assert found["TEXT"] == [wanted.text.encode()] and found["VISUAL_TOKENS"] == [16, kept]
    assert set(found) == {one["name"][0] for one in front.server.configs["vtp"]["output"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"IMAGE": None}, "IMAGE (the bytes of a picture file) and PROMPT are both needed"),
        ({"IMAGE": np.zeros(9, np.uint8)}, "is not a picture that can be read"),
        ({"KEEP_TOKENS": np.array([4], np.int32)}, "keep_tokens 4 is not in this bundle, which holds 3, 6"),
        ({"PROMPT": np.array([b"\xff"], dtype=object)}, "PROMPT is not UTF-8"),
    ],
)
def test_a_bad_request_is_its_own_error(front: Any, picture_file: Path, change: dict, message: str) -> None:
    bad, good = front.execute([request(picture_file, **change), request(picture_file)])
    assert message in bad.error().message() and "\n" not in bad.error().message()
    assert not good.has_error()


def test_an_ensemble_that_fails_is_one_line(front: Any, picture_file: Path) -> None:
    del front.server.configs["vtp_image_6"]
    (response,) = front.execute([request(picture_file)])
    assert response.error().message() == "Triton's vtp_image_6 failed: no model 'vtp_image_6'"


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command_writes_a_repository_or_nothing(
    exported: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, target = str(exported("none").folder), tmp_path / "models"
    capsys.readouterr()
    assert build.main([bundle, "--triton", str(target)]) == 0
    assert "tritonserver --model-repository" in capsys.readouterr().out
    for argv, message, code in (
        (["--triton", str(target)], "exists; choose a folder that does not exist", 2),
        (["--triton", str(tmp_path / "b"), "--engine", "tensorrt"], "leave out --engine", 2),
        ([], "give --engine tensorrt or tensorrt-rtx, or --triton DIR", 2),
    ):
        assert build.main([bundle, *argv]) == code
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def test_weights_are_not_stored_twice(repository: Path) -> None:
    for model in repository.glob("vtp_*/1/*.data"):
        assert model.samefile(repository / "vtp" / "1" / "bundle" / model.name)
