"""vtp-ros2: a ROS 2 lifecycle node that answers a standing question about a camera's newest picture."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from vtp.engines import VtpError
from vtp.runtime.commands.arguments import add_debug
from vtp.runtime.commands.console import Parser, run_command
from vtp.serve.robots.settings import PARAMETERS

if TYPE_CHECKING:
    from vtp.serve.robots.node import Robot

PROG = "vtp-ros2"
_STOPPED = "the node was stopped before it had ended"
# A transition that loads, one that is asked for meanwhile, an ask that waits, images, and the rest.
_THREADS = 5


def build_parser() -> argparse.ArgumentParser:
    """The flags of vtp-ros2."""
    names = ", ".join(PARAMETERS)
    parser = Parser(
        prog=PROG,
        description="Answer a question about a camera's newest picture, as a ROS 2 lifecycle node.",
        epilog=f"What follows --ros-args is ROS': remappings (-r image:=/camera/image_raw) and parameters "
        f"(-p rate:=2.0): {names}.",
    )
    parser.add_argument(
        "bundle", nargs="?", metavar="BUNDLE", help="a folder that vtp-export made (or the parameter bundle)"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="the standing question (or the parameter prompt)")
    parser.add_argument(
        "--unconfigured", action="store_true", help="wait for a lifecycle manager to configure and activate"
    )
    add_debug(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of vtp-ros2; returns the exit code: 0 also when Ctrl-C or SIGTERM ended it."""
    own, ros = split(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(own)
    return run_command(PROG, lambda: _run(args, ros), args.debug, interrupted=_STOPPED)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments, and those of ROS: from each --ros-args to the next "--" or the end."""
    own: list[str] = []
    ros: list[str] = []
    in_ros = False
    for word in argv:
        if word == "--ros-args":
            in_ros = True
        (ros if in_ros else own).append(word)
        in_ros = in_ros and word != "--"
    return own, ros


def _run(args: argparse.Namespace, ros: list[str]) -> None:
    from vtp.serve.robots.node import check_ros

    check_ros()
    given = {"bundle": args.bundle, "prompt": args.prompt}
    overrides = {name: value for name, value in given.items() if value is not None}
    # KeyboardInterrupt is SIGTERM's as well: what a node is ended by.
    with _initialised(ros), _spinning(overrides) as (robot, ended), suppress(KeyboardInterrupt):
        if not args.unconfigured:
            _start(robot)
        ended.wait()


@contextmanager
def _initialised(ros: list[str]) -> Iterator[None]:
    """rclpy's context. Signals stay Python's own: the main thread waits for them."""
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    try:
        rclpy.init(args=ros, signal_handler_options=SignalHandlerOptions.NO)
    except Exception as error:  # rclpy names several of its own for arguments that it cannot read
        raise VtpError(f"ROS 2 cannot start: {error}") from error
    try:
        yield
    finally:
        rclpy.try_shutdown()


@contextmanager
def _spinning(overrides: dict[str, Any]) -> Iterator[tuple[Robot, threading.Event]]:
    """The node, whose callbacks run in threads beside the caller's, and the event that they have ended.

    Afterwards nothing of it is left. Raises what a callback raised.
    """
    from rclpy.executors import ExternalShutdownException, MultiThreadedExecutor

    from vtp.serve.robots.node import Robot

    robot = Robot(overrides)
    executor = MultiThreadedExecutor(_THREADS)
    executor.add_node(robot.node)
    ended = threading.Event()
    failures: list[BaseException] = []

    def spin() -> None:
        try:
            with suppress(ExternalShutdownException):
                executor.spin()
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=spin, name="vtp-ros2", daemon=True)
    thread.start()
    try:
        yield robot, ended
    finally:
        executor.shutdown()
        thread.join()
        robot.cleanup()
        robot.node.destroy_node()
    if failures:
        raise failures[0]


def _start(robot: Robot) -> None:
    """Configure and activate. Raises what a transition failed with."""
    for trigger in (robot.node.trigger_configure, robot.node.trigger_activate):
        trigger()
        if robot.failure is not None:
            raise robot.failure


if __name__ == "__main__":
    sys.exit(main())
