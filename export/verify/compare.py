"""The comparator of every fidelity check; it lies in `vtp.runtime.compare`, for the parity gate uses it."""

from vtp.runtime.compare import LIMITS, Comparison, Limits, compare, limits_of

__all__ = ["LIMITS", "Comparison", "Limits", "compare", "limits_of"]
