"""OpenVINO by transformers' own exporter, unpruned: an image encoder, a decoder that keeps its cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from vtp.bench.compare.peer_onnx import EXPORT, TwoParts
from vtp.engines.openvino.library import load_openvino


class TransformersOpenvino(TwoParts):
    """Float32 as everybody here, tuned for latency."""

    needs = (("openvino", "pip install 'vtp-edge[peers]'"), ("torch", EXPORT), ("transformers", EXPORT))
    folder = "openvino"

    def export(self, module: Any, inputs: dict[str, Any], dynamic: bool) -> Any:
        """See `TwoParts`."""
        load_openvino()  # without its telemetry, which the exporter would bring along
        from transformers.exporters import OpenVINOConfig, OpenVINOExporter

        return OpenVINOExporter().export(module, inputs, OpenVINOConfig(dynamic=dynamic, stateful=dynamic))

    def open_graphs(self) -> None:
        """See `TwoParts`."""
        core = load_openvino().Core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.spec.threads,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._encoder, self._decoder = (
            core.compile_model(
                str(self.made() / name / "openvino_model.xml"), "CPU", settings
            ).create_infer_request()
            for name in ("encoder", "decoder")
        )
        self._known = {name for port in self._decoder.model_inputs for name in port.get_names()}

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """See `TwoParts`."""
        return self._encoder.infer([pixels])[0]

    def forget(self) -> None:
        """See `TwoParts`."""
        self._decoder.reset_state()

    def decode(self, embeds: np.ndarray, places: np.ndarray) -> np.ndarray:
        """See `TwoParts`."""
        feeds = {
            "inputs_embeds": np.ascontiguousarray(embeds),
            "position_ids": places,
            "logits_to_keep": np.array(1),
            "beam_idx": np.zeros(1, np.int32),
        }
        answer = self._decoder.infer({name: value for name, value in feeds.items() if name in self._known})
        return np.array(answer["logits"], np.float32).reshape(-1)
