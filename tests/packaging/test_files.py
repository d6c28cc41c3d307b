"""What the sdist and the wheel hold: built from a copy of the repository's files, as pip builds them."""

from __future__ import annotations

import email
import email.message
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = (77, 0, 3)  # of setuptools, as pyproject.toml says
ROOMS = ("bench", "calib", "engines", "export", "runtime", "scenes", "serve")
# Settings of a developer's that a build here does without: the second makes setuptools warn.
OWN = ("VTP_MODELS", "PYTHONDONTWRITEBYTECODE")
# What a build writes into an sdist beside the sources.
WRITTEN = {"PKG-INFO", "setup.cfg"}
LARGE = 100_000  # bytes
QUICK = "tests/engines/test_strict_json.py"  # tests that need no model

pytestmark = pytest.mark.skipif(
    tuple(map(int, metadata.version("setuptools").split(".")[:3])) < NEEDED,
    reason="builds with setuptools 77.0.3 or later, which make setup installs",
)


@dataclass(frozen=True)
class Built:
    """A package file, what its build said, and the tree that it was built from."""

    file: Path
    said: str
    tree: Path

    def names(self) -> set[str]:
        """Files in a wheel."""
        with zipfile.ZipFile(self.file) as packed:
            return {name for name in packed.namelist() if not name.endswith("/")}

    def about(self) -> email.message.Message:
        """A wheel's metadata."""
        with zipfile.ZipFile(self.file) as packed:
            (name,) = [name for name in packed.namelist() if name.endswith(".dist-info/METADATA")]
            return email.message_from_bytes(packed.read(name))


