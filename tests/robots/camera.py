"""A camera, in ROS' own Python: publishes pictures of a file at a rate, and prints what it published when.

    python camera.py PICTURES.json [--fps 30] [--stamp NS]

PICTURES.json holds a list of messages: {encoding, height, width, step, data} or {format, data}, data in
base64. The topic is `image`, or `image/compressed`. Runs until its standard input ends.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import rclpy
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.time import Time
from sensor_msgs.msg import CompressedImage, Image


def message_of(picture: dict[str, Any]) -> Any:
    """The message of one picture, without its header."""
    fields = {**picture, "data": base64.b64decode(picture["data"])}
    return CompressedImage(**fields) if "format" in fields else Image(**fields)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--fps", type=float, default=30.0)
    parser.add_argument("--stamp", type=int, metavar="NS", help="of every message, in place of now")
    args, _ = parser.parse_known_args()
    messages = [message_of(picture) for picture in json.loads(args.pictures.read_text())]
    rclpy.init(args=sys.argv)
    node = rclpy.create_node("camera")
    kind = type(messages[0])
    topic = "image/compressed" if kind is CompressedImage else "image"
    publisher = node.create_publisher(
        kind, topic, QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    )
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    number, due = 0, time.monotonic()
    while not ended.wait(max(0.0, due - time.monotonic())):
        due = max(due + 1 / args.fps, time.monotonic())
        place = number % len(messages)
        message = messages[place]
        stamp = node.get_clock().now()
        message.header.stamp = (stamp if args.stamp is None else Time(nanoseconds=args.stamp)).to_msg()
        message.header.frame_id = f"camera_{place}"
        publisher.publish(message)
        print(json.dumps({"stamp_ns": stamp.nanoseconds, "picture": place}), flush=True)
        number += 1
    node.destroy_node()
    rclpy.shutdown()


main()
