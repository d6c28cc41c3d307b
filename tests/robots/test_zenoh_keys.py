"""What vtp-zenoh writes, held to other makers' values: keys, tokens, attachments, hashes, CDR. No zenoh."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from rosbags.typesys import Stores, get_typestore

from vtp.engines import UsageError, VtpError
from vtp.serve.robots.cdr import BOOL, STRING, bool_message, read_string, string_message
from vtp.serve.robots.zenoh.cli import build_parser, node_of, settings_of
from vtp.serve.robots.zenoh.keys import HASHES, PUBLISHES, SUBSCRIBES, Node, QoS, attachment, gid_of
from vtp.serve.robots.zenoh.network import Network, check_endpoint

from .processes import environment, ros_python

# What zenoh-ros2-sdk 0.1.8 and pyzeros 0.1.0 make of the same (the second of QoS and attachments, too).
SESSION = "1afdfc80007e6c8befda127f072be46b"
TEXT = f"std_msgs::msg::dds_::String_/{HASHES[STRING]}"
EYE = f"@ros2_lv/7/{SESSION}/0/0/NN/%/%front%left/eye"
ANSWER = f"@ros2_lv/7/{SESSION}/0/3/MP/%/%front%left/eye/%front%left%eye%answer/{TEXT}/::,10:,:,:,,"
PROMPT = f"@ros2_lv/0/{SESSION}/0/5/MS/%/%/vtp/%image/{TEXT}/2::,1:,:,:,,"
ATTACHED = "0201000000000000618531852e85ec1810000102030405060708090a0b0c0d0e0f"

STORE = get_typestore(Stores.ROS2_JAZZY)


def test_keys_and_tokens_are_those_of_other_makers() -> None:
    eye = Node("eye", "front/left/", 7)
    assert eye.topic("~/answer") == "/front/left/eye/answer"
    assert eye.key(eye.topic("~/answer"), STRING) == f"7/front/left/eye/answer/{TEXT}"
    assert eye.token(SESSION) == EYE
    assert eye.endpoint_token(SESSION, 3, PUBLISHES, eye.topic("~/answer"), STRING, QoS()) == ANSWER
    best_effort = QoS(depth=1, best_effort=True)
    assert Node().endpoint_token(SESSION, 5, SUBSCRIBES, "/image", STRING, best_effort) == PROMPT


def test_topics_are_the_nodes_the_namespaces_or_nobodys() -> None:
    eye, plain = Node("eye", "/front"), Node()
    assert [eye.topic(name) for name in ("~/a/b", "a/b", "/a/b")] == ["/front/eye/a/b", "/front/a/b", "/a/b"]
    assert [plain.topic(name) for name in ("~/a", "a", "/a")] == ["/vtp/a", "/a", "/a"]


def test_humble_has_no_hashes() -> None:
    humble = Node(hashed=False)
    assert (
        humble.key("/vtp/answer", STRING) == "0/vtp/answer/std_msgs::msg::dds_::String_/TypeHashNotSupported"
    )
    token = humble.endpoint_token(SESSION, 1, PUBLISHES, "/vtp/answer", STRING, QoS())
    assert token.split("/")[11] == "TypeHashNotSupported"


@pytest.mark.parametrize("name", ["", "9a", "a b", "a//b", "a/", "a-b", "*", "a/**", "~", "ä", "$x", "a\n"])
def test_names_that_ros_does_not_allow_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is not a name of ROS"):
        Node().topic(name)
    for given in ({"name": name}, {"namespace": f"/b/{name}c d"}):
        with pytest.raises(UsageError, match="is not a name of ROS"):
            Node(**given)


def test_what_is_attached_is_that_of_other_makers() -> None:
    assert attachment(258, 1795956786263590241, bytes(range(16))).hex() == ATTACHED


def test_gids_are_of_16_bytes_and_one_for_each_publisher() -> None:
    gids = [gid_of(token) for token in (ANSWER, ANSWER, PROMPT)]
    assert [len(gid) for gid in gids] == [16, 16, 16]
    assert gids[0] == gids[1] != gids[2]


@pytest.mark.parametrize("kind", HASHES)
def test_hashes_are_those_of_the_definitions(kind: str) -> None:
    assert STORE.hash_rihs01(kind) == HASHES[kind]


@pytest.mark.parametrize("text", ["", "a", "abc", "käse ☕", 'a "b"\n' * 1000])
def test_answers_are_what_rosbags_reads_and_prompts_what_it_writes(text: str) -> None:
    assert STORE.deserialize_cdr(string_message(text), STRING).data == text
    for order in (True, False):
        data = bytes(STORE.serialize_cdr(STORE.types[STRING](text), STRING, little_endian=order))
        assert read_string(data) == text


@pytest.mark.parametrize("value", [True, False])
def test_an_alert_is_what_rosbags_reads(value: bool) -> None:
    assert STORE.deserialize_cdr(bool_message(value), BOOL).data is value


@pytest.mark.parametrize(
    "data", [b"", b"\0\1\0\0", b"\0\1\0\0\xff\xff\xff\xff", b"\0\2\0\0\1\0\0\0\0", b"{}{}{}"]
)
def test_a_prompt_that_is_damaged_is_refused(data: bytes) -> None:
    with pytest.raises(VtpError, match="a message is"):
        read_string(data)


@pytest.mark.parametrize("endpoint", ["", "localhost:7447", "tcp/", "tcp://localhost", "foo/a:1", "tcp/a b"])
def test_what_is_not_an_address_is_refused(endpoint: str) -> None:
    with pytest.raises(UsageError, match="is not an address of zenoh"):
        check_endpoint(endpoint)


@pytest.mark.parametrize(
    "endpoint", ["tcp/localhost:7447", "tls/robot:7447#root_ca_certificate=a.pem", "tcp/[::1]:1"]
)
def test_addresses_are_taken(endpoint: str) -> None:
    check_endpoint(endpoint)


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zenoh", None)
    with pytest.raises(VtpError, match=r"run: pip install 'vtp-edge\[zenoh\]'"):
        Network(Node())


# -- flags ---------------------------------------------------------------------------------------------------


def flags(*words: str) -> Any:
    return build_parser().parse_args(["bundle", *words])


def test_flags_are_the_parameters_of_vtp_ros2() -> None:
    words = (
        "--prompt what --rate 2 --keep-tokens 16 --max-new-tokens 8 --threads 2 --engine ort-cpu --compressed"
    )
    found = settings_of(
        flags(*words.split(), "--alert", "is it ?", "--threshold", "0.7", "--stale-after", "3")
    )
    assert (found.prompt, found.rate, found.keep_tokens, found.max_tokens) == ("what", 2.0, 16, 8)
    assert (found.threads, found.engine, found.image_transport) == (2, "ort-cpu", "compressed")
    assert (found.alert, found.alert_threshold, found.stale_after) == ("is it ?", 0.7, 3.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "there is no question"),
        (["--prompt", "x", "--rate", "0"], "rate 0 asks nothing; give more than 0"),
        (["--prompt", "x", "--rate", "fast"], "rate 'fast' is not a number"),
        (["--prompt", "x", "--keep-tokens", "1.5"], "keep-tokens '1.5' is not a whole number"),
        (["--prompt", "x", "--threshold", "2"], "alert_threshold 2.0 is not allowed"),
    ],
)
def test_flags_that_are_wrong_are_one_line(words: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings_of(flags(*words))
    assert said in str(caught.value)


def test_the_domain_is_the_flags_or_the_environments() -> None:
    assert node_of(flags(), None).domain == 0
    assert node_of(flags(), "").domain == 0
    assert node_of(flags(), "42").domain == 42
    assert node_of(flags("--domain", "7", "--humble"), "42") == Node(domain=7, hashed=False)
    for words, domain in ((["--domain", "-1"], None), ([], "x"), (["--domain", str(2**32)], None)):
        with pytest.raises(UsageError):
            node_of(flags(*words), domain)


# -- beside ROS itself ---------------------------------------------------------------------------------------

IN_ROS = """
import json, rclpy, sys
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Bool, String
rclpy.init()
node = rclpy.create_node("told")
for kind in (Image, CompressedImage, String, Bool):
    publisher = node.create_publisher(kind, f"/{kind.__name__}", 1)
    (found,) = node.get_publishers_info_by_topic(f"/{kind.__name__}")
    print(found.topic_type, found.topic_type_hash)
texts = [deserialize_message(bytes.fromhex(data), String).data for data in sys.argv[1:-1]]
print(json.dumps([*texts, deserialize_message(bytes.fromhex(sys.argv[-1]), Bool).data]))
"""


@pytest.mark.slow
@pytest.mark.skipif(ros_python() is None, reason="ROS 2 is not installed; run: make test-ros")
def test_hashes_and_messages_are_those_of_rclpy() -> None:
    texts = ["", "a", "abc", "käse"]
    data = [*map(string_message, texts), bool_message(True)]
    words = [ros_python() or "", "-c", IN_ROS, *(one.hex() for one in data)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *kinds, read = done.stdout.splitlines()
    assert dict(line.split(" ", 1) for line in kinds) == HASHES
    assert json.loads(read) == [*texts, True]
