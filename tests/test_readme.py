"""What the README says is run as it stands, and its generated tables are up to date."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    """Fenced blocks of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which the repository's relative paths work, where the README's commands have run."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "scenes").symlink_to(ROOT / "scenes")
    commands = [line for line in blocks("sh")[1].splitlines() if line.strip()]
    commands.append("vtp-export --method vispruner -o bundle-vispruner")
    for line in commands:
        words = shlex.split(line)
        done = run([str(BIN / words[0]), *words[1:]], folder)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        (folder / f"{len(list(folder.glob('*.out')))}.out").write_text(done.stdout)
    return folder


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


def test_links_and_named_files_exist() -> None:
    names = re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:md|txt|py|png))`", README)
    assert names
    for name in set(names) - {"build/demo/kept.png"}:
        assert (ROOT / name).exists(), f"README.md names {name}, which does not exist"
