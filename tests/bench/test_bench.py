"""`vtp-bench` on a tiny bundle: what it prints, writes and refuses. No time is asserted."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from vtp.bench import cli, measure, report
from vtp.bench.common.ceiling import open_ceilings
from vtp.bench.common.energy import SOURCES, Meter
from vtp.bench.common.flops import count
from vtp.bench.common.resident import peak_resident, resident
from vtp.bench.shapes.cached_bundle import Wanted, check
from vtp.engines import UsageError, VtpError


@pytest.fixture(scope="module")
def printed(
    exported: Any, picture_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, str, Path]:
    """One run on a tiny bundle: the JSON that it printed, its CSV, and the picture."""
    folder, patch = tmp_path_factory.mktemp("bench"), pytest.MonkeyPatch()
    arguments = [str(exported("vispruner").folder), "--keep-tokens", "3", "--repeats", "2", "--json"]
    arguments += ["--image", str(picture_file), "--max-new-tokens", "4", "--threads", "1"]
    arguments += ["--csv", str(folder / "figures.csv"), "--plot", str(folder / "stages.png")]
    lines: list[str] = []
    with patch.context() as context:
        context.setenv("VTP_SMALL_CEILINGS", "1")
        context.setattr("builtins.print", lambda *text, **_: lines.extend(map(str, text)))
        code = cli.main(arguments)
    assert code == 0, lines
    found = next(json.loads(line) for line in lines if line.startswith("{"))
    return found, (folder / "figures.csv").read_text(), folder / "stages.png"


def test_stages_add_up_to_the_first_token(printed: Any) -> None:
    found = printed[0]
    names = [stage["stage"] for stage in found["stages"]]
    assert names[:3] == ["preprocess", "tokenize", "vision_encoder"] and names[-1] == "other"
    parts = {stage["stage"]: stage["part"] for stage in found["stages"]}
    assert parts["pruner"] == "pruner" and parts["decoder"] == parts["splice"] == "prefill"
    assert parts["projector"] == "encoder" and parts["tokenize"] == "host"
    assert sum(found["parts"].values()) == pytest.approx(sum(one["ms"]["median"] for one in found["stages"]))
    assert found["visual_tokens"] == {"before": 16, "after": 3}
    assert found["new_tokens"] == 4 and found["tpot_ms"]["runs"] == found["ttft_ms"]["runs"] == 2


def test_operations_are_of_the_shapes_that_ran(printed: Any, exported: Any) -> None:
    found, folder = printed[0], exported("vispruner").folder
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert stages["projector"]["flops"] == count(folder / "projector.onnx", {"batch": 1, "visual": 3}).total
    sequence = 3 + found["prompt_tokens"]
    axes = {"batch": 1, "sequence": sequence, "capacity": 128}
    assert stages["decoder"]["flops"] == count(folder / "decoder.onnx", axes).total > 0
    assert all(stage.get("unknown", 0) == 0 for stage in found["stages"])
    step = count(folder / "decoder.onnx", {**axes, "sequence": 1}, past=sequence)
    assert found["decode"]["flops"] == step.total
    cache = 3 * 2 * 2 * 8 * 4 * sequence  # layers, key and value, heads, width, float32
    assert found["decode"]["bytes"] == step.weights + cache


def test_memory_is_the_manifests(printed: Any, exported: Any) -> None:
    memory, folder = printed[0]["memory"], exported("vispruner").folder
    assert memory["weights"] == sum(file.stat().st_size for file in folder.glob("*.data"))
    kv = json.loads((folder / "manifest.json").read_text())["graphs"]["decoder.onnx"]["kv"]
    assert memory["kv"] == 2 * len(kv["layers"]) * kv["heads"] * kv["capacity"] * kv["head_dim"] * 4
    assert memory["peak"] >= memory["process"] > 0


def test_hardware_and_versions_are_stamped(printed: Any) -> None:
    found = printed[0]
    assert {"processor", "cores", "time", "versions"} <= set(found["machine"])
    assert "onnxruntime" in found["machine"]["versions"]
    assert found["settings"]["threads"] == 1 and found["engine"] == "ort-cpu"


def test_csv_holds_every_figure(printed: Any) -> None:
    found, text, picture = printed
    rows = {row["figure"]: row for row in csv.DictReader(text.splitlines())}
    assert {f"stage {one['stage']}" for one in found["stages"]} <= set(rows)
    assert float(rows["ttft"]["median"]) == found["ttft_ms"]["median"]
    assert int(rows["stage decoder"]["flops"]) == next(
        stage["flops"] for stage in found["stages"] if stage["stage"] == "decoder"
    )
    assert rows["gemm"]["unit"] == "FLOP/s" and int(rows["memory, peak"]["median"]) > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table_says_it_all(printed: Any) -> None:
    text = report.render(printed[0])
    for words in (
        "vision_encoder",
        "of GEMM rate",
        "time to first token",
        "tokens/s",
        "GFLOP/s",
        "peak resident",
    ):
        assert words in text
    assert "energy" in text and "16 → 3" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a BUNDLE or --shape NAME"),
        (["x", "--shape", "smolvlm-256m"], "give either a BUNDLE or --shape NAME"),
        (["x", "--repeats", "0"], "repeats '0' is not a whole number"),
        (["x", "--threads", "two"], "threads 'two' is not a whole number"),
        (["x", "--engine", "abacus"], "unknown engine 'abacus'"),
        (["x", "--plot", "stages.gif"], "ends in '.gif'; choose one of .png, .svg, .pdf"),
    ],
)
def test_bad_flags_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_no_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "is not a bundle" in said and said.count("\n") == 1


def test_what_a_child_refuses_reaches_the_user(exported: Any, picture_file: Path) -> None:
    task = measure.Task(str(exported("vispruner").folder), str(picture_file), "what ?", keep=5, threads=1)
    with pytest.raises(UsageError, match="keep_tokens 5 is not in this bundle, which holds 3, 6"):
        measure.in_child(task)


def test_a_killed_child_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(VtpError, match="left with 1"):
        measure.in_child(measure.Task("bundle", "image", "prompt"))


def wanted(tmp_path: Path, **changes: Any) -> Wanted:
    known = {"shape": "llava-1.5-7b", "method": "vispruner", "keep": 64, "dtype": "float32"}
    return Wanted(**{**known, "engine": "ort-cpu", "cache": tmp_path, **changes})


def test_a_shape_too_large_is_refused_with_figures(tmp_path: Path) -> None:
    with pytest.raises(VtpError, match=r"needs about \d\d\.\d GB of memory on ort-cpu; 8\.0 GB are free"):
        check(wanted(tmp_path), room=8 * 10**9, disk=0)
    with pytest.raises(VtpError, match=r"takes \d\d\.\d GB of disk .* 1\.0 GB are free"):
        check(wanted(tmp_path), room=0, disk=10**9)
    with pytest.raises(UsageError, match="unknown shape 'llava'"):
        check(wanted(tmp_path, shape="llava"), room=0, disk=0)
    with pytest.raises(UsageError, match="unknown dtype 'int2'"):
        check(wanted(tmp_path, dtype="int2"), room=0, disk=0)


def test_float16_on_a_cpu_is_refused_with_what_would_fit(tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider widens float16 and keeps both: float32 takes less there."""
    large = {"shape": "qwen2.5-vl-3b", "engine": "auto"}
    said = r"qwen2\.5-vl-3b in float16 needs about 26\.0 GB .* 21\.0 GB are free here: choose a smaller shape"
    with pytest.raises(VtpError, match=f"{said}, or --dtype float32, which needs 17\\.4 GB$"):
        check(wanted(tmp_path, **large, dtype="float16"), room=21 * 10**9, disk=0)
    check(wanted(tmp_path, **large), room=21 * 10**9, disk=0)
    with pytest.raises(VtpError, match=r"choose a smaller shape$"):
        check(wanted(tmp_path, **large, dtype="float16"), room=8 * 10**9, disk=0)


