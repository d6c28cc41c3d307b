"""vtp-serve: bundles behind an HTTP port that OpenAI's clients speak to."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtp.engines import UsageError, VtpError, capabilities
from vtp.engines.errors import shown
from vtp.runtime.commands.arguments import (
    A_BUNDLE,
    add_debug,
    add_engine,
    add_threads,
    real,
    take_bundle,
    whole,
)
from vtp.runtime.commands.console import Parser, note, real_number, run_command, say, whole_number
from vtp.runtime.hub.names import display_name, hub_name
from vtp.runtime.machine.room import memory_room
from vtp.runtime.opening import NEVER_RUN
from vtp.runtime.scheduler import Scheduler
from vtp.serve.hints import check_is_bundle, manifest_of, slots_note

if TYPE_CHECKING:
    from vtp.serve.http.models import Models
    from vtp.serve.settings import Settings
    from vtp.serve.shadow import Shadow
    from vtp.serve.slo import Slo

PROG = "vtp-serve"
PORT = 8000  # where clients look for a server such as this
_KEY = "VTP_API_KEY"
_LARGEST_PORT = 2**16 - 1
_LONGEST_SLO = 3_600_000  # milliseconds
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+")
_NAME = re.compile(r"(\*\.)?[^\s/?#@:*]+")
_STOPPED = "the server was stopped before its requests had ended"
# One red pixel, so that the line to try needs no file.
_RED = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAA"
    "AElFTkSuQmCC"
)


def build_parser() -> argparse.ArgumentParser:
    """The flags of vtp-serve."""
    parser = Parser(
        prog=PROG, description="Answer OpenAI's chat completions from bundles, over HTTP, until told to stop."
    )
    add = parser.add_argument
    add("bundle", nargs="+", metavar="BUNDLE", help=A_BUNDLE)
    add(
        "--name",
        action="append",
        default=[],
        help="how requests name a bundle, once for each (default: its folder's name)",
    )
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: %(default)s)")
    add("--port", default=str(PORT), metavar="N", help="default: %(default)s; 0: any free one")
    add("--api-key", metavar="KEY", help=f"what clients must send as bearer token (or set {_KEY})")
    add("--insecure", action="store_true", help="let anyone in, also from other machines")
    add("--allow-host", action="append", default=[], metavar="NAME", help="a further name of this server")
    add("--cors-origin", action="append", default=[], metavar="ORIGIN", help="a web page's origin to let in")
    add(
        "--allow-media-domain",
        action="append",
        default=[],
        metavar="DOMAIN",
        help="a domain from which pictures may be fetched (default: none, pictures are sent along)",
    )
    add("--slots", default="4", metavar="N", help="requests that decode together (default: %(default)s)")
    add("--queue", default="64", metavar="N", help="requests that may wait (default: %(default)s)")
    add_engine(parser)
    add_threads(parser)
    add(
        "--vision-feature-cache",
        default="4",
        metavar="N",
        help="remember what the vision stages gave for the pictures of N requests (default: %(default)s)",
    )
    add("--prefix-caching", action="store_true", help="read what a prompt shares with earlier ones once")
    add(
        "--ping-seconds",
        default="5",
        metavar="S",
        help="send a comment into streams that have been silent this long (default: %(default)s)",
    )
    add(
        "--grace-seconds",
        default="30",
        metavar="S",
        help="when told to stop, let running requests go on this long (default: %(default)s)",
    )
    add(
        "--slo-ms",
        type=real,
        metavar="MS",
        help="under load, keep as many visual tokens as bring the first one in this time, queue included",
    )
    add("--min-keep", type=whole, metavar="K", help="with --slo-ms: never fewer than these (default: 1)")
    add(
        "--shadow",
        metavar="BUNDLE",
        help="answer a share of the requests again with this bundle, and compare",
    )
    add("--shadow-rate", type=real, default=0.02, metavar="R", help="that share (default: %(default)s)")
    add("--shadow-log", metavar="FILE", help="where disagreements go (default: BUNDLE-shadow.jsonl)")
    add("--shadow-keep", metavar="DIR", help="keep their pictures there; otherwise only hashes are written")
    add("--ray", metavar="ADDRESS", help="answer on a Ray cluster: HOST:PORT of its head, auto, or local")
    add(
        "--replicas", type=whole, metavar="N", help="with --ray: processes that hold each bundle (default: 1)"
    )
    add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of vtp-serve; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_command(PROG, lambda: _run(args), args.debug, _STOPPED, says_stopping=False)


def _run(args: argparse.Namespace) -> None:
    _check_extra()
    from vtp.serve.http.models import Models
    from vtp.serve.server import Server, listen, run

    _check_slo(args)
    _check_shadow(args)
    _check_ray(args)
    names, settings, options = names_of(args), settings_of(args), _scheduling(args)
    args.shadow_log = str(_shadow_log(args))
    _take_bundles(args)
    _set_logging(args.debug)
    if args.ray is not None:
        _run_on_ray(args, names, settings, options)
        return
    listener = listen(args.host, _port(args.port))
    models = Models(names=names)
    server = Server(models, settings, access_log=args.debug)

    def load() -> None:
        """Load the bundles in their order, each served as soon as it is there, until the server stops."""
        for name, bundle in zip(names, args.bundle, strict=True):
            if not models.stopping:
                if line := slots_note(manifest_of(bundle), options["slots"], args.engine, memory_room()):
                    note(PROG, f"{name}: {line}")
                scheduler = Scheduler.load(bundle, **options)
                models.add(name, scheduler, _slo(scheduler, args), _shadow(models, args))
        models.loaded()
        if not models.stopping:
            _say_ready(models)
            _say_where(listener, settings)

    run(server, models, listener, load)


def _take_bundles(args: argparse.Namespace) -> None:
    """Fetch what is of the hub, once all of them are known to be bundles here or names there."""
    for bundle in filter(None, (*args.bundle, args.shadow)):
        if hub_name(bundle) is None:
            check_is_bundle(bundle)
    args.bundle = [str(take_bundle(PROG, bundle)) for bundle in args.bundle]
    args.shadow = args.shadow and str(take_bundle(PROG, args.shadow))


def _run_on_ray(
    args: argparse.Namespace, names: list[str], settings: Settings, options: dict[str, Any]
) -> None:
    """The same with the bundles in replicas on a Ray cluster, and only the door here."""
    from vtp.serve.scale.front import make_front
    from vtp.serve.scale.plans import remote_models
    from vtp.serve.server import Server, listen, run

    bundles = dict(zip(names, args.bundle, strict=True))
    aim = {"slo_ms": _slo_ms(args), "min_keep": args.min_keep}
    replicas = 1 if args.replicas is None else args.replicas
    models = remote_models(args.ray, replicas, bundles, options, settings, **aim)
    listener = listen(args.host, _port(args.port))
    models.connect()
    server = Server(models, settings, access_log=args.debug, app=make_front(models, settings))

    def load() -> None:
        models.load(f"vtp-serve-{socket.gethostname()}-{listener.getsockname()[1]}")
        if not models.stopping:
            for line in models.ready_lines():
                say(line)
            _say_where(listener, settings)

    run(server, models, listener, load)


def _check_extra() -> None:
    try:
        import starlette
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise VtpError(
            f"vtp-serve needs {error.name}, which is not installed; run: pip install 'vtp-edge[serve]'"
        ) from error
    assert starlette


# -- what was asked for --------------------------------------------------------------------------------------


def names_of(args: argparse.Namespace) -> list[str]:
    """A name for each bundle. UsageError where they are not as many, or two are alike."""
    names = args.name or [display_name(bundle) for bundle in args.bundle]
    if len(names) != len(args.bundle):
        raise UsageError(
            f"{len(names)} names are given for {len(args.bundle)} bundles; give one --name for each"
        )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two bundles have the name '{shown(twice)}'; give one --name for each bundle")
    if not all(name.strip() and name.isprintable() for name in names):
        raise UsageError("a name is empty or has characters that cannot be printed; choose another --name")
    return list(names)


def settings_of(args: argparse.Namespace) -> Settings:
    """The flags as settings. UsageError for an open server that nobody asked for."""
    from vtp.serve.settings import Settings

    key = args.api_key if args.api_key is not None else os.environ.get(_KEY) or None
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise UsageError("the API key must be printable ASCII without spaces around it; choose another one")
    if key is None and not args.insecure and not is_loopback(args.host):
        raise UsageError(
            f"--host {shown(args.host)} lets other machines in: give --api-key KEY (or set {_KEY}), or "
            "--insecure if everyone may ask"
        )
    _check_names(args)
    return Settings(
        key=key,
        allowed_hosts=tuple(args.allow_host),
        cors_origins=tuple(args.cors_origin),
        media_domains=tuple(args.allow_media_domain),
        ping_seconds=_seconds("ping-seconds", args.ping_seconds),
        grace_seconds=_seconds("grace-seconds", args.grace_seconds),
    )


def _check_names(args: argparse.Namespace) -> None:
    """UsageError for a domain, an origin or a name that no request could ever match."""
    from vtp.serve.http.pictures.fetching import AllowedDomain

    for domain in args.allow_media_domain:
        AllowedDomain.parse(domain)
    for origin in args.cors_origin:
        if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
            raise UsageError(
                f"--cors-origin '{shown(origin, 60)}' is not an origin as browsers send it; give it in small "
                "letters without a path, such as https://example.org, or *"
            )
    for host in args.allow_host:
        if host != "*" and not _NAME.fullmatch(host):
            raise UsageError(
                f"--allow-host '{shown(host, 60)}' is not a name; give one without scheme or port, such as "
                "example.org, *.example.org or *"
            )


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach a host's every address."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def _scheduling(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "engine": args.engine,
        "threads": None if args.threads is None else whole_number("threads", args.threads),
        "slots": whole_number("slots", args.slots),
        "queue": whole_number("queue", args.queue, least=0),
        "vision_feature_cache": whole_number("vision-feature-cache", args.vision_feature_cache, least=0),
        "prefix_caching": args.prefix_caching,
    }


def _slo(scheduler: Scheduler, args: argparse.Namespace) -> Slo | None:
    """The aim for one model; UsageError where its times were not measured."""
    from vtp.serve.slo import Slo

    aim = _slo_ms(args)
    return None if aim is None else Slo.of(scheduler, aim, args.min_keep)


def _slo_ms(args: argparse.Namespace) -> float | None:
    aim: float | None = args.slo_ms
    if aim is not None and not 0 < aim <= _LONGEST_SLO:
        raise UsageError(f"--slo-ms {aim:g} is not a time above 0, up to {_LONGEST_SLO} ms")
    return aim


def _check_slo(args: argparse.Namespace) -> None:
    """UsageError for an aim that cannot be, before a bundle is loaded."""
    if _slo_ms(args) is None and args.min_keep is not None:
        raise UsageError("--min-keep belongs to --slo-ms; give both, or neither")
    args.min_keep = 1 if args.min_keep is None else args.min_keep
    if args.min_keep < 1:
        raise UsageError(f"--min-keep {args.min_keep} is not a number of visual tokens; give 1 or more")


def _check_ray(args: argparse.Namespace) -> None:
    """UsageError for flags that do not go with --ray, or with its absence."""
    if args.ray is None and args.replicas is not None:
        raise UsageError("--replicas belongs to --ray; without --ray this process answers")
    if args.ray is not None and args.shadow is not None:
        raise UsageError("--shadow compares within one process, and --ray has several; give one of them")


def _check_shadow(args: argparse.Namespace) -> None:
    """UsageError for flags of the shadow that cannot be."""
    if args.shadow is None:
        if args.shadow_log or args.shadow_keep:
            raise UsageError("--shadow-log and --shadow-keep need --shadow BUNDLE")
        return
    if len(args.bundle) > 1:
        raise UsageError(
            f"--shadow compares one bundle with another, and {len(args.bundle)} are served; give one"
        )
    if not 0 < args.shadow_rate <= 1:
        raise UsageError(f"--shadow-rate {args.shadow_rate:g} is not a share above 0, up to 1")
    log = _shadow_log(args)
    if log.is_dir() or not log.parent.is_dir():
        raise UsageError(f"--shadow-log '{shown(log)}' is not a file in a folder that exists; choose another")
    if args.shadow_keep and Path(args.shadow_keep).exists() and not Path(args.shadow_keep).is_dir():
        raise UsageError(f"--shadow-keep '{shown(args.shadow_keep)}' is not a folder; choose another")


def _shadow_log(args: argparse.Namespace) -> Path:
    return Path(args.shadow_log or f"{display_name(args.bundle[0])}-shadow.jsonl")


def _shadow(models: Models, args: argparse.Namespace) -> Shadow | None:
    """The other bundle, opened with one slot."""
    from vtp.serve.shadow import Files, Shadow

    if args.shadow is None:
        return None
    other = Scheduler.load(args.shadow, **{**_scheduling(args), "slots": 1, "queue": 0})
    pictures = None if args.shadow_keep is None else Path(args.shadow_keep)
    return Shadow(other, lambda: models.idle, args.shadow_rate, Files(_shadow_log(args), pictures))


def _port(text: str) -> int:
    port = whole_number("port", text, least=0)
    if port > _LARGEST_PORT:
        raise UsageError(f"port {port} is not a valid port; choose 1 to {_LARGEST_PORT}, or 0 for a free one")
    return port


def _seconds(name: str, text: str) -> float:
    wanted = f"{name} '{shown(text)}' is not a number of seconds above 0, up to 86400"
    try:
        value = real_number(name, text)
    except UsageError:
        raise UsageError(wanted) from None
    if not 0 < value <= 86400:
        raise UsageError(wanted)
    return value


# -- what is said --------------------------------------------------------------------------------------------


def address_of(listener: socket.socket) -> str:
    """The URL of a socket that listens, as this machine's own clients reach it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def lan_name(listener: socket.socket) -> str | None:
    """The machine's own name, where a socket listens on all of its addresses."""
    return socket.gethostname() if listener.getsockname()[0] in ("0.0.0.0", "::") else None


