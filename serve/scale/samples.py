"""Metrics of many replicas as one text in Prometheus' format: each line says whose it is."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vtp.serve.counts import head, line

_SAMPLE = re.compile(r"(?P<name>[^{ ]+)(?:\{(?P<labels>.*)\})? (?P<value>[^ ]+)")


def merged(texts: Mapping[str, str]) -> str:
    """Replica -> its text, as one text; a label `replica` says which. Sums are for whoever reads them: a
    replica that was started again counts from zero, which Prometheus notices in its line alone."""
    heads: dict[str, list[str]] = {}
    rows: dict[str, list[str]] = {}
    for replica, text in texts.items():
        name = ""
        for one in text.splitlines():
            if one.startswith("# "):
                name = one.split(" ", 3)[2]
                known = heads.setdefault(name, [])
                known += [] if one in known else [one]
            elif one:
                rows.setdefault(name, []).append(_labelled(one, replica))
    return "".join(f"{one}\n" for name in heads for one in (*heads[name], *rows.get(name, ())))


def replica_counts(running: Mapping[str, int], wanted: int) -> str:
    """How many replicas of each model run, and how many should."""
    lines = [*head("vtp_replicas_running", "gauge", "Replicas of a model that answer.")]
    lines += [line("vtp_replicas_running", (("model", name),), count) for name, count in running.items()]
    lines += [*head("vtp_replicas_wanted", "gauge", "Replicas of a model that should answer.")]
    lines += [line("vtp_replicas_wanted", (("model", name),), wanted) for name in running]
    return "\n".join(lines) + "\n"


def _labelled(sample: str, replica: str) -> str:
    found = _SAMPLE.fullmatch(sample)
    if found is None:
        return sample
    labels = f'replica="{replica}"' + (f",{found['labels']}" if found["labels"] else "")
    return f"{found['name']}{{{labels}}} {found['value']}"
