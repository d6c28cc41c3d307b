"""What the README says is run as it stands, and its generated tables are up to date."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtp.export import listing
from vtp.export.cli import build_parser
from vtp.runtime import Pipeline
from vtp.runtime.media.own_picture import OWN_PICTURE
from vtp.runtime.media.show_kept import show_kept

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
FIRST = "Three commands"
PROGRESS = re.compile(r"\[ *\d+\.\d s\] \d+\. [a-z].*")
# Run by the default tests, beside the first three.
QUICK = ("vtp-build bundle --triton models", "vtp-doctor bundle")
# What cannot run in a test, and why; everything else in the README's command blocks is run as it stands.
ELSEWHERE = {
    "pip install 'vtp-edge[export,ort]'": "test_the_first_screen_from_a_wheel installs one",
    "make test": "it is this run",
    "vtp-export --model MODEL --method fastv --image-size 672x672 -o large": "the built-in has one size",
    "vtp-export --model MODEL --method divprune --frames 8 -o clips": "the built-in model has no videos",
    "vtp-bench --shape llava-ov-0.5b --keep-tokens 64": "minutes and 2 GB; tests/bench has a tiny one",
    "vtp-serve bundle-vispruner": "it serves until it is stopped; see tests/serve",
    "vtp-build bundle-jetson --engine tensorrt": "a Jetson; see test_trt_pipeline.py",
    "vtp-build bundle-trt --engine tensorrt-rtx": "TensorRT-RTX; see test_trt_pipeline.py",
}


def blocks(language: str, page: Path = ROOT / "README.md") -> list[str]:
    """Fenced blocks of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


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


def everything() -> dict[str, list[str]]:
    """The commands of every section that has some."""
    return {heading: lines for heading in re.findall(r"\n## (.*)\n", README) if (lines := lines_of(heading))}


def carry_out(line: str, folder: Path) -> str:
    """What one of the README's lines says in `folder`."""
    done = carried_out(line, folder)
    return done.stdout + done.stderr


