"""vtp-export: what it prints; for whatever is wrong one line, the right exit code, and nothing on disk."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vtp.engines import UsageError
from vtp.export.cli import _next_lines, main
from vtp.export.method_files import reduction_names
from vtp.runtime.bundle.folder import open_bundle

BIN = Path(sys.executable).parent
PROGRESS = re.compile(r"\[ *\d+\.\d s\] \d+\. [a-z].*")


def run(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def refuse(
    argv: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str], silent: bool = False
) -> None:
    """The command fails with one line of error, below nothing but progress; with `silent` not even that."""
    assert run(argv) == code
    out, err = capfd.readouterr()
    *progress, last = err.splitlines()
    assert out == ""
    assert last.startswith("vtp-export: error: ") and re.search(message, last), last
    assert len(last) < 500
    assert all(PROGRESS.fullmatch(line) for line in progress), err
    assert not (silent and progress), err


def nothing_left(tmp_path: Path) -> bool:
    return not list((tmp_path / "work").iterdir())


# -- bad flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "adaptprun"], "unknown method 'adaptprun'; did you mean 'adaptprune'.; methods: none"),
        (["--method", ""], "unknown method ''"),
        (["--method", "./mine.py:Mine"], "method file mine.py does not exist"),
        (["--method", "./mine.py"], "FILE.py:CLASS"),
        (["--keep-tokens", "0"], "keep-tokens 0 keeps nothing"),
        (["--keep-tokens", "-1"], "keep-tokens -1 keeps nothing"),
        (
            ["--keep-tokens", "17"],
            "keep-tokens 17 exceeds the 16 visual tokens of this model; choose 1 to 16",
        ),
        (["--keep-tokens", "4,17"], "keep-tokens 17 exceeds"),
        (["--keep-tokens", "4:20:4"], "keep-tokens 20 exceeds"),
        (["--keep-tokens", "x"], "keep-tokens 'x' is not a whole number, a list"),
        (["--keep-tokens", ""], "keep-tokens '' is not"),
        (["--keep-tokens", "4,"], "keep-tokens '4,' is not"),
        (["--keep-tokens", "1:2"], "keep-tokens '1:2' is not"),
        (["--keep-tokens", "9:1:1"], "FIRST <= LAST"),
        (["--keep-tokens", "1:9:0"], "STEP >= 1"),
        (["--keep-tokens", "1:99999999:1"], "more than 4096 counts"),
        (["--keep-tokens", "5.0"], "keep-tokens '5.0' is not"),
        (["--prune-ratio", "1.01"], "prune-ratio 1.01 is outside 0 to 1"),
        (["--prune-ratio", "-0.5"], "prune-ratio -0.5 is outside"),
        (["--prune-ratio", "nan"], "prune-ratio nan is outside"),
        (["--prune-ratio", "90%"], "prune-ratio '90%' is not a number"),
        (["--prune-ratio", "0.5", "--keep-tokens", "4"], "either --keep-tokens or --prune-ratio"),
        (["--method", "none", "--keep-tokens", "4"], "method none keeps all 16 visual tokens"),
        (["--method", "none", "--prune-ratio", "0.5"], "method none keeps all 16"),
        (["--method", "none", "--method-option", "r=1"], "method none has no options"),
        (["--method", "vispruner", "--method-option", "r"], "'r' is not of the form name=value"),
        (["--method", "vispruner", "--method-option", "r=2"], "r 2.0 is outside 0 to 1"),
        (["--method", "vispruner", "--method-option", "rr=1"], "no option 'rr'; did you mean 'r'"),
        (["--method", "vispruner", "--method-option", "positions=odd"], "takes compact or original"),
        (["--method", "vispruner", "--method-option", "positions"], "'positions' is not of the form"),
        (["--method-option", "positions=original", "--method-option", "positions=compact"], "given twice"),
        (["--method", "fastv", "--method-option", "positions=compact"], "takes original only"),
        (["--method", "fastv"], "prunes before decoder layer 2, but this model has 2 layers"),
        (["--target", "tensort"], "unknown target 'tensort'; choose one of ort, tensorrt, jetpack6"),
        (["--dtype", "bfloat16"], "unknown dtype 'bfloat16'; choose one of float32, float16"),
        (["--verify", "maybe"], "unknown verify 'maybe'"),
        (["--max-length", "17"], "max-length 17 is outside 18 to 1024"),
        (["--max-length", "9999"], "max-length 9999 is outside 18 to 1024"),
        (["--max-length", "1e3"], "max-length '1e3' is not a whole number"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["stray"], "unrecognized arguments: stray"),
        (["--keep-tokens"], "expected one argument"),
    ],
)
def test_bad_flags(
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    argv = [
        "--model",
        str(model_folder("mha")),
        "--method",
        "vispruner",
        "--verify",
        "none",
        "-o",
        "out",
        *flags,
    ]
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    refuse(argv, 2, message, capfd)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_exist(
    exported: Callable[[str], Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All are refused before the model is loaded, and stay as they are."""
    made = exported("mha")
    bundle = Path(shutil.copytree(made.folder, tmp_path / "bundle"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "desk").mkdir()
    (tmp_path / "desk" / "thesis").write_text("x")
    capfd.readouterr()
    model = ["--model", str(made.model), "--method", "none"]
    refuse([*model, "-o", str(bundle)], 2, "exists; choose another folder or add --overwrite", capfd, True)
    refuse([*model, "-o", str(tmp_path / "file"), "--overwrite"], 2, "is a file", capfd, True)
    refuse([*model, "-o", str(tmp_path / "desk")], 2, "add --overwrite", capfd, True)
    refuse([*model, "-o", str(tmp_path / "desk"), "--overwrite"], 2, "is not a bundle", capfd, True)
    refuse([*model, "-o", "", "--overwrite"], 2, "the path is empty", capfd, True)
    refuse([*model, "-o", ".", "--overwrite"], 2, "holds the folder you are in", capfd, True)
    refuse([*model, "-o", str(tmp_path / "file" / "out")], 1, "cannot write to|cannot be used", capfd)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "file", "desk"}
    open_bundle(bundle, check_hashes=True)


