"""From bundles to replicas: what each of them serves, decided once, on the machine of vtp-serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vtp.engines import AUTO, UsageError, capabilities, choose_engine
from vtp.runtime.bundle.folder import open_bundle
from vtp.serve.scale.cluster import Cluster
from vtp.serve.scale.front import Remote
from vtp.serve.scale.replica import Plan
from vtp.serve.settings import Settings


def remote_models(
    address: str,
    replicas: int,
    bundles: Mapping[str, str],
    options: Mapping[str, Any],
    settings: Settings,
    slo_ms: float | None = None,
    min_keep: int = 1,
) -> Remote:
    """Models by name -> bundle, not yet started, on the Ray cluster at `address`.

    replicas  of each bundle
    options   keyword arguments of `Scheduler.load`; without threads, the machines' cores are shared out

    Raises UsageError or VtpError for what shows before anything is started: no bundle, no Ray, no cluster.
    """
    if replicas < 1:
        raise UsageError(f"--replicas {replicas} is not a number of processes; give 1 or more")
    gpus = max(_gpus(bundle, options["engine"]) for bundle in bundles.values())
    inner = replace(settings, key=None, allowed_hosts=(), cors_origins=())
    plans = [
        Plan.of(name, bundle, options=options, settings=inner, slo_ms=slo_ms, min_keep=min_keep)
        for name, bundle in bundles.items()
    ]
    return Remote(Cluster(address, plans, replicas, gpus), list(bundles))


def _gpus(bundle: str, engine: str) -> int:
    """How many a replica needs. What "auto" means is decided here."""
    manifest = open_bundle(Path(bundle)).manifest
    first = engine.partition(",")[0].strip()
    if first == AUTO or "=" in first:
        first = choose_engine(AUTO, manifest.dtype, target=manifest.target).engine
    return 0 if capabilities(first).on_cpu else 1
