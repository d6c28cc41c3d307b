"""The same export of transformers in few bits, made by ONNX Runtime's own quantisers."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

from vtp.bench.compare.peer_onnx import TransformersOnnx
from vtp.engines.disk.whole import whole_folder
from vtp.engines.ort.library import load_onnxruntime

# What has a kernel for dynamic int8; the picture's convolution is faster in float.
_LAYERS = ("MatMul", "Gemm", "Attention")


class Int8(TransformersOnnx):
    """Encoder and decoder by `quantize_dynamic` as it comes: int8 weights, activations rounded on the way."""

    folder = "transformers-onnx-int8"

    def prepare(self) -> None:
        """Quantise the float export, which is made first if it is not there."""
        plain = TransformersOnnx(self.spec)
        if not plain.made().exists():
            plain.prepare()
        with whole_folder(self.made()) as aside:
            for name in ("encoder", "decoder"):
                (aside / name).mkdir()
                source, target = (folder / name / "model.onnx" for folder in (plain.made(), aside))
                self.quantise(name, source, target)

    def quantise(self, name: str, source: Path, target: Path) -> None:
        """Write one of the two graphs in few bits."""
        quantise_int8(_folded(source) if name == "encoder" else source, target)


class Int4(Int8):
    """The decoder by `MatMulNBitsQuantizer` instead: int4, symmetric, blocks of 32, activations in int8."""

    folder = "transformers-onnx-int4"

    def quantise(self, name: str, source: Path, target: Path) -> None:
        """See `Int8`."""
        if name == "decoder":
            quantise_int4(source, target)
        else:
            super().quantise(name, source, target)


def quantise_int8(source: Any, target: Path) -> None:
    """Write a graph, given as a file or as a model, in dynamic int8 by ONNX Runtime's own tool."""
    tools = _tools("onnxruntime.quantization")
    tools.quantize_dynamic(
        source,
        target,
        op_types_to_quantize=list(_LAYERS),
        weight_type=tools.QuantType.QInt8,
        use_external_data_format=True,
    )


def _folded(source: Path) -> Any:
    """The graph with its constants folded, as the tool advises, and fused attention as it takes it.

    The fusion joins the weights of query, key and value by a Concat, and names their widths, which are equal;
    of an Attention that names them the tool leaves the weights in float, and that is a third of an encoder.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="vtp-fold-") as folder:
        folded = Path(folder) / "model.onnx"
        _tools("onnxruntime.quantization.shape_inference").quant_pre_process(
            str(source),
            str(folded),
            skip_symbolic_shape=True,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            external_data_location="model.onnx.data",
        )
        model = onnx.load(folded)
    for node in model.graph.node:
        widths = [one for one in node.attribute if one.name == "qkv_hidden_sizes"]
        if node.op_type == "Attention" and widths and len(set(widths[0].ints)) == 1:
            node.attribute.remove(widths[0])
    return model


def quantise_int4(source: Path, target: Path) -> None:
    """int4 by ONNX Runtime's own tool, rounded to the nearest."""
    import onnx

    tools = _tools("onnxruntime.quantization.matmul_nbits_quantizer")
    tool = tools.MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=True, accuracy_level=4)
    tool.process()
    tool.model.save_model_to_file(str(target), use_external_data_format=True)


def _tools(name: str) -> Any:
    """A module of ONNX Runtime's quantisers, once its telemetry is off."""
    load_onnxruntime()
    return importlib.import_module(name)
