"""A tensor of OpenVINO's engine: an array in the host's memory, of which the library makes no copy."""

from __future__ import annotations

from typing import Any

import numpy as np

from vtp.engines.base import Value
from vtp.engines.errors import VtpError
from vtp.engines.openvino.library import load_openvino


class OvValue:
    """A tensor in the host's memory.

    owner  whose memory the array lies in, where it is not its own
    """

    def __init__(self, array: np.ndarray, owner: object = None) -> None:
        # ONNX Runtime's int64 is C's long long, which OpenVINO does not know where long is as long.
        self.array = array.view(np.dtype(array.dtype.str))
        self.shape: tuple[int, ...] = array.shape
        self.dtype = array.dtype
        self._owner = owner
        self._tensor: Any = None

    @property
    def tensor(self) -> Any:
        """OpenVINO's tensor in the same memory."""
        if self._tensor is None:
            self._tensor = load_openvino().Tensor(self.array, shared_memory=True)
        return self._tensor

    def numpy(self) -> np.ndarray:
        """Copy the tensor."""
        return np.array(self.array)

    def view(self) -> np.ndarray:
        """The tensor's own memory."""
        return self.array

    def update(self, array: np.ndarray) -> None:
        """Overwrite the tensor in place; VtpError for another shape or dtype."""
        if array.shape != self.shape or array.dtype != self.dtype:
            raise VtpError(
                f"a tensor {self.dtype}{list(self.shape)} cannot take {array.dtype}{list(array.shape)}; "
                "give the same shape and dtype"
            )
        self.array[...] = array


def adopted(value: Value) -> OvValue:
    """A value of another engine in the host's memory, as one of this engine's own: nothing is copied."""
    return value if isinstance(value, OvValue) else OvValue(value.view(), value)


def array_of(value: Value) -> np.ndarray:
    """The array of a value that this engine made."""
    return value.array  # type: ignore[attr-defined]
