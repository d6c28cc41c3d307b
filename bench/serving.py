"""What a server gives several clients at once, against the same requests one after the other, over HTTP.

    python -m vtp.bench.serving BUNDLE --clients 1,4,16,64

Starts a real vtp-serve in a process of its own, with a copy of the bundle that never ends an answer early,
and asks it for streams, as OpenAI's clients do. Every client asks its requests one after the other, each
about the next of a few pictures; the texts of both ways are compared.

    python -m vtp.bench.serving BUNDLE --against llama-server --model DIR --bits q8_0,q4_0

asks llama.cpp's server the same (`make llamacpp`), on the model that the bundle was exported from: the same
pictures, questions, slots and threads. It keeps all visual tokens. A model that cuts pictures into tiles is
asked about pictures of the bundle's proportions (`--picture 1024x512`), so that both cut the same.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import http.client
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtp.bench.common import clients as clients_at
from vtp.bench.common.clients import gaps_ms
from vtp.bench.compare.llamacpp.serving import OPTIONS, llama_server, read_bits
from vtp.bench.scheduling import PROMPTS
from vtp.engines import UsageError, VtpError
from vtp.engines.child import python_command
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands.arguments import add_debug, add_json, add_threads
from vtp.runtime.commands.console import Parser, Progress, run_command, say, say_json, table, whole_number
from vtp.runtime.machine.facts import look
from vtp.scenes import examples_dir

PROG = "vtp.bench.serving"
_PATIENCE = 600.0  # seconds for one answer


@dataclass
class Seen:
    """What one way of asking gave: texts by (client, number), and times in milliseconds."""

    texts: dict[tuple[int, int], str] = field(default_factory=dict)
    tokens: int = 0
    prompts: list[int] = field(default_factory=list)  # tokens of each, as they reach the decoder
    first_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def figures(self) -> dict[str, float]:
        """Answers and tokens a second, and milliseconds to the first token and between pieces."""
        return {
            "answers_per_second": len(self.texts) / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "prompt_tokens": float(np.mean(self.prompts)) if self.prompts else 0.0,
            "ttft_p50_ms": _quantile(self.first_ms, 0.5),
            "ttft_p95_ms": _quantile(self.first_ms, 0.95),
            "gap_p95_ms": _quantile(self.gaps_ms, 0.95),
        }


@dataclass(frozen=True)
class Load:
    """What every client asks for; the bodies are made beforehand."""

    port: int
    pictures: Sequence[str]  # data URLs
    requests: int  # of each client
    max_new_tokens: int
    more: Mapping[str, Any] = field(default_factory=dict)  # what a server wants told beside

    def body(self, client: int, number: int) -> bytes:
        """A client's request, which others ask, too."""
        place = client + number
        content = [
            {"type": "image_url", "image_url": {"url": self.pictures[place % len(self.pictures)]}},
            {"type": "text", "text": PROMPTS[place % len(PROMPTS)]},
        ]
        options = {"stream": True, "stream_options": {"include_usage": True}}
        asked = {"messages": [{"role": "user", "content": content}], "max_tokens": self.max_new_tokens}
        return json.dumps({**asked, **options, **self.more}).encode()


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog=PROG, description="Answers a second of vtp-serve, for several clients at once.")
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="a folder that vtp-export made")
    add("--clients", default="1,4,16,64", metavar="N,…", help="how many ask at once (default: %(default)s)")
    add("--requests", default="4", metavar="N", help="requests of each client (default: %(default)s)")
    add("--max-new-tokens", default="64", metavar="N", help="tokens of an answer (default: %(default)s)")
    add("--picture", metavar="WxH", help="stretch the pictures to this size before they are sent")
    add("--slots", default="8", metavar="N", help="requests that decode together (default: %(default)s)")
    add("--vision-feature-cache", default="0", metavar="N", help="pictures whose features are kept (off)")
    add("--ray", metavar="ADDRESS", help="let vtp-serve answer from replicas on Ray (docs/scale.md)")
    add("--replicas", default="1", metavar="N", help="with --ray (default: %(default)s)")
    add("--against", choices=["llama-server"], help="ask llama.cpp's server the same (make llamacpp)")
    add("--model", metavar="DIR", help="with --against: the model that BUNDLE was exported from")
    add(
        "--bits", default="f32,f16", metavar="VISION,TEXT", help="of llama.cpp's files (default: %(default)s)"
    )
    add_threads(parser)
    add_json(parser)
    add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_command(PROG, lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    """Start a server on a bundle whose answers do not end, and ask it with each number of clients."""
    clients = [whole_number("--clients", text, 1) for text in args.clients.split(",")]
    requests, length = (
        whole_number(f"--{name}", getattr(args, name.replace("-", "_")), 1)
        for name in ("requests", "max-new-tokens")
    )
    slots, bits = whole_number("--slots", args.slots, 1), read_bits(args.bits)
    if args.against and not args.model:
        raise UsageError("--against llama-server wants --model DIR, the model that BUNDLE was exported from")
    flags = ["--slots", args.slots, "--queue", str(max(clients))]
    flags += ["--vision-feature-cache", args.vision_feature_cache]
    flags += [] if args.threads is None else ["--threads", args.threads]
    flags += [] if args.ray is None else ["--ray", args.ray, "--replicas", args.replicas]
    size = None if args.picture is None else _read_size(args.picture)
    pictures = [_data_url(path, size) for path in sorted(examples_dir().glob("*.png"))]
    progress = Progress()
    with (
        tempfile.TemporaryDirectory(prefix="vtp-serving-") as name,
        _server(_endless(args.bundle, name), flags) as port,
    ):
        rows = _measure(Load(port, pictures, requests, length), clients, progress, "vtp-serve")
    others: list[dict[str, Any]] = []
    if args.against:
        manifest = open_bundle(args.bundle).manifest
        threads = None if args.threads is None else whole_number("--threads", args.threads, 1)
        progress.step("convert the model, start llama-server")
        with llama_server(args.model, bits, threads, slots, manifest) as port:
            others = _measure(
                Load(port, pictures, requests, length, OPTIONS), clients, progress, args.against
            )
    progress.end()
    machine = look()
    found = {
        "machine": machine.processor,
        "cores": machine.cores,
        "flags": flags,
        "max_new_tokens": length,
        "requests_per_client": requests,
        "clients": rows,
        **({"against": {"server": args.against, "bits": args.bits, "clients": others}} if others else {}),
    }
    say_json(found) if args.json else say(_report(found))


def _measure(load: Load, clients: Sequence[int], progress: Progress, who: str) -> list[dict[str, Any]]:
    """One server's figures for every number of clients."""
    rows = []
    for number in range(len(load.pictures)):  # both ways find caches as filled, and all opened
        _ask(load, Seen(), 0, number)
    for count in clients:
        progress.step(f"{who}: {count} clients, {count * load.requests} requests")
        rows.append(compare(load, count))
    return rows


def compare(load: Load, clients: int) -> dict[str, Any]:
    """Figures of both ways for a number of clients, and how many answers differ or failed."""
    alone, at_once = in_turn(load, clients), together(load, clients)
    one, two = alone.figures(), at_once.figures()
    return {
        "clients": clients,
        "requests": clients * load.requests,
        "in_turn": one,
        "at_once": two,
        "speedup": two["tokens_per_second"] / one["tokens_per_second"],
        "different": sum(at_once.texts.get(key) != text for key, text in alone.texts.items()),
        "failed": [*alone.failed, *at_once.failed],
    }


def in_turn(load: Load, clients: int) -> Seen:
    """All requests, one after the other."""
    seen = Seen()
    seen.seconds = clients_at.in_turn(partial(_ask, load, seen), clients, load.requests)
    return seen


def together(load: Load, clients: int) -> Seen:
    """The same requests, from several clients at once."""
    seen = Seen()
    seen.seconds = clients_at.at_once(partial(_ask, load, seen), clients, load.requests)
    return seen


def _ask(load: Load, seen: Seen, client: int, number: int) -> None:
    """One stream: its text, its tokens, and when its pieces came."""
    connection = http.client.HTTPConnection("127.0.0.1", load.port, timeout=_PATIENCE)
    started, times, text = time.perf_counter(), [], ""
    try:
        connection.request("POST", "/v1/chat/completions", load.body(client, number))
        answer = connection.getresponse()
        if answer.status != 200:
            seen.failed.append(f"status {answer.status}: {answer.read()[:200]!r}")
            return
        for chunk in _chunks(answer):
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                times.append(time.perf_counter())
                text += chunk["choices"][0]["delta"]["content"]
            if chunk.get("usage"):
                seen.tokens += chunk["usage"]["completion_tokens"]
                seen.prompts.append(chunk["usage"]["prompt_tokens"])
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        seen.failed.append(f"{type(error).__name__}: {error}")
        return
    finally:
        connection.close()
    seen.texts[client, number] = text
    seen.first_ms += [(times[0] - started) * 1e3] if times else []
    seen.gaps_ms += gaps_ms(times)


def _chunks(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of each event; raises ValueError for a stream that has no end."""
    for line in answer:
        if line.strip() == b"data: [DONE]":
            return
        if line.startswith(b"data: "):
            yield json.loads(line[6:])
    raise ValueError("the stream broke off")


def _endless(bundle: str, folder: str) -> Path:
    """A copy of a bundle, of links, whose answers only the picture's own token would end early."""
    opened, copy = open_bundle(bundle), Path(folder) / "bundle"
    copy.mkdir()
    for name in opened.manifest.files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        _link(opened.path(name).resolve(), copy / name)
    text = dataclasses.replace(opened.manifest.text, eos_token_ids=(opened.manifest.text.image_token_id,))
    manifest = dataclasses.replace(opened.manifest, text=text)
    (copy / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return copy


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        target.write_bytes(source.read_bytes())


@contextmanager
def _server(bundle: Path, flags: Sequence[str]) -> Iterator[int]:
    """The port of a vtp-serve that runs until the block is left."""
    command = python_command("vtp.serve.cli", str(bundle), "--port", "0", *flags)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = next(
                filter(None, map(re.compile(r"listening on http://[^ ]*:(\d+)").search, server.stdout)), None
            )
            if found is None:
                raise VtpError("vtp-serve did not start; its own line above says why")
            threading.Thread(target=server.stdout.read, daemon=True).start()
            yield int(found[1])
        finally:
            server.terminate()


def _read_size(text: str) -> tuple[int, int]:
    """(width, height) of WxH; UsageError for anything else."""
    width, cross, height = text.partition("x")
    if not cross:
        raise UsageError(f"--picture '{text}' is not WxH, such as 1024x512")
    return whole_number("--picture", width, 1), whole_number("--picture", height, 1)


def _data_url(path: Path, size: tuple[int, int] | None) -> str:
    """The picture as a PNG, stretched to (width, height) if a size is given."""
    written = path.read_bytes()
    if size is not None:
        out = io.BytesIO()
        Image.open(path).resize(size).save(out, "PNG")
        written = out.getvalue()
    return f"data:image/png;base64,{base64.b64encode(written).decode()}"


def _quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share)) if values else 0.0


_HEADER = [
    "clients",
    "answers/s",
    "tok/s in turn",
    "tok/s",
    "x",
    "ttft p50",
    "ttft p95",
    "gap p95",
    "differ",
    "failed",
]


def _report(found: dict[str, Any]) -> str:
    """A table for each server, a line for each number of clients, below what was asked of which machine."""
    said = (
        f"vtp-serve {' '.join(found['flags'])} on {found['cores']} cores of {found['machine']}, with the "
        f"clients on the same machine; answers of {found['max_new_tokens']} tokens, milliseconds from the "
        f"request on; {_prompts(found['clients'])}"
    )
    parts = [said, table(_HEADER, _lines(found["clients"]))]
    if "against" in found:
        other = found["against"]
        parts += [
            f"{other['server']}, encoder and decoder in {other['bits']}, all visual tokens, asked the same; "
            f"{_prompts(other['clients'])}",
            table(_HEADER, _lines(other["clients"])),
        ]
    return "\n\n".join(parts)


def _prompts(rows: Sequence[dict[str, Any]]) -> str:
    return f"prompts of {rows[-1]['in_turn']['prompt_tokens']:.0f} tokens"


def _lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            str(row["clients"]),
            f"{row['at_once']['answers_per_second']:.1f}",
            f"{row['in_turn']['tokens_per_second']:,.0f}",
            f"{row['at_once']['tokens_per_second']:,.0f}",
            f"{row['speedup']:.2f}",
            f"{row['at_once']['ttft_p50_ms']:.0f}",
            f"{row['at_once']['ttft_p95_ms']:.0f}",
            f"{row['at_once']['gap_p95_ms']:.1f}",
            str(row["different"]),
            str(len(row["failed"])),
        ]
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
