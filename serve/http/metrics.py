"""What the server does, in numbers: Prometheus' text format 0.0.4. No client makes a label."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

from vtp.runtime.decisions.decision import Decision
from vtp.runtime.result import Result, VisualTokens
from vtp.runtime.scheduler import Scheduler, SchedulerStats
from vtp.serve.counts import Histogram, Labels, head, line

__all__ = ["CONTENT_TYPE", "Metrics"]

#: Of the answer that has `Metrics.text` as its body.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

OTHER = "other"
_STATUSES = frozenset((200, 400, 401, 403, 404, 405, 408, 413, 415, 429, 499, 500, 503))
_MOST = 64  # models, and stages, that are told apart; their names are the server's and the bundles'

# Upper bounds in seconds.
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STAGE = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

_HISTOGRAMS = {
    "vtp_time_to_first_token_seconds": ("Time from a request to its first token.", _FIRST),
    "vtp_inter_token_latency_seconds": ("Time between a token's text and the next.", _BETWEEN),
    "vtp_e2e_request_latency_seconds": ("Time from a request to the end of its answer.", _WHOLE),
    "vtp_stage_seconds": (
        "Time of one request in each stage; queue is its wait, steps its decoding.",
        _STAGE,
    ),
}
_COUNTERS = {
    "vtp_requests_total": "Requests that are over, by HTTP status; 499: the client went away.",
    "vtp_slo_requests_total": "Requests whose keep-count the server chose, by whether in time for its aim.",
    "vtp_prompt_tokens_total": "Tokens of prompts, kept visual tokens among them.",
    "vtp_generation_tokens_total": "Tokens that were generated.",
    "vtp_visual_tokens_before_total": "Visual tokens of the pictures before pruning.",
    "vtp_visual_tokens_kept_total": "Visual tokens that were kept.",
}
_GAUGES: dict[str, tuple[str, Callable[[SchedulerStats], float]]] = {
    "vtp_requests_running": ("Requests with a slot.", lambda stats: stats.running),
    "vtp_requests_waiting": ("Requests that wait for a slot.", lambda stats: stats.waiting),
    "vtp_slots": ("Requests that can decode together.", lambda stats: stats.slots),
    "vtp_slots_used": ("Slots with a request.", lambda stats: min(stats.running, stats.slots)),
    "vtp_queue_capacity": ("Requests that may wait.", lambda stats: stats.queue),
    "vtp_queue_used_ratio": (
        "Share of the queue that is taken, 0 to 1.",
        lambda stats: stats.waiting / stats.queue if stats.queue else 0.0,
    ),
}


class Metrics:
    """Counts of one server. Safe from any thread.

    `model` is the name of one that is served, and "" where a request was refused before that was known. At
    most `_MOST` names are told apart, beside those of `models`; what comes beyond is counted as "other".
    """

    def __init__(self, models: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        self._models = set(models)
        self._stages: set[str] = set()
        self._in_flight: defaultdict[str, int] = defaultdict(int)
        self._counters: dict[str, defaultdict[Labels, float]] = {
            name: defaultdict(float) for name in _COUNTERS
        }
        self._histograms: dict[str, dict[Labels, Histogram]] = {name: {} for name in _HISTOGRAMS}

    def request_started(self, model: str) -> None:
        """Note a request; `finished` must follow once."""
        with self._lock:
            self._in_flight[_label(model, self._models)] += 1

    def first_token(self, model: str, seconds: float) -> None:
        """Note the time from a request to its first token."""
        self._observe("vtp_time_to_first_token_seconds", model, seconds)

    def between_tokens(self, model: str, seconds: float) -> None:
        """Note the time between two pieces of an answer."""
        self._observe("vtp_inter_token_latency_seconds", model, seconds)

    def finished(self, model: str, result: Result | None, seconds: float, status: int) -> None:
        """Note the end of a request.

        result   what there is of its answer; None: it was refused, or failed
        seconds  since the request came
        status   of the HTTP answer; 499 if the client went away first
        """
        with self._lock:
            name = _label(model, self._models)
            labels = (("model", name),)
            self._in_flight[name] -= 1
            self._count("vtp_requests_total", (*labels, ("status", _status(status))), 1)
            self._add("vtp_e2e_request_latency_seconds", labels, seconds)
            if result is not None:
                self._add_result(labels, result)

    def generated(self, model: str, result: Result) -> None:
        """Note what there was of an answer whose client did not wait for it; its end was noted before."""
        with self._lock:
            self._add_result((("model", _label(model, self._models)),), result)

    def refused(self, status: int) -> None:
        """Note a request that was refused before its model was known."""
        with self._lock:
            self._count("vtp_requests_total", (("model", OTHER), ("status", _status(status))), 1)

    def aimed(self, model: str, met: bool) -> None:
        """Note a request whose keep-count was chosen for an aim, and whether it is expected to be met."""
        with self._lock:
            labels = (("model", _label(model, self._models)), ("met", str(met).lower()))
            self._count("vtp_slo_requests_total", labels, 1)

    def decided(self, model: str, decision: Decision) -> None:
        """Note a question of a request that was decided without generating anything."""
        with self._lock:
            labels = (("model", _label(model, self._models)),)
            self._add_prompt(labels, decision.prompt_tokens, decision.visual_tokens)
            self._add_stages(labels, {name: ms / 1e3 for name, ms in decision.timings.stages.items()})

    def text(self, schedulers: Mapping[str, Scheduler]) -> str:
        """All of it, with the state of each model's scheduler, in Prometheus' text format."""
        stats = {name: scheduler.stats() for name, scheduler in schedulers.items()}
        with self._lock:
            lines = [*_gauge_lines(stats), *self._in_flight_lines(), *self._counter_lines()]
            lines += self._histogram_lines()
        return "\n".join(lines) + "\n"

    def _observe(self, name: str, model: str, seconds: float) -> None:
        with self._lock:
            self._add(name, (("model", _label(model, self._models)),), seconds)

    def _add(self, name: str, labels: Labels, value: float) -> None:
        rows = self._histograms[name]
        if labels not in rows:
            rows[labels] = Histogram(_HISTOGRAMS[name][1])
        rows[labels].add(value)

    def _count(self, name: str, labels: Labels, value: float) -> None:
        self._counters[name][labels] += value

    def _add_result(self, labels: Labels, result: Result) -> None:
        """Tokens are counted of prompts that were read: a request cancelled while it waits has none."""
        timings, generated = result.timings, len(result.token_ids)
        seconds = {stage: ms / 1e3 for stage, ms in timings.stages.items()}
        if generated:
            self._add_prompt(labels, result.prompt_tokens, result.visual_tokens)
            self._count("vtp_generation_tokens_total", labels, generated)
            seconds["steps"] = timings.tpot * (generated - 1) / 1e3
        self._add_stages(labels, seconds)

    def _add_prompt(self, labels: Labels, text: int, visual: VisualTokens) -> None:
        self._count("vtp_prompt_tokens_total", labels, text + visual.after)
        self._count("vtp_visual_tokens_before_total", labels, visual.before)
        self._count("vtp_visual_tokens_kept_total", labels, visual.after)

    def _add_stages(self, labels: Labels, seconds: Mapping[str, float]) -> None:
        for stage, value in seconds.items():
            self._add("vtp_stage_seconds", (*labels, ("stage", _label(stage, self._stages))), value)

    def _in_flight_lines(self) -> Iterator[str]:
        name = "vtp_requests_in_flight"
        yield from head(name, "gauge", "Requests that are being read, answered or sent.")
        yield from (line(name, (("model", model),), count) for model, count in self._in_flight.items())

    def _counter_lines(self) -> Iterator[str]:
        for name, told in _COUNTERS.items():
            yield from head(name, "counter", told)
            yield from (line(name, labels, value) for labels, value in self._counters[name].items())

    def _histogram_lines(self) -> Iterator[str]:
        for name, (told, _) in _HISTOGRAMS.items():
            yield from head(name, "histogram", told)
            for labels, histogram in self._histograms[name].items():
                yield from histogram.lines(name, labels)


def _gauge_lines(stats: Mapping[str, SchedulerStats]) -> Iterator[str]:
    for name, (told, value) in _GAUGES.items():
        yield from head(name, "gauge", told)
        yield from (line(name, (("model", model),), value(one)) for model, one in stats.items())


def _label(name: str, known: set[str]) -> str:
    """The name, if there is room for it among those that are known."""
    if name and len(known) < _MOST:
        known.add(name)
    return name if name in known else OTHER


def _status(status: int) -> str:
    return str(status) if status in _STATUSES else OTHER
