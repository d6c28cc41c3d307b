"""What runs inside Triton's Python backend: a bundle's pipeline, its image stages asked of the ensemble.

Triton imports this through a model.py of one line and calls the three methods; the module
`triton_python_backend_utils` only exists inside the server.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vtp.engines import VtpError
from vtp.runtime.opening import Opening
from vtp.runtime.pipeline import DEFAULT_NEW_TOKENS, Pipeline
from vtp.runtime.triton.repository import image_model, image_outputs


class TritonPythonModel:
    """One instance of the front; Triton gives it one request at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle that lies beside model.py."""
        import triton_python_backend_utils as backend

        self._backend: Any = backend
        config = json.loads(args["model_config"])
        self._name: str = config["name"]
        said = {key: value["string_value"] for key, value in config["parameters"].items()}
        # A server without the ONNX Runtime backend has no ensemble to ask: "local" runs all of it here.
        image = self._image if said["image_stages"] == "ensemble" else None
        folder = Path(args["model_repository"]) / args["model_version"] / "bundle"
        self._pipe = Pipeline.load(folder, said["engine"], opening=Opening(image=image))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer every request; what is wrong with one is its own error."""
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        """Free the bundle."""
        self._pipe.close()

    def _respond(self, request: Any) -> Any:
        backend = self._backend
        try:
            tensors = [backend.Tensor(name, array) for name, array in self._answer(request).items()]
        except VtpError as error:
            return backend.InferenceResponse(output_tensors=[], error=backend.TritonError(str(error)))
        return backend.InferenceResponse(output_tensors=tensors)

    def _answer(self, request: Any) -> dict[str, np.ndarray]:
        image, prompt = self._read(request, "IMAGE"), self._read(request, "PROMPT")
        most, keep = self._read(request, "MAX_NEW_TOKENS"), self._read(request, "KEEP_TOKENS")
        if image is None or prompt is None:
            raise VtpError("IMAGE (the bytes of a picture file) and PROMPT are both needed")
        result = self._pipe.generate(
            image.astype(np.uint8).tobytes(),
            _string(prompt),
            max_new_tokens=DEFAULT_NEW_TOKENS if most is None else int(most.ravel()[0]),
            keep_tokens=None if keep is None else int(keep.ravel()[0]),
        )
        return {
            "TEXT": np.array([result.text.encode()], dtype=object),
            "TOKEN_IDS": np.array(result.token_ids, np.int64),
            "VISUAL_TOKENS": np.array([*result.visual_tokens], np.int32),
            "KEPT": np.array(result.kept, np.int64),
        }

    def _read(self, request: Any, name: str) -> np.ndarray | None:
        tensor = self._backend.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy()

    def _image(self, keep: int, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Ask the ensemble for the image tensors of one picture."""
        backend, names = self._backend, list(image_outputs(self._pipe.bundle, keep))
        request = backend.InferenceRequest(
            model_name=image_model(self._name, keep),
            requested_output_names=names,
            inputs=[backend.Tensor("pixel_values", pixels)],
            preferred_memory=backend.PreferredMemory(backend.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise VtpError(f"Triton's {image_model(self._name, keep)} failed: {response.error().message()}")
        return {name: backend.get_output_tensor_by_name(response, name).as_numpy() for name in names}


def _string(array: np.ndarray) -> str:
    item = array.ravel()[0]
    try:
        return item.decode() if isinstance(item, bytes) else str(item)
    except UnicodeDecodeError as error:
        raise VtpError("PROMPT is not UTF-8") from error
