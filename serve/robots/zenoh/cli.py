"""vtp-zenoh: a node for robots that run ROS 2 over zenoh (rmw_zenoh), without ROS where it runs."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import Any

from vtp.engines import UsageError
from vtp.engines.errors import quoted
from vtp.runtime.commands.arguments import (
    A_BUNDLE,
    add_debug,
    add_engine,
    add_keep_tokens,
    add_threads,
    take_bundle,
)
from vtp.runtime.commands.console import Parser, note, real_number, run_command, whole_number
from vtp.runtime.commands.stopping import ended_by_ctrl_c
from vtp.serve.robots.model import Model
from vtp.serve.robots.settings import COMPRESSED, RAW, Phase, Settings, changed, check_asks
from vtp.serve.robots.zenoh.keys import Node
from vtp.serve.robots.zenoh.network import ROUTER, Network, check_endpoint
from vtp.serve.robots.zenoh.node import ZenohRobot

PROG = "vtp-zenoh"
_DEFAULT = Settings()
_STOPPED = "the node was stopped before it had begun"
# Flags that are parameters of vtp-ros2, with the parameters' names.
_WHOLE = {"keep_tokens": "keep_tokens", "max_new_tokens": "max_tokens", "threads": "threads"}
_REAL = {
    "rate": "rate",
    "threshold": "alert_threshold",
    "hysteresis": "alert_hysteresis",
    "stale_after": "stale_after",
}
_TEXTS = ("prompt", "alert", "engine")


def build_parser() -> argparse.ArgumentParser:
    """The flags of vtp-zenoh."""
    parser = Parser(
        prog=PROG,
        description="Answer a question about a camera's newest picture, as a node of rmw_zenoh without ROS.",
        epilog="Answers come on ~/answer and ~/answer_json; ~/prompt (std_msgs/String) changes the question.",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help=A_BUNDLE)
    add("--prompt", metavar="TEXT", help="the standing question")
    add("--rate", metavar="N", help=f"answers per second at most (default: {_DEFAULT.rate:g})")
    add(
        "--stale-after",
        metavar="S",
        help=f"tell if no frame came for S seconds (default: {_DEFAULT.stale_after:g})",
    )
    add_keep_tokens(parser, "one of the bundle's keep-counts (default: the bundle's)")
    add("--max-new-tokens", metavar="N", help=f"default: {_DEFAULT.max_tokens}")
    add_engine(parser)
    add_threads(parser)
    _add_alert(parser)
    _add_names(parser)
    add_debug(parser)
    return parser


def _add_alert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("alert").add_argument
    add(
        "--alert",
        metavar="QUESTION",
        help="of yes or no, decided for each frame; ~/alert says if it is raised",
    )
    add(
        "--threshold", metavar="P", help=f"probability that raises it (default: {_DEFAULT.alert_threshold:g})"
    )
    add("--hysteresis", metavar="P", help=f"ends this far below (default: {_DEFAULT.alert_hysteresis:g})")


def _add_names(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("network").add_argument
    add("--topic", default="image", metavar="TOPIC", help="sensor_msgs/Image (default: %(default)s)")
    add("--compressed", action="store_true", help="take TOPIC/compressed, sensor_msgs/CompressedImage")
    add("--node", default=Node.name, metavar="NAME", help="the node's name (default: %(default)s)")
    add("--namespace", default=Node.namespace, metavar="NS", help="the node's (default: %(default)s)")
    add("--domain", metavar="N", help="default: $ROS_DOMAIN_ID, or 0")
    add("--connect", default=ROUTER, metavar="ENDPOINT", help="the router (default: %(default)s)")
    add("--humble", action="store_true", help="the others run ROS 2 Humble, whose types have no hashes")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of vtp-zenoh; returns the exit code: 0 also when Ctrl-C or SIGTERM ended it."""
    args = build_parser().parse_args(argv)
    return run_command(PROG, lambda: _run(args), args.debug, interrupted=_STOPPED)


def _run(args: argparse.Namespace) -> None:
    settings, node = settings_of(args), node_of(args, os.environ.get("ROS_DOMAIN_ID"))
    node.topic(args.topic)
    check_endpoint(args.connect)
    with ended_by_ctrl_c(), closing(Network(node, args.connect)) as network:
        folder = take_bundle(PROG, args.bundle)
        with closing(Model.load(changed(settings, {"bundle": str(folder)}, Phase.UNCONFIGURED))) as model:
            _tell(f"loaded {quoted(str(folder))} on {model.pipeline.engine}")
            # KeyboardInterrupt is SIGTERM's as well: what a node is ended by.
            robot = ZenohRobot(network, model, settings, args.topic, _tell)
            with closing(robot), suppress(KeyboardInterrupt):
                robot.watch(threading.Event())


def settings_of(args: argparse.Namespace) -> Settings:
    """The flags as vtp-ros2's parameters. Raises UsageError."""
    given: dict[str, Any] = {name: getattr(args, name) for name in _TEXTS}
    for flags, read in ((_WHOLE, whole_number), (_REAL, real_number)):
        for flag, name in flags.items():
            if (text := getattr(args, flag)) is not None:
                given[name] = read(flag.replace("_", "-"), text)
    values = {name: value for name, value in given.items() if value is not None}
    transport = COMPRESSED if args.compressed else RAW
    settings = changed(Settings(), {**values, "image_transport": transport}, Phase.UNCONFIGURED)
    if not settings.rate:
        raise UsageError("rate 0 asks nothing; give more than 0")
    check_asks(settings)
    return settings


def node_of(args: argparse.Namespace, domain: str | None) -> Node:
    """The node's names. Raises UsageError.

    domain  what $ROS_DOMAIN_ID says
    """
    name, text = ("domain", args.domain) if args.domain is not None else ("$ROS_DOMAIN_ID", domain or "0")
    return Node(args.node, args.namespace, whole_number(name, text), not args.humble)


def _tell(line: str) -> None:
    note(PROG, line)


if __name__ == "__main__":
    sys.exit(main())
