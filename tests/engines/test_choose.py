"""Which engine runs: decisions with their reasons, whatever this machine has."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib import metadata, util
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vtp.engines import AUTO, UsageError, VtpError, capabilities, choose_engine, engine_names, judge_engines
from vtp.engines.cuda.driver import CudaDevice, CudaProbe
from vtp.engines.registry import installed_providers

from ..stand_ins.fake_trt import install

CPU = ["CPUExecutionProvider"]
OPENVINO = util.find_spec("openvino") is not None
OPENVINOS = ("openvino-cpu", "openvino-gpu", "openvino-npu")
GPU = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


def probe(providers: list[str] | None) -> Callable[[], list[str] | None]:
    return lambda: providers


def hide_openvino(patch: pytest.MonkeyPatch) -> None:
    """As if it were not installed, whatever is."""
    found = util.find_spec
    patch.setattr(util, "find_spec", lambda name, *more: None if name == "openvino" else found(name, *more))


def install_openvino(patch: pytest.MonkeyPatch, version: str, devices: list[str]) -> None:
    """As if this version were installed, and listed these devices."""
    hide_openvino(patch)
    others = util.find_spec
    patch.setattr(
        util, "find_spec", lambda name, *more: "there" if name == "openvino" else others(name, *more)
    )
    patch.setattr(metadata, "version", lambda name: version)
    module = ModuleType("openvino")
    module.Core = lambda: SimpleNamespace(available_devices=devices)  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "openvino", module)


def orin() -> CudaProbe:
    return CudaProbe([CudaDevice("Orin", "8.7", 8 << 30)], driver="12.6")


def no_gpu() -> CudaProbe:
    return CudaProbe(reason="the driver finds no GPU")


def test_auto_takes_the_cpu_without_cuda_and_says_why() -> None:
    choice = choose_engine(AUTO, probe=probe(CPU))
    assert choice.engine == "ort-cpu"
    assert [(one.engine, one.accepted) for one in choice.decisions] == [
        ("ort-cuda", False),
        ("ort-cpu", True),
    ]
    assert "vtp-edge[ort-gpu]" in choice.decisions[0].reason


def test_auto_takes_cuda_for_float16() -> None:
    choice = choose_engine(AUTO, "float16", probe(GPU), orin)
    assert choice.engine == "ort-cuda"
    assert "Orin (SM 8.7)" in choice.decisions[0].reason


def test_auto_takes_the_cpu_when_the_cuda_build_finds_no_gpu() -> None:
    choice = choose_engine(AUTO, "float16", probe(GPU), no_gpu)
    assert choice.engine == "ort-cpu"
    assert choice.decisions[0].reason.startswith("the driver finds no GPU")


def test_cuda_asked_for_without_a_gpu_is_one_line() -> None:
    with pytest.raises(VtpError, match=r"'ort-cuda' cannot run here: the driver finds no GPU; .*ort-cpu"):
        choose_engine("ort-cuda", "float16", probe(GPU), no_gpu)


@pytest.mark.parametrize("wanted", [None, 0, True, 1.5, [], b"ort-cpu"])
def test_an_engine_that_is_no_name_is_one_line(wanted: Any) -> None:
    with pytest.raises(UsageError, match=r"engine .* is not a name; choose one of auto, ort-cuda, ort-cpu"):
        choose_engine(wanted, probe=probe(CPU))


def test_a_bundle_for_tensorrt_runs_on_the_cpu_provider_only() -> None:
    choice = choose_engine(AUTO, "float16", probe(GPU), orin, target="tensorrt")
    assert choice.engine == "ort-cpu"
    assert "does not run target 'tensorrt'; export the bundle again with --target ort" in (
        choice.decisions[0].reason
    )
    with pytest.raises(VtpError, match="'ort-cuda' cannot run here: it does not run target"):
        choose_engine("ort-cuda", "float16", probe(GPU), orin, target="tensorrt")
    with pytest.raises(VtpError, match=r"made for target 'gpu9'.*--target ort"):
        choose_engine(AUTO, probe=probe(CPU), target="gpu9")


def test_judging_all_engines_raises_nothing() -> None:
    assert [(one.engine, one.accepted) for one in judge_engines("float16", probe(GPU), orin)] == [
        ("ort-cuda", True),
        ("ort-cpu", True),
        ("openvino-cpu", OPENVINO),
        ("openvino-gpu", False),
        ("openvino-npu", False),
        ("tensorrt", False),
        ("tensorrt-rtx", False),
    ]

    def broken() -> list[str]:
        raise VtpError("does not import")

    said = {one.engine: one.reason for one in judge_engines(probe=broken)}
    assert {said.pop(name) for name in ("ort-cuda", "ort-cpu")} == {"does not import"}
    assert "does not import" not in said.values()


def test_tensorrt_runs_bundles_made_for_it_where_library_and_gpu_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VtpError, match="'tensorrt' cannot run here: tensorrt is not installed: install Ten"):
        choose_engine("tensorrt", "float16", probe(CPU), orin, "jetpack6")
    install(monkeypatch)
    for target in ("tensorrt", "jetpack6"):
        choice = choose_engine("tensorrt", "float16", probe(None), orin, target)
        assert choice.decisions[0].reason == "tensorrt 10.3.0, and a Orin (SM 8.7)"
    with pytest.raises(VtpError, match=r"does not run target 'ort'; export .* with --target tensorrt"):
        choose_engine("tensorrt", "float16", probe(CPU), orin, "ort")
    with pytest.raises(VtpError, match=r"'tensorrt' cannot run here: the driver finds no GPU; .*ort-cpu"):
        choose_engine("tensorrt", "float16", probe(CPU), no_gpu, "tensorrt")


def test_auto_leaves_tensorrt_alone_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    choice = choose_engine(AUTO, "float16", probe(CPU), orin, "tensorrt")
    assert choice.engine == "ort-cpu"
    said = {one.engine: one.reason for one in choice.decisions}
    assert said["tensorrt"] == "its code never ran on a GPU yet: only by name, --engine tensorrt"


def test_decisions_say_by_a_code_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def codes(dtype: str | None, found: Any, cuda: Any, target: str | None) -> list[str]:
        said = {one.engine: one.code for one in judge_engines(dtype, probe(found), cuda, target)}
        return [said[name] for name in ("ort-cuda", "ort-cpu", "tensorrt")]

    assert codes(None, None, orin, None) == ["no-library"] * 3
    assert codes("float16", CPU, orin, "ort") == ["no-provider", "accepted", "target"]
    assert codes("float32", GPU, orin, "ort") == ["dtype", "accepted", "target"]
    assert codes("float16", GPU, no_gpu, "ort") == ["no-gpu", "accepted", "target"]
    assert codes("float16", GPU, orin, "tensorrt") == ["target", "accepted", "no-library"]
    install(monkeypatch)
    assert codes("float16", GPU, orin, "jetpack6") == ["accepted"] * 3
    choice = choose_engine(AUTO, "float16", probe(CPU), orin, "tensorrt")
    assert {one.engine: one.code for one in choice.decisions}["tensorrt"] == "by-name"
    assert choice.decisions[0].to_json() == {
        "engine": "ort-cuda",
        "code": "target",
        "reason": choice.decisions[0].reason,
        "accepted": False,
    }


def test_capabilities_are_facts_of_every_engine() -> None:
    """As the engines are: ONNX Runtime's and OpenVINO's share the host's memory, two run what was built."""
    able = {name: capabilities(name) for name in engine_names() if name != AUTO}
    assert {name for name, one in able.items() if one.on_cpu} == {"ort-cpu", *OPENVINOS}
    assert {name for name, one in able.items() if one.widens_float16} == {"ort-cpu", *OPENVINOS}
    assert {name for name, one in able.items() if "ort" in one.targets} == {"ort-cuda", "ort-cpu", *OPENVINOS}
    assert {name for name, one in able.items() if not one.float64} == set(OPENVINOS)
    assert {name for name, one in able.items() if one.proven} == {"ort-cuda", "ort-cpu", "openvino-cpu"}
    built = {name for name, one in able.items() if one.built}
    assert built == {name for name, one in able.items() if one.largest_batch == 1}
    assert built == {"tensorrt", "tensorrt-rtx"}
    with pytest.raises(
        UsageError, match="unknown engine 'auto'; choose one of ort-cuda, ort-cpu, openvino-cpu"
    ):
        capabilities(AUTO)


