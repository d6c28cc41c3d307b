"""What /metrics says, read by Prometheus' own parser."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from vtp.runtime.result import Result, Timings, VisualTokens
from vtp.runtime.scheduler import Scheduler, SchedulerStats
from vtp.serve.http.metrics import Metrics

MODEL = {"model": "m"}


class Told:
    """A scheduler's state, as told."""

    def __init__(self, **stats: int) -> None:
        self._stats = SchedulerStats(**{"running": 0, "waiting": 0, "slots": 4, "queue": 8, **stats})

    def stats(self) -> SchedulerStats:
        return self._stats


def parsed(metrics: Metrics, **schedulers: Any) -> dict[str, Any]:
    """Families by name; every sample belongs to one that was announced."""
    text = metrics.text(schedulers)
    assert text.endswith("\n")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(family.type != "unknown" and family.documentation for family in families.values())
    return families


def value(families: dict[str, Any], sample: str, **labels: str) -> float:
    """The one sample of these labels."""
    found = [
        one.value
        for family in families.values()
        for one in family.samples
        if one.name == sample and one.labels == labels
    ]
    assert len(found) == 1, (sample, labels)
    return float(found[0])


def result(tokens: int = 5, before: int = 576, kept: int = 57, **stages: float) -> Result:
    timings = Timings(stages or {"queue": 2.0, "decoder": 8.0}, ttft=10.0, tpot=4.0, total=26.0)
    return Result("", list(range(tokens)), VisualTokens(before, kept), [], timings, 11, "eos")


def test_every_promised_name_and_type() -> None:
    kinds = {name: family.type for name, family in parsed(Metrics(), m=Told()).items()}
    gauges = "requests_running requests_waiting slots slots_used queue_capacity queue_used_ratio"
    histograms = "time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds"
    counters = "requests slo_requests prompt_tokens generation_tokens visual_tokens_before visual_tokens_kept"
    expected = {f"vtp_{name}": "gauge" for name in f"{gauges} requests_in_flight".split()}
    expected |= {f"vtp_{name}": "histogram" for name in f"{histograms} stage_seconds".split()}
    expected |= {f"vtp_{name}": "counter" for name in counters.split()}  # the parser drops _total
    assert kinds == expected


def test_the_state_of_each_scheduler() -> None:
    families = parsed(Metrics(), m=Told(running=3, waiting=2), other=Told(queue=0))
    for name, expected in (
        ("requests_running", 3),
        ("requests_waiting", 2),
        ("slots", 4),
        ("slots_used", 3),
        ("queue_capacity", 8),
        ("queue_used_ratio", 0.25),
    ):
        assert value(families, f"vtp_{name}", **MODEL) == expected
    assert value(families, "vtp_queue_used_ratio", model="other") == 0


def test_tokens_are_counted_as_usage_counts_them() -> None:
    metrics = Metrics()
    for one in (result(), result(tokens=2, kept=100)):
        metrics.request_started("m")
        metrics.finished("m", one, 0.1, 200)
    families = parsed(metrics)
    assert value(families, "vtp_prompt_tokens_total", **MODEL) == 11 + 57 + 11 + 100
    assert value(families, "vtp_generation_tokens_total", **MODEL) == 7
    assert value(families, "vtp_visual_tokens_before_total", **MODEL) == 1152
    assert value(families, "vtp_visual_tokens_kept_total", **MODEL) == 157
    assert value(families, "vtp_requests_total", status="200", **MODEL) == 2
    assert value(families, "vtp_requests_in_flight", **MODEL) == 0


def test_what_never_began_has_no_tokens() -> None:
    metrics = Metrics()
    metrics.request_started("m")
    metrics.finished("m", result(tokens=0, queue=50.0), 0.05, 499)
    families = parsed(metrics)
    assert not families["vtp_prompt_tokens"].samples and not families["vtp_visual_tokens_kept"].samples
    assert value(families, "vtp_stage_seconds_sum", stage="queue", **MODEL) == 0.05
    assert value(families, "vtp_requests_total", status="499", **MODEL) == 1


def test_stages_are_told_in_seconds() -> None:
    metrics = Metrics()
    metrics.request_started("m")
    metrics.finished("m", result(vision_encoder=20.0, pruner=0.5), 0.1, 200)
    families = parsed(metrics)
    for stage, seconds in (("vision_encoder", 0.02), ("pruner", 0.0005), ("steps", 0.016)):
        assert value(families, "vtp_stage_seconds_sum", stage=stage, **MODEL) == pytest.approx(seconds)
        assert value(families, "vtp_stage_seconds_count", stage=stage, **MODEL) == 1


