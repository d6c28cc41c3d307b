"""Whether the requests of a bundle can share its steps, and how many of them."""

from __future__ import annotations

from vtp.engines import UsageError
from vtp.engines.errors import quoted_argument
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.generation.arguments import whole
from vtp.runtime.stages.runner import StageRunner


def why_in_turn(manifest: Manifest, engine: str, runner: StageRunner) -> str | None:
    """Why requests have to be answered one after the other, in a line; None: they can share steps."""
    if runner.rows_together == 1:
        return f"the graphs of this bundle take one prompt at a time on {engine}"
    if not runner.shares_rows:
        return f"{engine} keeps the cache where its rows cannot be used one by one"
    steps = [manifest.stages_for("step", keep) for keep in manifest.visual.keep]
    if any(one != steps[0] for one in steps):
        return "the keep-counts of this bundle have steps of their own"
    return None


def slot_count(wanted: object, most: int) -> int:
    """`wanted` as a number of slots; UsageError for less than one or more than the graphs were made for."""
    count = whole("slots", wanted)
    if count > most:
        raise UsageError(
            f"slots {quoted_argument(wanted)} is more than the {most} prompts that this bundle's graphs take "
            f"together; choose 1 to {most}"
        )
    return count
