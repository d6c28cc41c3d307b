"""float16 ends at 65504: a bundle whose weights or values lie beyond it is refused, and told so."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from vtp.engines import Value, VtpError
from vtp.runtime.bundle.folder import Bundle

LARGEST = 65504
_CURE = "export with --dtype float32"


def rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A weight in another dtype. Raises VtpError, naming it, where a finite number becomes infinite."""
    result = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype:
        lost = result.isinf() & tensor.isfinite()
        if lost.any():
            raise VtpError(
                f"the weight {name} holds {float(tensor[lost][0]):.6g}, beyond float16's {LARGEST}; {_CURE}"
            )
    return result


def refuse_overflow(bundle: Bundle, keep: int, values: Mapping[str, Value]) -> None:
    """Raise VtpError for the first graph of a float16 bundle that gives infinite numbers or none.

    values  by the pipeline's names, as they flowed through the bundle for one picture and one prompt
    """
    if bundle.manifest.dtype != "float16":
        return
    for when in ("image", "prefill"):
        for stage in bundle.manifest.stages_for(when, keep):
            for name in stage.outputs.values():
                if name in values:
                    check_finite(values[name].numpy(), stage.file, name)


def check_finite(array: np.ndarray, graph: str, name: str) -> None:
    """Raise VtpError if the output `name` of a graph of a float16 bundle is not finite."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise VtpError(
            f"float16 overflow: {graph} gives {name} with numbers beyond float16's {LARGEST}; {_CURE}"
        )