def test_a_shape_that_is_there_needs_no_disk(tmp_path: Path) -> None:
    here = wanted(tmp_path)
    for folder, file in ((here.model, "config.json"), (here.bundle, "manifest.json")):
        folder.mkdir()
        (folder / file).touch()
    check(here, room=0, disk=1)
    assert here.bundle != wanted(tmp_path, method="none").bundle


def test_ceilings_do_the_work_that_they_claim(tmp_path: Path) -> None:
    found = open_ceilings(tmp_path, "ort-cpu", 1, small=True)
    assert {limit.kind for limit in found} == {"gemm", "memory"}
    for limit in found:
        assert limit.run() > 0
    product = found[0]
    rows, inner, columns = map(int, product.name.split("x"))
    assert product.work == 2 * rows * inner * columns
    assert product.work == count(tmp_path / f"gemm_{1024}.onnx", {"rows": rows, "inner": inner}).total


@pytest.mark.parametrize(
    ("rails", "watts"),
    [
        # The same line of tegrastats as four kinds of boards end it: now/average, in mW.
        ("VDD_IN 4970mW/4800mW VDD_CPU_GPU_CV 560mW/560mW VDD_SOC 1484mW/1484mW", 4.97),
        ("VDD_GPU_SOC 2777mW/2700mW VDD_CPU_CV 396mW/400mW VIN_SYS_5V0 3842mW/3800mW", 7.015),
        ("POM_5V_IN 2532/2532 POM_5V_GPU 121/121 POM_5V_CPU 403/403", 2.532),
        ("VDD_CPU_GPU_CV 560mW/560mW VDD_SOC 1484mW/1484mW", None),
    ],
)
def test_tegrastats_lines_are_read(rails: str, watts: float | None) -> None:
    line = (
        "11-21-2026 12:00:00 RAM 1488/7620MB (lfb 105x4MB) SWAP 253/12002MB (cached 2MB) CPU "
        "[0%@1036,off] EMC_FREQ 0%@2133 GR3D_FREQ 26%@[306] cpu@46.4C gpu@46.03C "
    )
    assert SOURCES[0][2](line + rails) == (None if watts is None else pytest.approx(watts))