def carried_out(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one of the README's lines in `folder`: MODEL is the built-in model."""
    words = shlex.split(line)
    if words[0] == "make":
        words += ["-C", str(ROOT), "-o", ".venv/.installed", f"BIN={BIN}", f"DEMO={folder / 'demo'}"]
    elif (BIN / words[0]).exists():
        words[0] = str(BIN / words[0])
    elif words[0] == "optimum-cli":  # installed beside another Python: the same command
        words[:1] = [sys.executable, "-m", "optimum.commands.optimum_cli"]
    done = run(["scenes/model" if word == "MODEL" else word for word in words], folder)
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    return done


def make_desk(folder: Path) -> Path:
    """A folder from which the repository's relative paths work."""
    (folder / "scenes").symlink_to(ROOT / "scenes")
    (folder / "docs").symlink_to(ROOT / "docs")
    return folder


def tried(once: Once) -> Path:
    """Where the README's first three commands have run, whose bundles other tests read as well."""

    def run_first(folder: Path) -> None:
        folder.mkdir()
        make_desk(folder)
        done = [carried_out(line, folder) for line in lines_of(FIRST)]
        said = "\n".join(one.stdout + one.stderr for one in done)
        (folder / "said").write_text(said, encoding="utf-8")
        (folder / "errors").write_text(done[0].stderr + done[2].stderr, encoding="utf-8")

    return once.folder("readme", run_first)


@pytest.fixture(scope="module")
def desk(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(tried(once), tmp_path_factory.mktemp("readme") / "desk", symlinks=True))


def check_shown(said: str) -> None:
    """The lines that the README shows are among those that were said, in their order."""

    def told(text: str) -> list[str]:  # digits of a difference are a machine's
        return [re.sub(r"\d\.\de-\d\d", "~", line) for line in text.splitlines()]

    lines = iter(told(said))
    shown = [line for line in told(blocks("text")[0]) if line != "…"]
    assert len(shown) > 5
    for line in shown:
        assert line in lines, (
            f"{line} is not in, or is not behind the others of: {said}"
        )  # it goes on from there


def test_the_first_commands_print_what_is_shown(desk: Path) -> None:
    check_shown((desk / "said").read_text(encoding="utf-8"))
    first, _, third = lines_of(FIRST)
    assert (first, third) == ("vtp-export --method adaptprune -o bundle", "vtp-export")
    errors = (desk / "errors").read_text(encoding="utf-8").splitlines()
    assert errors and all(PROGRESS.fullmatch(line) for line in errors), errors  # no library says anything
    with Image.open(desk / "kept.png") as kept, Image.open(OWN_PICTURE) as own:
        assert kept.size == own.size


@pytest.mark.slow
@pytest.mark.skipif(
    int(version("setuptools").partition(".")[0]) < 77,
    reason="this setuptools does not read the licence in pyproject.toml: pip install 'setuptools>=77.0.3'",
)
def test_the_first_screen_from_a_wheel(tmp_path: Path) -> None:
    """In a fresh environment with the wheel and what it needs, far from a clone, as a shell reads it."""
    names = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=names)
    pip, env, desk = [sys.executable, "-m", "pip", "--quiet"], tmp_path / "env", tmp_path / "desk"
    made = run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", "dist", "."], source)
    assert made.returncode == 0, made.stderr
    (wheel,) = (source / "dist").glob("vtp_edge-*.whl")
    venv.create(env)
    installed = run([*pip, "--python", str(env / "bin/python"), "install", "--no-deps", str(wheel)], tmp_path)
    assert installed.returncode == 0, installed.stderr
    (packages,) = env.glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "here.pth").write_text("\n".join(here))  # its own .pth files, vtp's among them, are not read
    shutil.rmtree(source)
    desk.mkdir()
    typed = next(block for block in blocks("sh") if "vtp-export" in block)
    environ = {**os.environ, "PATH": f"{env / 'bin'}:{os.environ['PATH']}"}
    shell = subprocess.run(
        ["sh", "-ec", typed], cwd=desk, env=environ, capture_output=True, text=True, check=False
    )
    assert shell.returncode == 0, shell.stderr
    where = run([str(env / "bin/python"), "-c", "import vtp; print(vtp.__file__)"], desk)
    assert where.stdout.startswith(str(packages))
    blue, progress = shell.stdout, shell.stderr
    first, _, rest = blue.partition("blue\n")
    check_shown(f"{first}blue\n{progress}{rest}")


def test_a_bundle_is_described_and_served(desk: Path) -> None:
    for line in QUICK:
        assert same(line) in lines_of("TensorRT, and a Jetson")
        assert carry_out(line, desk)


