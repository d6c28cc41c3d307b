"""A camera and a listener that know nothing of vtp: ROS 2 over zenoh by somebody else's client.

    python zenoh_peer.py sdk|pyzeros PORT PICTURES.json [--fps 30]

sdk is Robotis' zenoh-ros2-sdk, pyzeros is pyzeros. Prints what it published when, and what came on the node's
topics with what was attached to it. Each line of its standard input is a wish in JSON:
{"camera": true|false}, {"prompt": TEXT}, {"raw": HEX} (bytes for the pictures' topic), {"tokens": ID} or
{"graph": ID}.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

IMAGE, COMPRESSED, STRING = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage", "std_msgs/msg/String"
HEADER, TIME = "std_msgs/msg/Header", "builtin_interfaces/msg/Time"
DEFINITIONS = {
    TIME: "int32 sec\nuint32 nanosec\n",
    HEADER: "builtin_interfaces/Time stamp\nstring frame_id\n",
    STRING: "string data\n",
    IMAGE: "std_msgs/Header header\nuint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\n"
    "uint32 step\nuint8[] data\n",
    COMPRESSED: "std_msgs/Header header\nstring format\nuint8[] data\n",
}
ANSWERS = ("/vtp/answer", "/vtp/answer_json")


SAYING = threading.Lock()


def say(**told: Any) -> None:
    with SAYING:  # print writes a line's end by itself
        print(json.dumps(told), flush=True)


class Sdk:
    """zenoh-ros2-sdk; definitions and hashes are given, as it would fetch them with git."""

    def __init__(self, port: int, kind: str, topic: str) -> None:
        from zenoh_ros2_sdk import ROS2Publisher, ROS2Subscriber
        from zenoh_ros2_sdk.attachment import Attachment
        from zenoh_ros2_sdk.session import ZenohSession
        from zenoh_ros2_sdk.utils import get_type_hash

        self.manager = ZenohSession.get_instance("127.0.0.1", port)
        for name, definition in DEFINITIONS.items():
            self.manager.register_message_type(definition, name)
        self.session, self.kind, self.port = self.manager.session, kind, port
        where = {"router_ip": "127.0.0.1", "router_port": port}

        def described(name: str) -> dict[str, Any]:
            told = get_type_hash(name, DEFINITIONS[name], {one: DEFINITIONS[one] for one in (HEADER, TIME)})
            return {"msg_type": name, "msg_definition": DEFINITIONS[name], "type_hash": told, **where}

        self.pictures = ROS2Publisher(topic, **described(kind))
        self.prompts = ROS2Publisher("/vtp/prompt", **described(STRING))
        self.key = self.pictures.keyexpr
        self.held: list[Any] = []
        for name in ANSWERS:
            typed = ROS2Subscriber(
                name,
                callback=lambda message, name=name: say(topic=name, data=message.data),
                **described(STRING),
            )

            def attached(sample: Any, name: str = name) -> None:
                found = Attachment.from_bytes(sample.attachment.to_bytes())
                say(attached=name, sequence=found.sequence_id, ns=found.timestamp_ns, gid=found.gid.hex())

            self.held += [typed, self.session.declare_subscriber(typed.keyexpr, attached)]

    def picture(self, stamp: int, name: str, fields: dict[str, Any]) -> None:
        types = self.manager.store.types
        header = types[HEADER](types[TIME](*divmod(stamp, 10**9)), name)
        more = {"is_bigendian": 0} if self.kind == IMAGE else {}
        self.pictures.publish(header=header, **more, **fields)

    def prompt(self, text: str) -> None:
        self.prompts.publish(data=text)

    def graph(self) -> Any:
        from zenoh_ros2_sdk.discovery import get_topic_names_and_types

        return get_topic_names_and_types(router_ip="127.0.0.1", router_port=self.port)


class Pyzeros:
    """pyzeros, whose messages and hashes are those of ros2-pyterfaces; their strings are bytes.

    It wants a C compiler.
    """

    def __init__(self, port: int, kind: str, topic: str) -> None:
        os.environ.setdefault("CYDR_CACHE_DIR", str(Path(sys.prefix) / "cydr"))
        import zenoh
        from pyzeros import Node, Pub
        from pyzeros.builtin_msgs import Attachment
        from pyzeros.sub import RawSub
        from ros2_pyterfaces.cydr import all_msgs

        config = zenoh.Config()
        for name, value in {
            "mode": "peer",
            "connect/endpoints": [f"tcp/127.0.0.1:{port}"],
            "scouting/multicast/enabled": False,
        }.items():
            config.insert_json5(name, json.dumps(value))
        self.session, self.all, self.kind = zenoh.open(config), all_msgs, kind
        node = Node("other", self.session)
        self.type = getattr(all_msgs, kind.rpartition("/")[2])
        for one in (self.type, all_msgs.String, Attachment):  # their readers are compiled when first used
            one.deserialize(one().serialize())
        self.pictures = Pub(self.type, topic, session=node)
        self.prompts = Pub(all_msgs.String, "/vtp/prompt", session=node)
        self.key = self.pictures.publisher_keyexpr
        self.held: list[Any] = [node]
        for name in ANSWERS:

            def come(sample: Any, name: str = name) -> None:
                say(topic=name, data=all_msgs.String.deserialize(sample.payload.to_bytes()).data.decode())
                found = Attachment.deserialize(b"\0\1\0\0" + sample.attachment.to_bytes())
                gid = bytes(np.asarray(found.source_gid, np.uint8))
                sequence, taken = int(found.sequence_number), int(found.source_timestamp)
                assert found.gid_length == len(gid)
                say(attached=name, sequence=sequence, ns=taken, gid=gid.hex())

            self.held.append(RawSub(all_msgs.String, name, come, session=node))

    def picture(self, stamp: int, name: str, fields: dict[str, Any]) -> None:
        seconds, rest = divmod(stamp, 10**9)
        header = self.all.Header(stamp=self.all.Time(sec=seconds, nanosec=rest), frame_id=name.encode())
        encoded = {key: value.encode() if isinstance(value, str) else value for key, value in fields.items()}
        self.pictures.publish(self.type(header=header, **encoded))

    def prompt(self, text: str) -> None:
        self.prompts.publish(self.all.String(data=text.encode()))

    def graph(self) -> Any:
        return []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("client", choices=["sdk", "pyzeros"])
    parser.add_argument("port", type=int)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--fps", type=float, default=30.0)
    args = parser.parse_args()
    pictures = [
        {**one, "data": np.frombuffer(base64.b64decode(one["data"]), np.uint8)}
        for one in json.loads(args.pictures.read_text())
    ]
    kind, topic = (COMPRESSED, "/image/compressed") if "format" in pictures[0] else (IMAGE, "/image")
    client: Any = {"sdk": Sdk, "pyzeros": Pyzeros}[args.client](args.port, kind, topic)
    running, over = threading.Event(), threading.Event()

    def publish() -> None:
        number, due = 0, time.monotonic()
        while not over.wait(max(0.0, due - time.monotonic())):
            due = max(due + 1 / args.fps, time.monotonic())
            if running.is_set():
                place, stamp = number % len(pictures), time.time_ns()
                say(stamp_ns=stamp, picture=place)
                client.picture(stamp, f"camera_{place}", pictures[place])
                number += 1

    threading.Thread(target=publish, daemon=True).start()
    say(ready=True)
    for line in sys.stdin:
        wish = json.loads(line)
        if "camera" in wish:
            (running.set if wish["camera"] else running.clear)()
        elif "prompt" in wish:
            client.prompt(wish["prompt"])
        elif "raw" in wish:
            client.session.put(client.key, bytes.fromhex(wish["raw"]))
        elif "graph" in wish:
            say(id=wish["graph"], result=client.graph())
        elif "tokens" in wish:
            replies = client.session.liveliness().get("@ros2_lv/**", timeout=5.0)
            say(id=wish["tokens"], result=sorted(str(one.ok.key_expr) for one in replies if one.ok))
    over.set()
    client.session.close()
    os._exit(0)  # their threads may wait for ever


main()