def test_auto_leaves_float32_to_the_cpu() -> None:
    choice = choose_engine(AUTO, "float32", probe(GPU))
    assert choice.engine == "ort-cpu"
    assert "--dtype float16" in choice.decisions[0].reason


@pytest.mark.parametrize("wanted", [AUTO, "ort-cpu", "ort-cuda"])
def test_no_onnxruntime_names_the_extra(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_openvino(monkeypatch)
    with pytest.raises(VtpError, match=r"not installed: pip install 'vtp-edge\[ort\]'"):
        choose_engine(wanted, probe=probe(None))


def test_without_onnxruntime_auto_takes_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    install_openvino(monkeypatch, "2026.4.1", ["CPU"])
    choice = choose_engine(AUTO, probe=probe(None))
    assert choice.engine == "openvino-cpu"
    assert "onnxruntime is not installed" in choice.decisions[1].reason
    assert choose_engine("openvino-cpu", probe=probe(None)).decisions[0].reason == "openvino 2026.4.1"
    with pytest.raises(VtpError, match=r"does not run target 'tensorrt'.* --target ort"):
        choose_engine("openvino-cpu", probe=probe(None), target="tensorrt")


def test_openvino_that_is_not_there_or_too_old_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        hide_openvino(patch)
        with pytest.raises(VtpError, match=r"not installed: pip install 'vtp-edge\[openvino\]'"):
            choose_engine("openvino-cpu", probe=probe(CPU))
    install_openvino(monkeypatch, "2025.3.0", ["CPU"])
    with pytest.raises(
        VtpError, match=r"openvino 2025\.3\.0 is older than 2026\.4: pip install .* --upgrade"
    ):
        choose_engine("openvino-cpu", probe=probe(CPU))


@pytest.mark.parametrize(("kind", "listed"), [("gpu", "GPU.1"), ("npu", "NPU")])
def test_devices_of_openvino_are_those_that_it_lists(
    kind: str, listed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_openvino(monkeypatch, "2026.5.0", ["CPU"])
    with pytest.raises(
        VtpError, match=f"lists no {kind.upper()} on this machine, only CPU; use --engine open"
    ):
        choose_engine(f"openvino-{kind}", probe=probe(None))
    install_openvino(monkeypatch, "2026.5.0", ["CPU", listed])
    assert choose_engine(f"openvino-{kind}", probe=probe(None)).engine == f"openvino-{kind}"


def test_cuda_asked_for_without_cuda_names_the_extra() -> None:
    with pytest.raises(VtpError, match=r"'ort-cuda' cannot run here: .*'vtp-edge\[ort-gpu\]'") as caught:
        choose_engine("ort-cuda", probe=probe(CPU))
    assert caught.value.exit_code == 1


def test_cuda_asked_for_with_float32_names_the_export_flag() -> None:
    with pytest.raises(VtpError, match="--dtype float16"):
        choose_engine("ort-cuda", "float32", probe(GPU))


def test_asked_for_by_name_other_engines_are_not_judged() -> None:
    assert [one.engine for one in choose_engine("ort-cpu", probe=probe(GPU)).decisions] == ["ort-cpu"]


def test_unknown_engine_suggests_the_nearest_before_probing() -> None:
    def never() -> None:
        raise AssertionError("probed")

    with pytest.raises(UsageError, match="unknown engine 'ort-gpu'; did you mean 'ort-cpu'") as caught:
        choose_engine("ort-gpu", probe=never)
    assert all(name in str(caught.value) for name in engine_names())
    assert "\n" not in str(caught.value)


def test_this_machine_has_the_cpu_provider() -> None:
    assert "CPUExecutionProvider" in (installed_providers() or [])


def test_a_broken_onnxruntime_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def fail(name: str, *args: object) -> object:
        if name == "onnxruntime":
            raise ImportError("libcudart.so.13:\n cannot open")
        return real(name, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(VtpError, match="does not import") as caught:
        installed_providers()
    assert "\n" not in str(caught.value)