@pytest.mark.slow
def test_make_demo_runs(tmp_path: Path) -> None:
    carry_out("make demo", tmp_path)
    assert (tmp_path / "demo/kept.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("heading", [name for name in everything() if name not in (FIRST, "From a clone")])
def test_every_other_command_runs(heading: str, desk: Path) -> None:
    """A section's commands in their order, but for those that are run above or cannot run here."""
    for line in lines_of(heading):
        if line not in {same(line) for line in (*QUICK, *ELSEWHERE)}:
            carry_out(line, desk)


def test_what_cannot_run_is_there_and_says_why() -> None:
    known = {line for lines in everything().values() for line in lines}
    assert {same(line) for line in (*ELSEWHERE, *QUICK)} <= known
    assert lines_of("From a clone") == ["make demo", "make test"]


def test_python_example_runs(desk: Path) -> None:
    done = run([sys.executable, "-c", blocks("python")[0]], desk)
    assert done.returncode == 0, done.stderr
    assert done.stdout == blocks("text")[1] and "VisualTokens(before=576, after=64)" in done.stdout


def test_plain_onnxruntime_gives_the_pipelines_answer(desk: Path) -> None:
    (program,) = blocks("python", ROOT / "docs/plain.md")
    plain = run([sys.executable, "-c", program], desk)
    assert plain.returncode == 0, plain.stderr
    with Pipeline.load(desk / "bundle-vispruner") as pipe:
        answer = pipe.generate(
            ROOT / "scenes/examples/scene.png", "what color is the star ?", max_new_tokens=12
        )
    assert plain.stdout.strip() == answer.text and answer.text
    assert program.count("\n") == 32 and "32 lines" in README


def test_the_picture_is_what_its_command_makes(desk: Path) -> None:
    """The kept patches are the photograph's own; JPEG and a near-tie leave room for little."""
    photo = Image.open(ROOT / "docs/photo.jpg")
    with Pipeline.load(desk / "bundle-vispruner") as pipe:
        kept = pipe.generate(photo, "what is it ?", max_new_tokens=1).kept
        made = show_kept(photo, pipe.manifest.image, pipe.manifest.visual.grid, kept)
    shown = np.asarray(Image.open(ROOT / "docs/kept.jpg"), float)
    assert len(kept) == 64 and np.abs(np.asarray(made, float) - shown).mean() < 4
    assert sum((ROOT / f"docs/{name}.jpg").stat().st_size for name in ("photo", "kept")) < 150_000


def test_the_readme_is_short_and_its_first_screen_is_one() -> None:
    first, found, _ = README.partition("**What is proven**")
    assert found and len(first.splitlines()) <= 60 and len(README.splitlines()) <= 215
    assert "vtp-export --method adaptprune" in first and "pip install 'vtp-edge[export,ort]'" in first


def test_families_that_the_readme_names_are_served() -> None:
    table = README.partition("| family | models |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert named and named <= {row["family"] for row in listing.rows("families")}


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {page for page in pages if f"({page})" not in index} == set()


@pytest.mark.parametrize("kind", ["methods", "families"])
def test_tables_are_the_commands_own(kind: str) -> None:
    done = run([str(BIN / "vtp-export"), f"--list-{kind}", "--markdown"], ROOT)
    assert done.returncode == 0, done.stderr
    page = (ROOT / f"docs/{kind}.md").read_text(encoding="utf-8")
    assert page.count(done.stdout.strip()) == 1, "run: python -m vtp.export.declared"


def test_the_default_is_one_that_the_measured_table_supports() -> None:
    """And every figure that docs/methods.md says of a method in words is the table's."""
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    advice = page.partition("## Which method")[2].partition("\n## ")[0]
    measured = page.partition("<!-- methods: begin -->")[2].partition("<!-- methods: end -->")[0]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in measured.splitlines()]
    columns = {name: place for place, name in enumerate(table[1])}
    rates = {row[0]: row[2:-1] for row in table[4:] if len(row) > 2}
    at_64 = {name: float(row[columns["K = 64"] - 2]) for name, row in rates.items()}
    default = build_parser().get_default("method")
    assert f"takes `{default}`" in advice and at_64[default] >= max(at_64.values()) - 2
    said = re.findall(r"`(\w+)` (\d+\.\d) %", advice)
    assert len(said) > 5 and all(rate in rates[name] for name, rate in said), said
    times = {row[0]: row[-1] for row in table[4:] if row}
    said = re.findall(r"`(\w+)` (\d+) ms", advice)
    assert len(said) > 2 and all(ms == times[name] for name, ms in said), said


def test_what_pruning_costs_is_what_was_measured() -> None:
    page = (ROOT / "docs/measured.md").read_text(encoding="utf-8")
    columns, *rows = re.findall(r"^\| (.*) \|$", page.partition("## Exact match")[2], re.MULTILINE)
    row = next(row for row in rows if row.startswith("vispruner ")).split(" | ")
    kept = row[columns.split(" | ").index("K = 64")].split()[0]
    whole = re.findall(r"every token kept: (\S+)", page)[0]
    said = f"answers {whole} % of 500 questions with every token, and {kept} % with 64 of 576 (vispruner"
    assert said in README and "500 held-out questions" in page


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
def test_links_into_a_page_meet_a_heading(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", text):
        target = (ROOT / page).parent / name if name else ROOT / page
        prose = re.sub(r"```.*?```", "", target.read_text(encoding="utf-8"), flags=re.DOTALL)
        headings = [
            re.sub(r"[^\w -]", "", line.lower()) for line in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
        ]
        assert anchor in {heading.replace(" ", "-") for heading in headings}, f"{page}: {name}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_no_page_holds_marks_of_a_merge(page: str) -> None:
    assert not re.search(r"^(<{7}|>{7}) ", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
