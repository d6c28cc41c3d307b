"""The lifecycle node: parameters, topics and transitions, around an `Asker` that knows no ROS.

The only module that uses rclpy, and only inside its functions, so that it can be imported without ROS.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from vtp.engines import VtpError
from vtp.engines.errors import quoted, shown
from vtp.serve.robots.answers import Answer, Received
from vtp.serve.robots.asker import Asker
from vtp.serve.robots.health import Health
from vtp.serve.robots.model import Model
from vtp.serve.robots.settings import COMPRESSED, PARAMETERS, Phase, Settings, changed

__all__ = ["NAME", "Robot", "check_ros"]

NAME = "vtp"  # of the node, unless remapped
_EVERY = 1.0  # seconds between two diagnostics
_QUIET = 5.0  # seconds between two log lines about frames that fail


def check_ros() -> None:
    """VtpError with what to do where ROS 2 or one of its message packages cannot be imported."""
    import importlib

    for name in ("rclpy", "sensor_msgs.msg", "std_msgs.msg", "std_srvs.srv", "diagnostic_msgs.msg"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise VtpError(
                f"vtp-ros2 needs ROS 2's {name.split('.')[0]}, which this Python cannot import "
                f"({shown(error, 120)}); run: source /opt/ros/DISTRO/setup.bash, and install vtp-edge for "
                "that distribution's Python (rclpy does not come by pip)"
            ) from error


class Robot:
    """What a lifecycle node does in each transition. `node` is the rclpy node."""

    def __init__(self, overrides: Mapping[str, Any]) -> None:
        """Make the node, its parameters, publishers and services; nothing is loaded or subscribed to.

        overrides  values of parameters that stand before those of --ros-args

        Raises UsageError for parameters that are not allowed.
        """
        self.health = Health()
        self.failure: Exception | None = None  # of the last transition
        self._phase = Phase.UNCONFIGURED
        self._lock = threading.RLock()  # for settings and phase, which several of rclpy's threads touch
        self._model: Model | None = None
        self._asker: Asker | None = None
        self._subscription: Any = None
        self.node = _managed(self, overrides)
        self._settings = changed(Settings(), self._declared(), Phase.UNCONFIGURED)
        self.node.add_on_set_parameters_callback(self._on_parameters)
        self._make_interfaces()

    # -- transitions, in one of rclpy's threads --------------------------------------------------------------

    def configure(self) -> None:
        """Open the bundle and warm it up: seconds to minutes, during which the node answers services."""
        with self._lock:
            settings, self._phase = self._settings, Phase.INACTIVE  # what is in use does not change from here
        try:
            self._model = Model.load(settings)
        except BaseException:
            self._phase = Phase.UNCONFIGURED
            raise
        self._log().info(f"loaded {quoted(settings.bundle)} on {self._model.pipeline.engine}")
        for line in self._model.notes:
            self._log().warning(line)

    def activate(self) -> None:
        """Subscribe, and ask about what comes."""
        assert self._model is not None  # the state machine lets nobody activate before
        with self._lock:
            self._model.check(self._settings)
            self._phase = Phase.ACTIVE
            kind, topic = self._image_topic()
        self.health.activated(self._now_ns(), topic)
        self._asker = Asker(
            self._model,
            lambda: self._settings,
            self._now_ns,
            self._said,
            self._failed,
            lambda line: self._log().warning(line),
        )
        self._subscribe(kind, topic, _Arrivals(self._asker, self.health, self._now_ns).come)
        self._asker.start()
        self._log().info(f"asking about {topic}")

    def deactivate(self) -> None:
        """End the subscription and the answer that is being written."""
        with self._lock:
            if self._subscription is not None:
                self.node.destroy_subscription(self._subscription)
                self._subscription = None
            if self._asker is not None:
                self._asker.stop()
                self._asker = None
            if self._phase is Phase.ACTIVE:
                self._phase = Phase.INACTIVE

    def cleanup(self) -> None:
        """Free the bundle, whatever the node did before."""
        self.deactivate()
        if self._model is not None:
            self._model.close()
            self._model = None
        self._phase = Phase.UNCONFIGURED

    def transition(self, step: Callable[[], None]) -> bool | None:
        """Run a step: True if it was done, False if it was refused with a reason, None if it broke."""
        try:
            step()
        except Exception as error:
            self.failure = error
            line = str(error) if isinstance(error, VtpError) else f"{type(error).__name__}: {shown(error)}"
            self.health.failed(line)
            self._log().error(f"{step.__name__} failed: {line}")
            return False if isinstance(error, VtpError) else None
        self.health.cleared()
        return True

    def log(self, line: str) -> None:
        """An error, in ROS' log."""
        self._log().error(line)

    # -- parameters ------------------------------------------------------------------------------------------

    def _declared(self) -> dict[str, Any]:
        """Declare every parameter; their values as they were given."""
        from rcl_interfaces.msg import ParameterDescriptor

        values = {}
        for name, parameter in PARAMETERS.items():
            # Dynamic, so that `rate: 5` is taken for 5.0; what is not a number is refused by its own words.
            descriptor = ParameterDescriptor(description=parameter.what, dynamic_typing=True)
            values[name] = self.node.declare_parameter(name, getattr(Settings, name), descriptor).value
        return values

    def _on_parameters(self, parameters: list[Any]) -> Any:
        """Take changes, all or none; other parameters, such as use_sim_time, are not this node's."""
        from rcl_interfaces.msg import SetParametersResult

        values = {one.name: one.value for one in parameters if one.name in PARAMETERS}
        try:
            with self._lock:
                new = changed(self._settings, values, self._phase)
                if self._model is not None and values:
                    self._model.check(new)
                self._settings = new
        except VtpError as error:
            return SetParametersResult(successful=False, reason=str(error))
        if self._asker is not None:
            self._asker.poke()
        return SetParametersResult(successful=True)

    def _on_prompt(self, message: Any) -> None:
        """~/prompt: the same as setting the parameter."""
        from rclpy.parameter import Parameter

        (result,) = self.node.set_parameters([Parameter("prompt", value=message.data)])
        if not result.successful:
            self._log().warning(f"the prompt stays as it was: {result.reason}")

    # -- topics and services ---------------------------------------------------------------------------------

    def _make_interfaces(self) -> None:
        from diagnostic_msgs.msg import DiagnosticArray
        from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
        from rclpy.clock import Clock, ClockType
        from std_msgs.msg import Bool, String
        from std_srvs.srv import Trigger

        node, group = self.node, MutuallyExclusiveCallbackGroup
        self._answers = node.create_publisher(String, "~/answer", 10)
        self._json = node.create_publisher(String, "~/answer_json", 10)
        self._alerts = node.create_publisher(Bool, "~/alert", 10)
        self._diagnostics = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        node.create_subscription(String, "~/prompt", self._on_prompt, 10, callback_group=group())
        node.create_service(Trigger, "~/ask", self._on_ask, callback_group=group())
        self._images = group()
        # A steady clock, so that a simulation that stands still is told of.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        node.create_timer(_EVERY, self._diagnose, callback_group=group(), clock=steady)

    def _image_topic(self) -> tuple[Any, str]:
        """The message type and topic; as image_transport does, .../compressed lies beside what image is."""
        from sensor_msgs.msg import CompressedImage, Image

        topic = self.node.resolve_topic_name("image")
        if self._settings.image_transport == COMPRESSED:
            return CompressedImage, self.node.resolve_topic_name(f"{topic}/compressed")
        return Image, topic

    def _subscribe(self, kind: Any, topic: str, come: Callable[[Any], None]) -> None:
        """Best effort and depth 1 (only the newest is ever wanted), unless qos_overrides say otherwise."""
        from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSPolicyKind, QoSProfile, ReliabilityPolicy
        from rclpy.qos_overriding_options import QoSOverridingOptions

        profile = QoSProfile(
            history=HistoryPolicy.KEEP_LAST,
            depth=1,
            reliability=ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.VOLATILE,
        )
        policies = (
            QoSPolicyKind.HISTORY,
            QoSPolicyKind.DEPTH,
            QoSPolicyKind.RELIABILITY,
            QoSPolicyKind.DURABILITY,
        )
        self._subscription = self.node.create_subscription(
            kind,
            topic,
            come,
            profile,
            callback_group=self._images,
            qos_overriding_options=QoSOverridingOptions(policies),
        )

    def _on_ask(self, request: Any, response: Any) -> Any:
        """~/ask: one answer about the newest frame; the message says it, or why there is none."""
        asker = self._asker
        try:
            if asker is None:
                raise VtpError("the node is not active; activate it and ask again")
            response.success, response.message = True, asker.ask().text
        except VtpError as error:
            response.success, response.message = False, str(error)
        return response

    def _said(self, answer: Answer) -> None:
        """In the asker's thread: publish an answer."""
        from std_msgs.msg import Bool, String

        self.health.said(answer)
        self._json.publish(String(data=answer.to_json()))
        if answer.result is not None:
            self._answers.publish(String(data=answer.text))
        if answer.alert is not None:
            self._alerts.publish(Bool(data=answer.alert[2]))

    def _failed(self, line: str) -> None:
        """In the asker's thread: a frame could not be answered."""
        self.health.failed(line)
        self._log().warning(f"a frame was not answered: {line}", throttle_duration_sec=_QUIET)

    def _diagnose(self) -> None:
        from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

        report = self.health.report(self._phase, self._now_ns(), self._settings.stale_after)
        status = DiagnosticStatus(
            level=bytes([report.level]),
            name=f"{self.node.get_fully_qualified_name().lstrip('/')}: answers",
            message=report.message,
            hardware_id=self.node.get_fully_qualified_name(),
            values=[KeyValue(key=key, value=value) for key, value in report.values.items()],
        )
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.node.get_clock().now().to_msg()
        self._diagnostics.publish(message)

    def _now_ns(self) -> int:
        """The node's clock: the system's, or /clock with use_sim_time."""
        return int(self.node.get_clock().now().nanoseconds)

    def _log(self) -> Any:
        return self.node.get_logger()


