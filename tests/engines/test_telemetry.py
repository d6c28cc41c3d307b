"""ONNX Runtime records and uploads nothing, unless the user says so: looked at in a home of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vtp.engines.ort.library import SWITCH, load_onnxruntime

# Opens a graph of one node, and says what was switched.
_OPEN = """
import os, sys
{first}
from onnx import TensorProto, helper
one = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
two = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [one], [two])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
{load}
ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
print(os.environ.get("ORT_DISABLE_TELEMETRY"))
"""
_PLAIN = _OPEN.format(first="", load="import onnxruntime as ort")
# Importing the package is enough, no matter who loads the library then.
_BEHIND = _OPEN.format(first="import vtp.engines", load="import onnxruntime as ort")
_LOADED = _OPEN.format(
    first="", load="from vtp.engines.ort.library import load_onnxruntime; ort = load_onnxruntime()"
)


def run(script: str, home: Path, switch: str | None = None) -> tuple[str, list[str]]:
    """What a fresh process prints, and the files that it leaves in an empty home."""
    home.mkdir()
    kept = {"HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", SWITCH}
    env = {name: value for name, value in os.environ.items() if name not in kept} | {"HOME": str(home)}
    if switch is not None:
        env[SWITCH] = switch
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip(), sorted(path.name for path in home.rglob("*") if path.is_file())


@pytest.mark.parametrize("script", [_BEHIND, _LOADED])
def test_nothing_is_recorded(tmp_path: Path, script: str) -> None:
    assert run(script, tmp_path / "home") == ("1", [])


def test_a_user_may_turn_it_on(tmp_path: Path) -> None:
    """And then this library records, as it does without vtp: so the test above can fail."""
    said, alone = run(_PLAIN, tmp_path / "alone")
    assert said == "None"
    if not alone:
        pytest.skip(f"onnxruntime {load_onnxruntime().__version__} records nothing on this system")
    assert "deviceid" in alone
    assert run(_BEHIND, tmp_path / "home", "0") == ("0", alone)


def test_the_switch_is_the_library_s_own() -> None:
    """Spelled as the library spells it, from the version on that has one."""
    ort = load_onnxruntime()
    version = tuple(int(part) for part in re.findall(r"\d+", ort.__version__)[:2])
    if version < (1, 29) or sys.platform == "win32":
        pytest.skip("no telemetry of its own before 1.29")
    library = max((Path(ort.__file__).parent / "capi").glob("onnxruntime_pybind11_state*"))
    assert SWITCH.encode() in library.read_bytes()