def _say_ready(models: Models) -> None:
    for model in models:
        visual, scheduler = model.manifest.visual, model.scheduler
        engine = scheduler.pipeline.engine
        say(
            f"{model.name}: ready on {engine}, {scheduler.slots} at a time, keeps {visual.default_keep} of "
            f"{visual.count} visual tokens"
        )
        if scheduler.in_turn:
            note(PROG, f"{model.name}: requests are answered one after the other: {scheduler.in_turn}")
        if not capabilities(engine).proven:
            note(PROG, NEVER_RUN)


def _say_where(listener: socket.socket, settings: Settings) -> None:
    address = address_of(listener)
    say(f"listening on {address} (open it in a browser; OpenAI's base_url: {address}/v1)")
    say(f"try: {curl_line(address, settings.key is not None)}")
    if own := lan_name(listener):
        say(f"from other machines: http://{own}:{listener.getsockname()[1]}, by this machine's name")


def curl_line(address: str, key: bool = False) -> str:
    """A line for a shell that asks about a red pixel."""
    header = f' -H "Authorization: Bearer ${_KEY}"' if key else ""
    picture = f'{{"type":"image_url","image_url":{{"url":"{_RED}"}}}}'
    words = '{"type":"text","text":"what color is this ?"}'
    body = f'{{"messages":[{{"role":"user","content":[{picture},{words}]}}],"max_tokens":32}}'
    return f"curl {address}/v1/chat/completions{header} -d '{body}'"


def _set_logging(debug: bool) -> None:
    """Warnings, or everything, on standard error."""
    logging.basicConfig(
        level=logging.INFO if debug else logging.WARNING,
        format=f"{PROG}: %(levelname)s: %(message)s",
        stream=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
