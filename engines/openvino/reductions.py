"""Keeps sums along an axis apart from what is computed with them.

OpenVINO 2026.4 joins a sum that drops its axis with the addition after it, and then adds a vector along an
axis of the tensor before the sum: wrong numbers for batches of two and more, without a word. It joins nothing
whose result somebody else reads, so each such sum becomes an output that nobody takes.
"""

from __future__ import annotations

from typing import Any


def keep_reductions_apart(model: Any) -> None:
    """Give the model an output more for every reduction that drops its axes. In place."""
    found = [
        node.output(0)
        for node in model.get_ordered_ops()
        if node.get_type_name().startswith("Reduce") and not node.get_attributes().get("keep_dims", True)
    ]
    if found:
        model.add_outputs(found)
