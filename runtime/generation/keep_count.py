"""Which of a bundle's keep-counts a request gets: the one it names, the default, or one within a budget."""

from __future__ import annotations

from collections.abc import Callable

from vtp.engines import UsageError
from vtp.engines.errors import quoted_argument
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.generation.arguments import is_number, is_whole
from vtp.runtime.generation.options import GenerateOptions
from vtp.runtime.machine.conditions import Conditions


def choose_keep(
    options: GenerateOptions, manifest: Manifest, engine: str, conditions: Callable[[], Conditions]
) -> int:
    """The keep-count of a request; `conditions` looks up what times measured here depend on."""
    if options.budget_ms is None:
        return _held_keep(options.keep_tokens, manifest)
    if options.keep_tokens is not None:
        raise UsageError("give either keep_tokens or budget_ms, not both")
    return _held_keep(_largest_within(options.budget_ms, manifest, engine, conditions), manifest)


def _held_keep(wanted: int | None, manifest: Manifest) -> int:
    """One of the bundle's own keep-counts; None: its default."""
    visual = manifest.visual
    keep = visual.default_keep if wanted is None else wanted
    held = ", ".join(map(str, visual.keep))
    if not is_whole(keep):
        raise UsageError(
            f"keep_tokens {quoted_argument(wanted)} is not a whole number; choose one of those that this "
            f"bundle holds: {held}"
        )
    if keep not in visual.keep:
        raise UsageError(
            f"keep_tokens {quoted_argument(wanted)} is not in this bundle, which holds {held}; "
            "choose one of them, or export with --keep-tokens"
        )
    return int(keep)


def _largest_within(
    budget_ms: float, manifest: Manifest, engine: str, conditions: Callable[[], Conditions]
) -> int:
    """The largest keep-count within a time, from what vtp-calib wrote into the manifest."""
    if not (is_number(budget_ms) and budget_ms > 0):
        raise UsageError(f"budget_ms {quoted_argument(budget_ms)} is not a number of milliseconds above 0")
    times = measured_times("budget_ms", manifest, engine, conditions)
    within = [keep for keep, time_ms in times.items() if time_ms <= budget_ms]
    if not within:
        raise UsageError(
            f"budget_ms {budget_ms:g} is too little for every keep-count; the fastest takes "
            f"{min(times.values()):.1f} ms"
        )
    return max(within)


def measured_times(
    what: str, manifest: Manifest, engine: str, conditions: Callable[[], Conditions]
) -> dict[int, float]:
    """Keep-count -> milliseconds to the first token, as vtp-calib measured them under these conditions.

    what  the option that needs them. UsageError where they were not measured, or under other conditions
    """
    known = manifest.calibration
    if known.get("engine") != engine:
        made = f"measured on {known['engine']}" if "engine" in known else "not calibrated"
        raise UsageError(
            f"{what} needs times measured on {engine}; this bundle is {made}; run: vtp-calib keep"
        )
    if differs := conditions().differs_from(known.get("conditions")):
        raise UsageError(
            f"{what} needs times measured under these conditions; this bundle's were not: {differs}; "
            "run: vtp-calib keep"
        )
    return {int(keep): tried["ttft_ms"] for keep, tried in known["tried"].items()}
