"""A zenoh router, as rmw_zenohd is one: python zenoh_router.py PORT. Runs until its standard input ends."""

from __future__ import annotations

import json
import sys

import zenoh

SETTINGS = {
    "mode": "router",
    "listen/endpoints": [f"tcp/127.0.0.1:{sys.argv[1]}"],
    "scouting/multicast/enabled": False,
}
config = zenoh.Config()
for name, value in SETTINGS.items():
    config.insert_json5(name, json.dumps(value))
with zenoh.open(config):
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.read()