def tracked() -> list[str]:
    """The repository's files, by git; of an unpacked sdist there is no such list."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and os.path.lexists(ROOT / name)]


def build(kind: str, tree: Path, out: Path, models: str | None = None) -> Built:
    """Build an sdist or a wheel of a tree through setuptools' backend, as pip and build do."""
    script = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    if models is not None:
        environment["VTP_MODELS"] = models
    command = [sys.executable, "-W", "default", "-c", script, str(out)]
    out.mkdir(exist_ok=True)
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return Built(out / done.stdout.splitlines()[-1], said, tree)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files elsewhere, used once: of large ones the beginning, which packs sooner."""
    tree = tmp_path_factory.mktemp("clone")
    for name in tracked():
        source, place = ROOT / name, tree / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            place.symlink_to(source.readlink())
        else:
            place.write_bytes(source.read_bytes()[:LARGE])
    (tree / "tests/__pycache__").mkdir()
    (tree / "tests/__pycache__/once.pyc").write_bytes(b"compiled")
    return tree


@pytest.fixture(scope="module")
def sdist(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build("sdist", clone, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist as pip unpacks it: nothing may leave its folder."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist.file) as packed:
        packed.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built after an earlier build left a module that is gone since, and bytes that nobody wants."""
    left = clone / "build/package/lib/vtp/runtime"
    left.mkdir(parents=True)
    (left / "gone.py").write_text("")
    return build("wheel", clone, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def small(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built from the sdist, without a model."""
    return build("wheel", unpacked, tmp_path_factory.mktemp("small"), "none")


def in_package(name: str) -> str:
    """A file of the repository as the sdist holds it: the rooms' files lie in vtp/."""
    return f"vtp/{name}" if name.partition("/")[0] in ROOMS else name


def test_the_sdist_holds_every_file_of_the_repository(sdist: Built) -> None:
    with tarfile.open(sdist.file) as packed:
        members = [(member.name.partition("/")[2], member) for member in packed.getmembers()]
    links = {name: member.linkname for name, member in members if member.issym()}
    found = {name for name, member in members if member.isfile()}
    wanted = {in_package(name) for name in tracked() if not (ROOT / name).is_symlink()}
    wanted |= {
        f"optimum/commands/register/{path.name}" for path in (ROOT / "export/optimum_command").glob("*.py")
    }
    assert not wanted - found
    more = {name for name in found - wanted if not name.startswith("vtp_edge.egg-info/")}
    assert more == WRITTEN
    assert links == {room: f"vtp/{room}" for room in ROOMS}


def test_a_wheel_holds_what_it_says_and_nothing_of_an_earlier_build(wheel: Built) -> None:
    assert not [name for name in wheel.names() if "gone" in name]
    tops = {name.partition("/")[0] for name in wheel.names()}
    assert tops == {"vtp", "optimum", f"vtp_edge-{wheel.about()['Version']}.dist-info"}
    assert not [name for name in wheel.names() if re.search(r"/(studies|training)/|\.pyc$|/reader/", name)]
    data = {"vtp/py.typed", "vtp/export/listed.json", "vtp/runtime/media/scene.jpg"}
    assert data | {"vtp/scenes/model/model.safetensors", "vtp/scenes/examples/scene.png"} <= wheel.names()


def test_the_sdists_wheel_is_the_clones_but_for_the_model(wheel: Built, small: Built) -> None:
    models = {f"vtp/scenes/model/{path.name}" for path in (ROOT / "scenes/model").iterdir()}
    assert wheel.names() - small.names() == models
    assert small.names() < wheel.names()


def test_nothing_warns(sdist: Built, wheel: Built, small: Built) -> None:
    for built in (sdist, wheel, small):
        assert not re.findall(r"(?i).*(?:warn|deprecat).*", built.said)


def test_without_a_model_one_line_says_what_to_do(small: Built, tmp_path: Path) -> None:
    with zipfile.ZipFile(small.file) as packed:
        packed.extractall(tmp_path)
    script = "from vtp.scenes import model_dir; model_dir()"  # as vtp-export without --model does
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = (
        "vtp.engines.errors.UsageError: the built-in model 'model' is not in this copy of vtp; give another "
        "model, --model DIR, or build vtp from its sources with VTP_MODELS=model"
    )
    assert done.stderr.splitlines()[-1] == said


def test_the_sdists_own_tests_run(unpacked: Path) -> None:
    """On its own modules: the folder comes before this environment's vtp."""
    where = subprocess.run(
        [sys.executable, "-c", "import vtp.engines; print(vtp.engines.__file__)"],
        cwd=unpacked, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(unpacked)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", QUICK]
    done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout


def test_metadata_says_who_what_and_where(wheel: Built) -> None:
    about = wheel.about()
    urls = dict(line.split(", ", 1) for line in about.get_all("Project-URL", []))
    assert (about["Name"], about["Author"]) == ("vtp-edge", "The vtp authors")
    assert (about["License-Expression"], about["License-File"]) == ("Apache-2.0", "LICENSE")
    assert {"Source", "Documentation", "Changelog", "Issues"} == set(urls)
    assert all(url.startswith(urls["Source"]) for url in urls.values())
    assert "Typing :: Typed" in about.get_all("Classifier", [])
    assert not [line for line in about.get_all("Classifier", []) if line.startswith("License ::")]


def test_every_link_of_the_package_page_is_whole_and_leads_to_a_file(wheel: Built) -> None:
    about = wheel.about()
    source = dict(line.split(", ", 1) for line in about.get_all("Project-URL", []))["Source"]
    page = re.sub(r"(?ms)^```.*?^```|`[^`\n]+`", "", str(about.get_payload()))
    links = re.findall(r"(?:\]\(|\b(?:src|href)=\")([^)\s\"]+)", page)
    ours = [link.removeprefix(source) for link in links if link.startswith(source)]
    assert ours and all(link.startswith("https://") for link in links)
    for link in ours:
        kind, tag, path = re.fullmatch(r"/(blob|raw)/([^/]+)/([^#]+)(?:#.*)?", link).groups()  # type: ignore[union-attr]
        assert tag == f"v{about['Version']}"
        assert (ROOT / path).is_file(), link
        assert (kind == "raw") == path.endswith((".png", ".jpg")), link