def test_histograms_hold_what_numpy_counts() -> None:
    metrics = Metrics()
    values = [*np.random.default_rng(0).lognormal(-2, 2, 500).tolist(), 0.005, 0.25, 60.0, 61.0, 0.0]
    for seconds in values:
        metrics.first_token("m", seconds)
    families = parsed(metrics)
    buckets = [
        one
        for one in families["vtp_time_to_first_token_seconds"].samples
        if one.name.endswith("_bucket") and one.labels["model"] == "m"
    ]
    assert [one.labels["le"] for one in buckets][-2:] == ["60", "+Inf"]
    for one in buckets:
        assert one.value == np.sum(np.array(values) <= float(one.labels["le"]))
    name = "vtp_time_to_first_token_seconds"
    assert value(families, f"{name}_count", **MODEL) == len(values)
    assert value(families, f"{name}_sum", **MODEL) == pytest.approx(sum(values))


def test_each_time_has_its_own_histogram() -> None:
    metrics = Metrics()
    metrics.request_started("m")
    metrics.between_tokens("m", 0.02)
    metrics.between_tokens("m", 0.03)
    metrics.finished("m", None, 1.5, 500)
    families = parsed(metrics)
    assert value(families, "vtp_inter_token_latency_seconds_sum", **MODEL) == pytest.approx(0.05)
    assert value(families, "vtp_inter_token_latency_seconds_bucket", le="0.025", **MODEL) == 1
    assert value(families, "vtp_e2e_request_latency_seconds_sum", **MODEL) == 1.5
    assert not families["vtp_time_to_first_token_seconds"].samples


def test_clients_make_no_labels() -> None:
    metrics = Metrics()
    for number in range(500):
        for name in (f"model {number}", ""):
            metrics.request_started(name)
            metrics.first_token(name, 0.1)
            metrics.finished(name, result(**{f"stage {number}": 1.0}), 0.1, number)
    families = parsed(metrics)
    labels: dict[str, set[str]] = {"model": set(), "stage": set(), "status": set()}
    for family in families.values():
        for sample in family.samples:
            for name, text in sample.labels.items():
                labels.setdefault(name, set()).add(text)
    assert all("other" in labels[name] for name in ("model", "stage", "status"))
    assert len(labels["model"]) <= 65 and len(labels["stage"]) <= 65 and len(labels["status"]) <= 14
    in_flight = families["vtp_requests_in_flight"].samples
    assert in_flight and not any(sample.value for sample in in_flight)


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "ä/ö:latest", "{x}", 'x",y="', "\\n"])
def test_names_are_escaped(name: str) -> None:
    metrics = Metrics()
    metrics.first_token(name, 0.1)
    families = parsed(metrics, **{name: Told(running=1)})
    assert value(families, "vtp_requests_running", model=name) == 1
    assert value(families, "vtp_time_to_first_token_seconds_count", model=name) == 1


def test_many_threads_lose_nothing() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(500):
            metrics.request_started("m")
            metrics.between_tokens("m", 0.5)
            metrics.finished("m", result(), 0.1, 200)
            metrics.text({})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    families = parsed(metrics)
    assert value(families, "vtp_requests_total", status="200", **MODEL) == 2000
    assert value(families, "vtp_inter_token_latency_seconds_sum", **MODEL) == 1000
    assert value(families, "vtp_requests_in_flight", **MODEL) == 0


def test_a_real_scheduler_and_a_real_answer(exported: Callable[[str], Any], picture: Any) -> None:
    metrics = Metrics()
    with Scheduler.load(exported("vispruner").folder, threads=1, slots=2, queue=3) as scheduler:
        metrics.request_started("m")
        answered = scheduler.submit(picture, "what is it ?", max_new_tokens=4).result(60)
        metrics.finished("m", answered, answered.timings.total / 1e3, 200)
        families = parsed(metrics, m=scheduler)
    assert value(families, "vtp_slots", **MODEL) == 2 and value(families, "vtp_queue_capacity", **MODEL) == 3
    assert value(families, "vtp_visual_tokens_before_total", **MODEL) == 16
    assert value(families, "vtp_visual_tokens_kept_total", **MODEL) == answered.visual_tokens.after
    stages = {one.labels["stage"] for one in families["vtp_stage_seconds"].samples}
    assert {"queue", "preprocess", "vision_encoder", "pruner", "decoder", "steps"} <= stages
