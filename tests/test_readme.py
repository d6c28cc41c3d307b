"""What the README says is run as it stands, and its generated tables are up to date."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .once import Once

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "scenes/README.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
QUESTIONS = 60
QUICK = ("vtp-build bundle --triton models", "vtp-doctor bundle")  # run by the default tests
# What cannot run in a test, and why; everything else in the README's command blocks is run as it stands.
ELSEWHERE = {
    "make test": "it is this run",
    "vtp-export --model DIR --method fastv --image-size 672x672 -o DIR": "the built-in model has one size",
    "vtp-export --model DIR --method vispruner --frames 8 -o DIR": "the built-in model has no videos",
    "vtp-bench --shape llava-ov-0.5b --keep-tokens 64": "minutes and 2 GB; tests/bench has a tiny one",
    "vtp-serve bundle": "it serves until it is stopped; see tests/serve",
    "vtp-build bundle-trt --engine tensorrt-rtx": "TensorRT-RTX; see test_trt_pipeline.py",
}


def blocks(language: str) -> list[str]:
    """Fenced blocks of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def lines_of(heading: str) -> list[str]:
    """The commands of a section's blocks that are not Python, without their comments."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(r"```(?:sh)?\n(.*?)```", section, flags=re.DOTALL)
    lines = [shlex.join(shlex.split(line, comments=True)) for block in found for line in block.splitlines()]
    return [line for line in lines if line]


def same(line: str) -> str:
    """A line of this file in the form of `lines_of`."""
    return shlex.join(shlex.split(line))


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=1200)


def carry_out(line: str, folder: Path, number: int = 0) -> str:
    """Run one of the README's lines in `folder`: DIR is the built-in model, or where a bundle goes."""
    words = shlex.split(line)
    if words[0] == "make":
        words += ["-C", str(ROOT), "-o", ".venv/.installed", f"BIN={BIN}", f"DEMO={folder / 'demo'}"]
    elif (BIN / words[0]).exists():
        words[0] = str(BIN / words[0])
    elif words[0] == "optimum-cli":  # installed beside another Python: the same command
        words[:1] = [sys.executable, "-m", "optimum.commands.optimum_cli"]
    for place, word in enumerate(words):
        if word == "DIR":
            named = words[place - 1]
            words[place] = "scenes/model" if named == "--model" else f"made-{number}"
    done = run(words, folder)
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    return done.stdout


def make_desk(folder: Path) -> Path:
    """A folder from which the repository's relative paths work."""
    (folder / "scenes").symlink_to(ROOT / "scenes")
    example = (ROOT / "docs/examples/contrast.py").read_text(encoding="utf-8")
    (folder / "mine.py").write_text(
        example.replace("class Contrast", "class Mine").replace('"contrast"', '"mine"')
    )
    return folder


def tried(once: Once) -> Path:
    """Where the README's first two commands have run, whose bundle other tests read as well."""

    def run_first(folder: Path) -> None:
        folder.mkdir()
        make_desk(folder)
        commands = [line for line in blocks("sh")[1].splitlines() if line.strip()]
        for number, line in enumerate(commands):
            (folder / f"{number}.out").write_text(carry_out(line, folder))

    return once.folder("readme", run_first)


@pytest.fixture(scope="module")
def desk(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it, with what the README's plain program needs."""
    folder = tmp_path_factory.mktemp("readme") / "desk"
    shutil.copytree(tried(once), folder, symlinks=True)
    carry_out("vtp-export --method vispruner -o bundle-vispruner", folder)
    return folder


def run_section(heading: str, folder: Path, done: set[str]) -> None:
    """Run the commands of a section in their order, but for those that are done or cannot run here."""
    lines = [line for line in lines_of(heading) if line not in done | {same(line) for line in ELSEWHERE}]
    assert lines, heading
    for number, line in enumerate(lines):
        carry_out(line, folder, number)


def test_a_bundle_is_described_and_served(desk: Path) -> None:
    for line in QUICK:
        assert same(line) in lines_of("TensorRT, and other machines")
        assert carry_out(line, desk)


@pytest.mark.slow
def test_make_demo_runs(tmp_path: Path) -> None:
    carry_out("make demo", tmp_path)
    assert (tmp_path / "demo/kept.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("heading", ["Commands", "TensorRT, and other machines"])
def test_every_other_command_runs(heading: str, desk: Path) -> None:
    done = {*blocks("sh")[1].splitlines(), *QUICK}
    run_section(heading, desk, {same(line) for line in done})


@pytest.mark.slow
def test_calibration_and_measuring_run(tmp_path: Path) -> None:
    folder = make_desk(tmp_path)
    asked = ["-m", "vtp.scenes.questions", "--count", str(QUESTIONS), "--seed", "5", "-o", "."]
    assert run([sys.executable, *asked], folder).returncode == 0
    for heading in ("How many tokens to keep", "How few bits", "How fast it is"):
        run_section(heading, folder, set())


def test_every_command_block_is_run_or_says_why_not() -> None:
    """A new section with commands, or a changed line that cannot run, must be entered above."""
    tested = {"Try it", "Commands", "Over HTTP", "How many tokens to keep", "How few bits", "How fast it is"}
    tested.add("TensorRT, and other machines")
    headings = re.findall(r"\n## (.*)\n", README)
    assert {heading for heading in headings if lines_of(heading)} == tested
    known = {line for heading in headings for line in lines_of(heading)}
    assert {same(line) for line in ELSEWHERE} <= known


def test_commands_print_what_is_promised(desk: Path) -> None:
    exported, answered = (desk / "0.out").read_text(), (desk / "1.out").read_text()
    assert "576 → 57" in exported
    assert '"visual_tokens": {"before": 576, "after": 57}' in answered


def test_python_example_runs(desk: Path) -> None:
    done = run([sys.executable, "-c", blocks("python")[0]], desk)
    assert done.returncode == 0, done.stderr
    assert "VisualTokens(before=576, after=57)" in done.stdout


def test_plain_onnxruntime_gives_the_pipelines_answer(desk: Path) -> None:
    plain = run([sys.executable, "-c", blocks("python")[1]], desk)
    assert plain.returncode == 0, plain.stderr
    ask = ["bundle-vispruner", "--image", "scenes/examples/scene.png", "--prompt", "what color is the star ?"]
    answer = run([str(BIN / "vtp-run"), *ask, "--max-new-tokens", "12"], desk)
    assert plain.stdout.strip() == answer.stdout.strip()
    assert answer.stdout.strip()


@pytest.mark.parametrize("flag", ["--list-methods", "--list-families"])
def test_tables_are_the_commands_own(flag: str) -> None:
    done = run([str(BIN / "vtp-export"), flag, "--markdown"], ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in README, f"README.md lacks the output of vtp-export {flag} --markdown"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page: str) -> None:
    """Files by their path from the root, or from the page; what a command writes is not in the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    names = set(
        re.findall(r"`((?:bench|calib|docs|engines|export|runtime|scenes|tests|\.ci)/[\w./-]*\w)`", text)
    )
    names |= set(re.findall(r"\]\(([\w./-]+)\)", text))
    for name in names:
        if re.search(r"NAME|KIND", name):
            continue
        here = [ROOT / name, (ROOT / page).parent / name]
        assert any(path.exists() for path in here), f"{page} names {name}, which does not exist"


@pytest.mark.parametrize("page", PAGES)
def test_no_page_holds_marks_of_a_merge(page: str) -> None:
    assert not re.search(r"^(<{7}|>{7}) ", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
