"""The house: which folders are packages, and who may import whom (DESIGN: knowledge flows one way)."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TOOL = PROJECT["tool"]["setuptools"]
PACKAGES: dict[str, Path] = {name: ROOT / folder for name, folder in TOOL["package-dir"].items()}
ROOMS = ("engines", "runtime", "export", "calib", "scenes", "bench")
HEAVY = {
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "safetensors",
    "optimum",
    "huggingface_hub",
}

# What writes graphs: vtp-calib quantize loads these when it runs, and the rest of calib does without onnx.
REWRITES = {f"vtp.calib.{name}" for name in ("layers", "observe", "quantizer", "weights")}

# What each room may import from the house.
ALLOWED = {
    "engines": {"engines"},
    "runtime": {"engines", "runtime"},
    "export": {"engines", "runtime", "export", "scenes"},
    "calib": {"engines", "runtime", "calib"},
    "scenes": {"engines", "runtime", "scenes"},
    "bench": {"engines", "runtime", "export", "calib", "scenes", "bench"},
}
# Of scenes, export may know where the built-in model lies, and nothing else.
SCENES_FACE = {"vtp.scenes"}


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the packages: its dotted name and its file."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.glob("*.py")):
            yield package if path.stem == "__init__" else f"{package}.{path.stem}", path


MODULES = dict(sources())


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Dotted names that a file imports, and whether at the top level (not inside a function)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write vtp.…"
            yield node.module or "", id(node) in top


def room(module: str) -> str:
    return module.split(".")[1] if module.startswith("vtp.") else "optimum"


def test_package_list_equals_the_folders() -> None:
    assert sorted(TOOL["packages"]) == sorted(PACKAGES)
    found = set()
    for name in ROOMS:
        if (ROOT / name).is_dir():
            folders = {path.parent for path in (ROOT / name).rglob("*.py")}
            found |= {folder for folder in folders if "__pycache__" not in folder.parts}
    assert found == set(PACKAGES.values())


def test_every_package_has_its_init_and_vtp_has_none() -> None:
    for name, folder in PACKAGES.items():
        assert (folder / "__init__.py").is_file() == name.startswith("vtp."), name
    assert not (ROOT / "vtp").exists()
    assert not list(ROOT.glob("__init__.py"))


def test_no_folder_of_sources_is_left_out() -> None:
    """A new top-level folder with modules must be declared (or be tests, or examples in docs)."""
    known = {*ROOMS, "tests", "docs", "build", ".venv", ".git", ".ci"}
    for path in ROOT.iterdir():
        if path.is_dir() and path.name not in known and not path.name.startswith("."):
            assert not list(path.rglob("*.py")), f"{path.name}/ is in no package list"


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_what_it_may(module: str) -> None:
    if room(module) not in ALLOWED:
        return
    for name, _ in imports(MODULES[module]):
        if name == "vtp" or name.startswith("vtp."):
            assert name.split(".")[1:2], f"{module} imports bare vtp"
            assert room(name) in ALLOWED[room(module)], f"{module} imports {name}"
            if room(module) == "export" and room(name) == "scenes":
                assert name in SCENES_FACE, f"{module} imports {name}"
        assert name.split(".")[0] not in ROOMS, f"{module} imports the bare folder {name}"


@pytest.mark.parametrize(
    "module", [name for name in MODULES if room(name) in ("engines", "runtime", "calib")]
)
def test_the_runtime_side_never_imports_torch(module: str) -> None:
    refused = HEAVY - {"onnx"} if module in REWRITES else HEAVY
    assert not {name.split(".")[0] for name, _ in imports(MODULES[module])} & refused


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in ("engines", "runtime")])
def test_engines_are_imported_where_they_are_used(module: str) -> None:
    """Importing the runtime loads no onnxruntime: a machine without one still gets its one-line message."""
    assert not [name for name, top in imports(MODULES[module]) if top and name.split(".")[0] == "onnxruntime"]


def uses(path: Path) -> Iterator[str]:
    """Dotted names that a file reads, as `sys.executable`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"vtp.engines.ort.library"}))
def test_onnx_runtime_is_imported_in_one_place(module: str) -> None:
    """Where its telemetry is turned off."""
    assert not [name for name, _ in imports(MODULES[module]) if name.split(".")[0] == "onnxruntime"]
    loaders = {"import_module", "__import__"}
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in loaders:
            assert "onnxruntime" not in ast.unparse(node), module


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"vtp.engines.child"}))
def test_python_children_are_started_in_one_place(module: str) -> None:
    """Where the current folder is kept off their import path."""
    found = {name.split(".")[0] for name, _ in imports(MODULES[module])}
    assert not found & {"multiprocessing", "pty"}
    used = set(uses(MODULES[module]))
    assert not used & {"sys.executable", "sys._base_executable"}
    assert not {name for name in used if name.endswith(("ProcessPoolExecutor", "create_subprocess_exec"))}
    assert not {
        name for name in used if name.startswith(("os.exec", "os.spawn", "os.posix_spawn", "os.fork"))
    }
    assert not used & {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module: str) -> None:
    importlib.import_module(module)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{module} has no docstring"


def test_importing_the_light_rooms_loads_nothing_heavy() -> None:
    light = [
        "vtp.engines",
        "vtp.runtime",
        "vtp.runtime.commands.run",
        "vtp.scenes",
        "vtp.scenes.generator.pictures",
    ]
    script = (
        f"import sys; [__import__(name) for name in {light}]; "
        f"print(sorted({HEAVY | {'onnxruntime'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_commands_show_help_without_torch() -> None:
    """`vtp-export --help` neither needs nor waits for the export extra."""
    blocked = "; ".join(
        f"sys.modules['{name}'] = None" for name in ("torch", "transformers", "onnx", "onnxruntime")
    )
    for command in ("vtp.export.cli", "vtp.runtime.commands.run", "vtp.calib.cli"):
        script = f"import sys; {blocked}; from {command} import main; main(['--help'])"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "usage: vtp-" in done.stdout


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"].values())
def test_declared_commands_exist(command: str) -> None:
    module, _, function = command.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_files_stay_short() -> None:
    long = [str(path) for path in MODULES.values() if len(path.read_text().splitlines()) > 600]
    assert not long
