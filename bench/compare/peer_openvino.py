"""OpenVINO by transformers' own exporter, unpruned: an image encoder, a decoder that keeps its cache.

In float32, and in few bits by NNCF, which is OpenVINO's own quantiser.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.compare.peer_onnx import EXPORT, TwoParts
from vtp.engines.disk.whole import whole_folder
from vtp.engines.openvino.library import load_openvino
from vtp.scenes import examples_dir

_PEERS = "pip install 'vtp-edge[peers]'"
_FILE = "openvino_model.xml"
_PICTURES = 2  # as many as `vtp.bench.common.fewer_bits` takes


class TransformersOpenvino(TwoParts):
    """Float32 as everybody here, tuned for latency."""

    needs: tuple[tuple[str, str], ...] = (("openvino", _PEERS), ("torch", EXPORT), ("transformers", EXPORT))
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
            core.compile_model(str(self.made() / name / _FILE), "CPU", settings).create_infer_request()
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


class Int8(TransformersOpenvino):
    """Encoder post-training in int8 on built-in pictures, decoder with int8 weights, both by NNCF."""

    needs = (("nncf", _PEERS), *TransformersOpenvino.needs)
    folder = "openvino-int8"

    def prepare(self) -> None:
        """Quantise the float export, which is made first if it is not there."""
        plain = TransformersOpenvino(self.spec)
        if not plain.made().exists():
            plain.prepare()
        with whole_folder(self.made()) as aside:
            self.write_encoder(plain.made() / "encoder", aside / "encoder")
            _rewrite(plain.made() / "decoder", aside / "decoder", self.quantise_decoder)

    def write_encoder(self, source: Path, target: Path) -> None:
        """Write the encoder in int8."""
        _rewrite(source, target, self.quantise_encoder)

    def quantise_encoder(self, model: Any) -> Any:
        """Weights and activations in int8; the ranges are those of as many pictures as vtp's own has."""
        from transformers import AutoImageProcessor

        made: Any = AutoImageProcessor.from_pretrained(self.spec.model)
        pixels = [pixel_values(made, path) for path in sorted(examples_dir().glob("*.png"))[:_PICTURES]]
        nncf = load_nncf()
        return nncf.quantize(
            model,
            nncf.Dataset(pixels),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(pixels),
        )

    def quantise_decoder(self, model: Any) -> Any:
        """Weights alone in int8; the CPU rounds activations on the way."""
        nncf = load_nncf()
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)


class Int4(Int8):
    """The decoder's weights in int4, symmetric, groups of 32, the head included."""

    folder = "openvino-int4"

    def write_encoder(self, source: Path, target: Path) -> None:
        """The same encoder, whose ranges take minutes to measure."""
        eight = Int8(self.spec)
        if not eight.made().exists():
            eight.prepare()
        shutil.copytree(eight.made() / "encoder", target)

    def quantise_decoder(self, model: Any) -> Any:
        """See `Int8`."""
        nncf = load_nncf()
        return nncf.compress_weights(
            model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=32, all_layers=True
        )


def _rewrite(source: Path, target: Path, change: Callable[[Any], Any]) -> None:
    """Write the model of folder `source`, changed, into the new folder `target`."""
    openvino = load_openvino()
    target.mkdir()
    changed = change(openvino.Core().read_model(source / _FILE))
    openvino.save_model(changed, target / _FILE, compress_to_fp16=False)


def load_nncf() -> Any:
    """The module nncf, which tells Google Analytics of its use unless it believes to run in a CI."""
    os.environ.setdefault("NNCF_CI", "1")
    import nncf

    return nncf


def pixel_values(made: Any, path: Path) -> np.ndarray:
    """pixel_values [1,3,H,W] float32 of a picture, by the model's own processor."""
    from PIL import Image

    given = made(Image.open(path).convert("RGB"), return_tensors="np")
    return np.asarray(given["pixel_values"], np.float32)