class _Arrivals:
    """Numbers the messages of one subscription and hands them over."""

    def __init__(self, asker: Asker, health: Health, now_ns: Callable[[], int]) -> None:
        self._asker, self._health, self._now_ns = asker, health, now_ns
        self._count = 0

    def come(self, message: Any) -> None:
        """The subscription's callback: nothing is decoded here."""
        stamp = message.header.stamp
        received = Received(
            message,
            self._count,
            stamp.sec * 10**9 + stamp.nanosec,
            message.header.frame_id,
            self._now_ns(),
        )
        self._count += 1
        self._health.received(received)
        self._asker.put(received)


def _managed(robot: Robot, overrides: Mapping[str, Any]) -> Any:
    """An rclpy lifecycle node whose transitions are the robot's.

    Its lifecycle services have a callback group of their own that lets several run, so that the node says
    "configuring" while it loads.
    """
    from rclpy.callback_groups import ReentrantCallbackGroup
    from rclpy.lifecycle import LifecycleNodeMixin, TransitionCallbackReturn
    from rclpy.node import Node
    from rclpy.parameter import Parameter

    results = TransitionCallbackReturn
    outcome = {True: results.SUCCESS, False: results.FAILURE, None: results.ERROR}

    class Managed(LifecycleNodeMixin, Node):
        def __init__(self) -> None:
            given = [Parameter(name, value=value) for name, value in overrides.items()]
            Node.__init__(self, NAME, parameter_overrides=given)
            LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())

        def on_configure(self, state: Any) -> Any:
            return outcome[robot.transition(robot.configure)]

        def on_activate(self, state: Any) -> Any:
            return outcome[robot.transition(robot.activate)]

        def on_deactivate(self, state: Any) -> Any:
            return outcome[robot.transition(robot.deactivate)]

        def on_cleanup(self, state: Any) -> Any:
            return outcome[robot.transition(robot.cleanup)]

        def on_shutdown(self, state: Any) -> Any:
            return outcome[robot.transition(robot.cleanup)]

        def on_error(self, state: Any) -> Any:
            robot.cleanup()
            return results.SUCCESS

    return Managed()