@pytest.mark.parametrize("place", ["ir.save", "WeightStore._append"])
def test_a_full_disk_leaves_nothing(
    spoil: Callable[[Callable[[Path], object]], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    argv = spoil(lambda folder: None)
    monkeypatch.setattr(f"vtp.export.onnx.emit.{place}", full)
    capfd.readouterr()
    refuse(argv, 1, "No space left on device; nothing was left behind", capfd)
    assert nothing_left(tmp_path)


def _listen_to_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_an_export_that_is_stopped_half_way(
    exported: Callable[[str], Any], tmp_path: Path, sign: signal.Signals
) -> None:
    """The old bundle stays; an interrupted run cleans up, and after a killed one the next run does."""
    made = exported("mha")
    bundle = Path(shutil.copytree(made.folder, tmp_path / "bundle"))
    argv = ["--model", str(made.model), "--method", "none", "-o", str(bundle), "--overwrite"]
    command = [str(BIN / "vtp-export"), *argv]
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # A shell's background job ignores SIGINT and hands that down: the command is started as from a terminal.
    with subprocess.Popen(command, preexec_fn=_listen_to_interrupts, **streams) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("export projector" in line for line in lines)
        process.send_signal(sign)
        rest = list(lines)
    open_bundle(bundle, check_hashes=True)
    if sign == signal.SIGINT:
        assert process.returncode == 130
        assert rest[-1] == "vtp-export: error: interrupted; nothing was left behind\n"
        said = [line for line in rest[:-1] if line != "vtp-export: note: stopping…\n"]  # of a slow machine
        assert not [line for line in said if not PROGRESS.fullmatch(line.rstrip())]
    else:
        assert len(list(tmp_path.iterdir())) == 2
        (bundle / "decoder.onnx.data").write_bytes(b"")  # even a damaged bundle is replaced
        assert run([*argv, "--verify", "none"]) == 0
        open_bundle(bundle, check_hashes=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


# -- what a good export prints -------------------------------------------------------------------------------


def test_the_report(
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    picture_file: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Checked fully: table, counts, fidelity, and a next command that works; test_readme starts a process."""
    out = tmp_path / "new" / "bundle"
    argv = [
        "--model",
        str(model_folder("mha")),
        "--method",
        "vispruner",
        "--prune-ratio",
        "0.6",
        "-o",
        str(out),
    ]
    capfd.readouterr()  # saving a tiny model shows a bar
    code, (said, progress) = run(argv), capfd.readouterr()
    assert code == 0, progress
    lines = said.splitlines()
    assert lines[0].split() == ["stage", "file", "MB", "parity"]
    rows = {line.split()[0]: line.split() for line in lines[2:8]}
    assert list(rows) == ["vision_encoder", "pruner", "projector", "embed_tokens", "splice", "decoder"]
    for stage, row in rows.items():
        assert row[1] == f"{stage}.onnx" and (out / row[1]).is_file()
        size = sum(
            (out / name).stat().st_size for name in (row[1], f"{row[1]}.data") if (out / name).exists()
        )
        assert float(row[2]) == round(size / 1e6, 2)
    assert "indices equal" in lines[3] and "end to end" in lines[7]
    assert "visual tokens 16 → 6" in said  # floor(16 * 0.4 + 1e-6)
    assert "16 of 16 greedy tokens equal torch's" in said
    assert all(PROGRESS.fullmatch(line) for line in progress.splitlines()), progress
    assert len(progress.splitlines()) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bundle"]
    following, or_served = lines[-2:]
    assert or_served == f"or: vtp-serve {out}"
    assert following.startswith(f"next: vtp-run {out} --image")
    words = shlex.split(following.removeprefix("next: ").replace("PICTURE", str(picture_file)))
    again = subprocess.run([str(BIN / words[0]), *words[1:]], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr


def test_optimum_cli_is_the_same_command(
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Optimum's own entry point finds and runs it; the test below starts its command as a process."""
    from optimum.commands import optimum_cli

    argv = ["--model", str(model_folder("mha")), "--method", "uniform", "--keep-tokens", "4"]
    argv += ["--verify", "none", "-o", str(tmp_path / "out"), "--json"]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "vtp", *argv])
    with pytest.raises(SystemExit) as left:
        optimum_cli.main()
    assert left.value.code == 0
    assert json.loads(capfd.readouterr().out)["visual_tokens"] == {"before": 16, "after": 4}
    open_bundle(tmp_path / "out", check_hashes=True)


@pytest.mark.slow
def test_optimum_cli_helps_and_refuses_alike(tmp_path: Path) -> None:
    optimum = [str(BIN / "optimum-cli"), "export", "vtp"]
    shown = subprocess.run([*optimum, "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0 and "--prune-ratio" in shown.stdout and "--keep-tokens" in shown.stdout
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    wrong = subprocess.run(
        [*optimum, "--method", "none", "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("vtp-export: error: output")
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        ("--list-methods", ["none", "random", "uniform", "fastv", "vispruner", "adaptprune"]),
        ("--list-families", ["llava"]),
    ],
)
def test_lists(flag: str, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([flag]) == 0
    text = capsys.readouterr().out
    assert {line.split()[0] for line in text.splitlines()[2:]} >= set(names)
    assert run([flag, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {next(iter(row.values())) for row in rows} >= set(names)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    """The error leaves the command as it was raised, and Python prints what it prints of any other."""
    with pytest.raises(UsageError, match="unknown method 'nope'"):
        main(["--method", "nope", "-o", str(tmp_path / "out"), "--debug"])


def test_without_torch_the_extra_is_named(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from vtp.export.cli import main; sys.exit(main(sys.argv[1:]))\n"
    )
    argv = ["--method", "none", "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "vtp-edge[export" in done.stderr


def test_a_current_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {shlex.quote(str(gone))} && rmdir ../gone && {BIN / 'vtp-export'} -o {tmp_path / 'out'}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "vtp-export: error: the current folder no longer exists" in done.stderr


def test_the_next_command_is_the_targets(exported: Callable[[str], Any]) -> None:
    manifest = open_bundle(exported("vispruner").folder).manifest
    for target, start in (
        ("ort", "next: vtp-run made --image PICTURE "),
        ("tensorrt", "next, on the machine with the GPU: vtp-build made --engine tensorrt "),
        ("jetpack6", "next, on the Jetson: vtp-build made --engine tensorrt"),
    ):
        assert _next_lines(replace(manifest, target=target), Path("made"))[0].startswith(start)


def test_help_names_every_reduction(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    said = " ".join(capfd.readouterr().out.split())
    told = said.partition("less work in the vision tower: ")[2].partition(" or none")[0]
    assert [word.partition("[")[0] for word in told.split() if "[" in word] == reduction_names()
