"""Whoever talks to the node, in ROS' own Python: calls its services and prints what it publishes.

Each line of standard input is {"id", "do", ...} and gets a line {"id", "result"}; what the node publishes is
a line {"topic", "data"}. Ends with its standard input.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import DescribeParameters, GetParameters, ListParameters, SetParametersAtomically
from rclpy.executors import MultiThreadedExecutor
from rclpy.parameter import Parameter, parameter_value_to_python
from rosgraph_msgs.msg import Clock
from std_msgs.msg import Bool, String
from std_srvs.srv import Trigger

NODE = "/vtp"
_PATIENCE = 60.0


class Peer:
    """One request at a time; each waits for its answer."""

    def __init__(self) -> None:
        self.node = rclpy.create_node("peer")
        self._lock = threading.Lock()
        subscribe = self.node.create_subscription
        subscribe(String, f"{NODE}/answer", lambda said: self.tell(topic="answer", data=said.data), 100)
        subscribe(
            String,
            f"{NODE}/answer_json",
            lambda said: self.tell(topic="json", data=json.loads(said.data)),
            100,
        )
        subscribe(Bool, f"{NODE}/alert", lambda said: self.tell(topic="alert", data=said.data), 100)
        subscribe(DiagnosticArray, "/diagnostics", self.diagnosed, 10)
        self.prompts = self.node.create_publisher(String, f"{NODE}/prompt", 10)
        self.clock = self.node.create_publisher(Clock, "/clock", 10)

    def tell(self, **said: Any) -> None:
        with self._lock:
            print(json.dumps(said), flush=True)

    def diagnosed(self, message: DiagnosticArray) -> None:
        for status in message.status:
            values = {one.key: one.value for one in status.values}
            self.tell(
                topic="diagnostics",
                data={
                    "level": status.level[0],
                    "name": status.name,
                    "message": status.message,
                    "values": values,
                },
            )

    def call(self, kind: Any, name: str, request: Any) -> Any:
        client = self.node.create_client(kind, f"{NODE}/{name}")
        try:
            if not client.wait_for_service(_PATIENCE):
                raise RuntimeError(f"no service {name}")
            done = threading.Event()
            future = client.call_async(request)
            future.add_done_callback(lambda _: done.set())
            if not done.wait(_PATIENCE):
                raise RuntimeError(f"no answer of {name}")
            return future.result()
        finally:
            self.node.destroy_client(client)

    # -- what may be asked for -------------------------------------------------------------------------------

    def state(self) -> str:
        return str(self.call(GetState, "get_state", GetState.Request()).current_state.label)

    def change(self, label: str) -> bool:
        request = ChangeState.Request()
        request.transition.label = label
        return bool(self.call(ChangeState, "change_state", request).success)

    def set(self, **values: Any) -> list[Any]:
        parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        request = SetParametersAtomically.Request(parameters=parameters)
        result = self.call(SetParametersAtomically, "set_parameters_atomically", request).result
        return [result.successful, result.reason]

    def get(self, name: str) -> Any:
        found = self.call(GetParameters, "get_parameters", GetParameters.Request(names=[name])).values
        return parameter_value_to_python(found[0])

    def describe(self, name: str) -> str:
        request = DescribeParameters.Request(names=[name])
        return str(self.call(DescribeParameters, "describe_parameters", request).descriptors[0].description)

    def names(self) -> list[str]:
        return list(self.call(ListParameters, "list_parameters", ListParameters.Request()).result.names)

    def ask(self) -> list[Any]:
        answer = self.call(Trigger, "ask", Trigger.Request())
        return [answer.success, answer.message]

    def prompt(self, text: str) -> None:
        self.prompts.publish(String(data=text))

    def tick(self, seconds: int, nanoseconds: int = 0) -> None:
        message = Clock()
        message.clock.sec, message.clock.nanosec = seconds, nanoseconds
        self.clock.publish(message)

    def subscribers(self, topic: str) -> list[dict[str, Any]]:
        """The QoS of whoever subscribes to a topic."""
        found = self.node.get_subscriptions_info_by_topic(topic)
        return [
            {
                "node": one.node_name,
                "reliability": one.qos_profile.reliability.name,
                "durability": one.qos_profile.durability.name,
                "type": one.topic_type,
            }
            for one in found
        ]


def main() -> None:
    rclpy.init()
    peer = Peer()
    executor = MultiThreadedExecutor(2)
    executor.add_node(peer.node)
    spinning = threading.Thread(target=executor.spin)
    spinning.start()
    peer.tell(topic="ready", data=None)
    for line in sys.stdin:
        asked = json.loads(line)
        number, do = asked.pop("id"), asked.pop("do")
        try:
            peer.tell(id=number, result=getattr(peer, do)(**asked))
        except Exception as error:
            peer.tell(id=number, error=repr(error))
    executor.shutdown()
    spinning.join()
    peer.node.destroy_node()
    rclpy.shutdown()


main()