def test_nvml_lines_are_read() -> None:
    """As nvidia-smi --query-gpu=power.draw --format=csv,noheader,nounits prints them."""
    assert [SOURCES[1][2](line) for line in ("72.34", "[N/A]", "[Not Supported]", "")] == [
        72.34,
        None,
        None,
        None,
    ]


def test_recorded_output_becomes_joules(tmp_path: Path) -> None:
    """From the first source whose command is there: a stand-in that prints a line of tegrastats."""
    tool = tmp_path / "tegrastats"
    tool.write_text("#!/bin/sh\nwhile :; do echo 'GR3D_FREQ 0% VDD_IN 5000mW/4000mW'; sleep 0.01; done\n")
    tool.chmod(0o755)
    name, command, read = SOURCES[0]
    sources = [("absent", ["no-such-command"], read), (name, [str(tool), *command[1:]], read)]
    with Meter(sources) as meter:
        while "watts" not in meter.report():
            with meter.counting():
                sum(range(100_000))
    found = meter.report()
    assert found["source"] == "tegrastats, the module" and found["watts"] == 5.0 and found["joules"] > 0


def test_a_device_without_a_meter_says_so() -> None:
    with Meter(()) as meter, meter.counting():
        pass
    assert meter.report() == {"note": "this device reports no power (neither tegrastats nor NVML)"}


def test_resident_memory_is_read_from_the_system(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmPeak:\t 9 kB\nVmHWM:\t   300 kB\nVmRSS:\t   200 kB\n")
    assert (resident(status), peak_resident(status)) == (200 << 10, 300 << 10)
    assert resident(tmp_path / "absent") == 0
