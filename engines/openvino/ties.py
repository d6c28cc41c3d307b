"""Makes OpenVINO's TopK choose the lower index of equal scores, as ONNX and every other engine do.

OpenVINO's reader of ONNX writes a TopK whose equal scores come in any order, and an ArgMax as such a TopK:
a picture with two patches alike would keep other tokens than on ONNX Runtime. A later version of the operator
(opset 11) has a stable order.
"""

from __future__ import annotations

from typing import Any

from vtp.engines.openvino.library import load_openvino

OPERATOR = "TopK"


def order_ties(model: Any) -> None:
    """Replace every TopK of a model by one that gives equal scores by rising index. In place."""
    for node in [node for node in model.get_ordered_ops() if node.get_type_name() == OPERATOR]:
        stable = _stable(node)
        for old, new in zip(node.outputs(), stable.outputs(), strict=True):
            # What asks for an output by name asks the new node.
            new.get_tensor().set_names(old.get_tensor().get_names())
            old.replace(new)


def _stable(node: Any) -> Any:
    said = node.get_attributes()
    data, count = node.input_value(0), node.input_value(1)
    order = "index" if said["sort"] == "index" else "value"  # with "none" nothing would be stable
    kind = said["index_element_type"]
    return load_openvino().opset11.topk(data, count, said["axis"], said["mode"], order, kind, True)
