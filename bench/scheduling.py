"""What continuous batching brings: the same requests one after the other, and from several clients at once.

    python -m vtp.bench.scheduling BUNDLE --clients 1,4,8,16

Every client asks its requests one after the other, each about the next of a few pictures. Answers have
exactly as many tokens as asked for, and those of both ways are compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vtp.bench.common import clients as clients_at
from vtp.bench.common.clients import gaps_ms
from vtp.bench.measure import endless
from vtp.engines import UsageError, engine_names
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands.console import Parser, Progress, run_command, say, say_json, table, whole_number
from vtp.runtime.engine_choice import choose_engines
from vtp.runtime.machine.facts import look
from vtp.runtime.result import Result
from vtp.runtime.scheduler import Scheduler
from vtp.scenes import examples_dir

PROG = "vtp.bench.scheduling"
PROMPTS = ("what color is the star ?", "how many circles are there ?", "where is the red one ?")


@dataclass(frozen=True)
class Load:
    """What every client asks for."""

    pictures: Sequence[str]
    requests: int  # of each client
    max_new_tokens: int

    def asked(self, client: int, number: int) -> tuple[str, str]:
        """Picture and prompt of a client's request, which others ask, too."""
        place = client + number
        return self.pictures[place % len(self.pictures)], PROMPTS[place % len(PROMPTS)]


@dataclass
class Seen:
    """What one way of answering gave: results by (client, number), and the gaps between pieces."""

    results: dict[tuple[int, int], Result] = field(default_factory=dict)
    gaps_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def figures(self) -> dict[str, float]:
        """Tokens a second, and milliseconds to the first token and between tokens."""
        tokens = sum(len(result.token_ids) for result in self.results.values())
        first = [result.timings.ttft for result in self.results.values()]
        return {
            "tokens_per_second": tokens / self.seconds,
            "ttft_p50_ms": float(np.quantile(first, 0.5)),
            "ttft_p95_ms": float(np.quantile(first, 0.95)),
            "gap_p95_ms": float(np.quantile(self.gaps_ms, 0.95)) if self.gaps_ms else 0.0,
        }


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog=PROG, description="Tokens a second from several clients, scheduled and in turn.")
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a folder that vtp-export made")
    add("--clients", default="1,4,8,16", metavar="N,…", help="how many ask at once (default: %(default)s)")
    add("--requests", default="4", metavar="N", help="requests of each client (default: %(default)s)")
    add("--max-new-tokens", default="128", metavar="N", help="tokens of an answer (default: %(default)s)")
    add("--slots", default="8", metavar="N", help="requests that decode together (default: %(default)s)")
    add(
        *("--vision-feature-cache", "--features"),
        default="0",
        metavar="N",
        help="pictures whose features are kept, for both ways (default: %(default)s, off)",
    )
    add("--engine", default="auto", help=f"one of {', '.join(engine_names())} (default: %(default)s)")
    add("--threads", metavar="N", help="CPU threads (default: all cores)")
    add("--json", action="store_true", help="print one JSON object")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_command(PROG, lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    """Let each number of clients ask one pipeline, in turn and at once, and print both."""
    clients = [whole_number("--clients", text, 1) for text in args.clients.split(",")]
    pictures = [str(path) for path in sorted(examples_dir().glob("*.png"))]
    if not pictures:
        raise UsageError(f"there are no pictures in {examples_dir()}; install vtp-edge again")
    load = Load(
        pictures,
        whole_number("--requests", args.requests, 1),
        whole_number("--max-new-tokens", args.max_new_tokens, 1),
    )
    slots = whole_number("--slots", args.slots, 1)
    features = whole_number("--vision-feature-cache", args.vision_feature_cache, 0)
    threads = None if args.threads is None else whole_number("--threads", args.threads, 1)
    bundle, progress = endless(open_bundle(args.bundle)), Progress()
    chosen = choose_engines(bundle, args.engine, threads=threads)
    rows = []
    with Pipeline(bundle, chosen, threads, features) as pipe:
        pipe.warmup()
        for count in clients:
            progress.step(f"{count} clients, {count * load.requests} requests")
            rows.append(compare(pipe, load, count, slots))
    progress.end()
    machine = look()
    found = {
        "machine": machine.processor,
        "cores": machine.cores,
        "engine": chosen.choice.engine,
        "slots": slots,
        "max_new_tokens": load.max_new_tokens,
        "requests_per_client": load.requests,
        "vision_feature_cache": features,
        "clients": rows,
    }
    say_json(found) if args.json else say(_report(found))


def compare(pipe: Pipeline, load: Load, clients: int, slots: int) -> dict[str, Any]:
    """Figures of both ways for a number of clients, and how many answers differ."""
    alone = in_turn(pipe, load, clients)
    with Scheduler(pipe, slots, queue=clients) as scheduler:
        at_once = scheduled(scheduler, load, clients)
        stats = scheduler.stats()
    one, two = alone.figures(), at_once.figures()
    return {
        "clients": clients,
        "requests": len(alone.results),
        "in_turn": one,
        "scheduled": two,
        "speedup": two["tokens_per_second"] / one["tokens_per_second"],
        "mean_batch": stats.stepped_rows / max(stats.steps, 1),
        "different": sum(
            at_once.results[key].token_ids != result.token_ids for key, result in alone.results.items()
        ),
    }


def in_turn(pipe: Pipeline, load: Load, clients: int) -> Seen:
    """All requests by one pipeline, one after the other."""
    seen = Seen()

    def ask(client: int, number: int) -> None:
        stream = pipe.stream(*load.asked(client, number), max_new_tokens=load.max_new_tokens)
        seen.gaps_ms += gaps_ms([time.perf_counter() for _ in stream])
        seen.results[client, number] = stream.result

    seen.seconds = clients_at.in_turn(ask, clients, load.requests)
    return seen


def scheduled(scheduler: Scheduler, load: Load, clients: int) -> Seen:
    """The same requests, every client a thread that asks again when it has its answer."""
    seen = Seen()

    def ask(client: int, number: int) -> None:
        ticket = scheduler.submit(*load.asked(client, number), max_new_tokens=load.max_new_tokens)
        seen.gaps_ms += gaps_ms([time.perf_counter() for _ in ticket])
        seen.results[client, number] = ticket.result()

    seen.seconds = clients_at.at_once(ask, clients, load.requests)
    return seen


def _report(found: dict[str, Any]) -> str:
    header = ["clients", "tok/s in turn", "tok/s scheduled", "x", "ttft p50", "ttft p95", "gap p95", "differ"]
    lines = [
        [
            str(row["clients"]),
            f"{row['in_turn']['tokens_per_second']:,.0f}",
            f"{row['scheduled']['tokens_per_second']:,.0f}",
            f"{row['speedup']:.2f}",
            f"{row['scheduled']['ttft_p50_ms']:.1f}",
            f"{row['scheduled']['ttft_p95_ms']:.1f}",
            f"{row['scheduled']['gap_p95_ms']:.2f}",
            str(row["different"]),
        ]
        for row in found["clients"]
    ]
    said = (
        f"{found['engine']} on {found['cores']} cores of {found['machine']}, {found['slots']} slots, answers "
        f"of {found['max_new_tokens']} tokens, features of {found['vision_feature_cache']} prompts kept; "
        "milliseconds are of the scheduled requests, from submit on"
    )
    return f"{said}\n\n{table(header, lines)}"


if __name__ == "__main__":
    sys.exit(main())
