"""vtp-ros2: a ROS 2 lifecycle node that answers a standing question about a camera's newest picture."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from vtp.engines import VtpError
from vtp.engines.errors import shown
from vtp.runtime.commands.arguments import add_debug
from vtp.runtime.commands.console import Parser, run_command
from vtp.runtime.commands.stopping import ended_by_ctrl_c
from vtp.serve.robots.settings import PARAMETERS

if TYPE_CHECKING:
    from vtp.serve.robots.node import Robot

PROG = "vtp-ros2"
_STOPPED = "the node was stopped before it had ended"
# A transition that loads, one that is asked for meanwhile, an ask that waits, images, and the rest.
_THREADS = 5
_PAUSE = 0.1  # seconds after a callback that failed


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
    with _initialised(ros), _spinning(overrides) as robot, suppress(KeyboardInterrupt):
        if not args.unconfigured:
            _start(robot)
        threading.Event().wait()


@contextmanager
def _initialised(ros: list[str]) -> Iterator[None]:
    """rclpy's context. Signals stay Python's own: the main thread waits for them."""
    import rclpy
    from rclpy.signals import SignalHandlerOptions

    with ended_by_ctrl_c():  # as rclpy does
        try:
            rclpy.init(args=ros, signal_handler_options=SignalHandlerOptions.NO)
        except Exception as error:  # rclpy names several of its own for arguments that it cannot read
            raise VtpError(f"ROS 2 cannot start: {error}") from error
        try:
            yield
        finally:
            rclpy.try_shutdown()


@contextmanager
def _spinning(overrides: dict[str, Any]) -> Iterator[Robot]:
    """The node, whose callbacks run in threads beside the caller's; afterwards nothing of it is left."""
    from rclpy.executors import MultiThreadedExecutor

    from vtp.serve.robots.node import Robot

    robot = Robot(overrides)
    executor = MultiThreadedExecutor(_THREADS)
    executor.add_node(robot.node)
    ending = threading.Event()
    thread = threading.Thread(target=_spin, args=(executor, robot, ending), name=PROG, daemon=True)
    thread.start()
    try:
        yield robot
    finally:
        ending.set()
        robot.deactivate()  # or the executor would wait for who asks
        executor.shutdown()
        thread.join()
        robot.cleanup()
        robot.node.destroy_node()


def _spin(executor: Any, robot: Robot, ending: threading.Event) -> None:
    """Run callbacks until told to end. One that fails is logged: a bad request must not end the node.

    (Up to Jazzy, rclpy lets a transition that is not possible end the executor.)
    """
    while not ending.is_set():
        try:
            executor.spin()
            return  # the context was shut down
        except Exception as error:
            if not ending.is_set():
                robot.log(f"a callback failed: {type(error).__name__}: {shown(error)}")
                ending.wait(_PAUSE)


def _start(robot: Robot) -> None:
    """Configure and activate. Raises what a transition failed with."""
    for trigger in (robot.node.trigger_configure, robot.node.trigger_activate):
        trigger()
        if robot.failure is not None:
            raise robot.failure


if __name__ == "__main__":
    sys.exit(main())
