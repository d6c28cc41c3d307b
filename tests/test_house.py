"""The house: which folders are packages, who may import whom, how large a room may be (DESIGN: one way)."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
import tomllib
from setuptools import find_namespace_packages

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FIND = PROJECT["tool"]["setuptools"]["packages"]["find"]
ROOT_FILES = [ROOT / "vtp" / name for name in ("__init__.py", "__main__.py", "entry.py")]
ROOMS = ("engines", "runtime", "export", "calib", "serve", "scenes", "bench")
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
REWRITES = {
    f"vtp.calib.quantize.{name}" for name in ("layers", "observe", "prompts", "quantizer", "weight_store")
}
HUB = "vtp.runtime.hub.client"  # the runtime's one place that asks the hub, and only when it is told to

# What each room may import from the house.
ALLOWED = {
    "engines": {"engines"},
    "runtime": {"engines", "runtime"},
    "export": {"engines", "runtime", "export", "scenes"},
    "calib": {"engines", "runtime", "calib"},
    "serve": {"engines", "runtime", "serve"},
    "scenes": {"engines", "runtime", "scenes"},
    "bench": {"engines", "runtime", "export", "calib", "serve", "scenes", "bench"},
}
# Of scenes, export may know where the built-in model lies, and nothing else.
SCENES_FACE = {"vtp.scenes"}

# One file a method: a list, not a room to find one's way in.
LISTS = {"vtp.export.pruners"}
ROOM_FOR = 13  # modules of one folder, without __init__
LONGEST = 450  # lines of one module


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the rooms: its dotted name and its file."""
    for path in sorted(path for name in ROOMS for path in (ROOT / name).rglob("*.py")):
        parts = ["vtp", *path.relative_to(ROOT).with_suffix("").parts]
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(sources())


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def of_each(modules: Iterable[str]) -> Callable[[Callable[[str], None]], Callable[[], None]]:
    """One test of many modules, which goes on to the last and names those that fail.

    A test for each would be thousands, which take longer to tell apart than to run.
    """

    def decorate(check: Callable[[str], None]) -> Callable[[], None]:
        def test() -> None:
            failed = []
            for module in modules:
                try:
                    check(module)
                except Exception as error:  # whatever importing a module may raise
                    failed.append(f"{module}: {type(error).__name__}: {error}")
            assert not failed, "\n".join(failed)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


def test_every_module_that_fails_is_named() -> None:
    @of_each(["a", "b", "c"])
    def check(module: str) -> None:
        assert module == "b"

    with pytest.raises(AssertionError, match=r"(?s)a: AssertionError.*c: AssertionError"):
        check()


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Dotted names that a file imports, and whether at the top level (not inside a function)."""
    return list(_imports(parsed(path), path))


def _imports(tree: ast.Module, path: Path) -> Iterator[tuple[str, bool]]:
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write vtp.…"
            yield node.module or "", id(node) in top


@cache
def modules_imported(path: Path) -> frozenset[str]:
    """The house's own modules that a file imports, wherever it does: in functions and for types, too."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else module for name in names}
    return frozenset(found & set(MODULES))


def room(module: str) -> str:
    return module.split(".")[1]


of_a_clone = pytest.mark.skipif(
    (ROOT / "PKG-INFO").is_file(), reason="an sdist, whose links go the other way"
)


# -- packages ------------------------------------------------------------------------------------------------


@of_a_clone
def test_the_import_root_links_to_every_room() -> None:
    """`vtp/` holds its own files and a relative link for each room: nothing more, nothing less."""
    links = {path.name: path.readlink() for path in (ROOT / "vtp").iterdir() if path.is_symlink()}
    assert links == {name: Path("..") / name for name in ROOMS if (ROOT / name).is_dir()}
    plain = {path.name for path in (ROOT / "vtp").iterdir() if not path.is_symlink()} - {"__pycache__"}
    assert plain == {"py.typed", *(path.name for path in ROOT_FILES)}


def test_every_folder_of_sources_is_a_package() -> None:
    """Without an `__init__.py` setuptools would leave a folder out of the wheel, and nobody would notice."""
    for path in MODULES.values():
        if path.parent.name != "optimum_command":  # a part of optimum's namespace, which has none
            assert (path.parent / "__init__.py").is_file(), path.parent


def test_no_folder_of_sources_is_left_out() -> None:
    """A new top-level folder with modules must be a room (or be tests, or examples in docs)."""
    known = {*ROOMS, "vtp", "optimum", "tests", "docs", "build"}
    for path in ROOT.iterdir():
        if path.is_dir() and path.name not in known and not path.name.startswith("."):
            assert not list(path.rglob("*.py")), f"{path.name}/ is in no package list"


def test_what_is_shipped_imports_nothing_that_is_not() -> None:
    """Studies and training stay out of the wheel, and the wheel does without them."""
    apart = tuple(pattern.removesuffix("*") for pattern in FIND["exclude"])
    for name, path in MODULES.items():
        if not name.startswith(apart):
            assert not [other for other in modules_imported(path) if other.startswith(apart)], name


def shipped() -> list[Path]:
    """The modules of the wheel, as setuptools chooses them by pyproject.toml's include and exclude."""
    packages = find_namespace_packages(str(ROOT), include=FIND["include"], exclude=FIND["exclude"])
    return [path for name in packages for path in ROOT.joinpath(*name.split(".")).glob("*.py")]


@of_a_clone
def test_the_wheel_holds_every_module_once_and_no_study() -> None:
    found = [path.resolve() for path in shipped()]
    apart = ("bench/studies/", "scenes/training/")
    wanted = [path for path in MODULES.values() if not str(path.relative_to(ROOT)).startswith(apart)]
    assert sorted(found) == sorted([*wanted, *ROOT_FILES])


def test_nothing_that_is_shipped_writes_beside_itself() -> None:
    """A module may read what lies in its own package; what it writes goes where the user says."""
    for path in shipped():
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(parsed(path)) if "__file__" in source and "parents" in source else ():
            text = ast.unparse(node) if isinstance(node, ast.expr) else ""
            assert "__file__" not in text or "parents" not in text, f"{path} leaves its own folder: {text}"


# -- who may import whom -------------------------------------------------------------------------------------


@of_each(MODULES)
def test_a_room_imports_what_it_may(module: str) -> None:
    for name, _ in imports(MODULES[module]):
        if name == "vtp" or name.startswith("vtp."):
            assert name.split(".")[1:2], f"{module} imports bare vtp"
            assert room(name) in ALLOWED[room(module)], f"{module} imports {name}"
            if room(module) == "export" and room(name) == "scenes":
                assert name in SCENES_FACE, f"{module} imports {name}"
        assert name.split(".")[0] not in ROOMS, f"{module} imports the bare folder {name}"


def circles(arrows: dict[str, set[str]]) -> Iterable[list[str]]:
    """Groups of modules each of which reaches all the others (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> Iterator[list[str]]:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(arrows[name]):
            if other not in order:
                yield from visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                yield sorted(group)

    for name in arrows:
        if name not in order:
            yield from visit(name)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for types and inside functions are counted: who knows whom is the same."""
    arrows = {name: modules_imported(path) - {name} for name, path in MODULES.items()}
    assert list(circles(arrows)) == []


def test_circles_are_found() -> None:
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == [["a", "b", "c"]]


@of_each([name for name in MODULES if room(name) in ("engines", "runtime", "calib", "serve")])
def test_the_runtime_side_never_imports_torch(module: str) -> None:
    refused = (
        HEAVY - {"onnx"} if module in REWRITES else HEAVY - {"huggingface_hub"} if module == HUB else HEAVY
    )
    assert not {name.split(".")[0] for name, _ in imports(MODULES[module])} & refused
    assert not [name for name, top in imports(MODULES[module]) if top and name.startswith("huggingface_hub")]


@of_each([name for name in MODULES if room(name) in ("engines", "runtime", "serve")])
def test_engines_are_imported_where_they_are_used(module: str) -> None:
    """Importing the runtime loads no engine: a machine without one still gets its one-line message."""
    assert not [name for name, top in imports(MODULES[module]) if top and name.split(".")[0] in LIBRARIES]


def uses(path: Path) -> Iterator[str]:
    """Dotted names that a file reads, as `sys.executable`."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# Engine libraries that tell their makers what is run, and where that is turned off.
LIBRARIES = {"onnxruntime": "vtp.engines.ort.library", "openvino": "vtp.engines.openvino.library"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_engine_libraries_are_imported_in_one_place(library: str) -> None:
    """Where their telemetry is turned off."""
    elsewhere = [module for module in MODULES if module != LIBRARIES[library]]
    assert not [module for module in elsewhere if library in set(loaded(MODULES[module]))]


def loaded(path: Path) -> Iterator[str]:
    """Top packages that a module imports, and those whose names it hands to an import function."""
    yield from (name.split(".")[0] for name, _ in imports(path))
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and called(node) in LOADERS:
            yield from (name for name in LIBRARIES if name in ast.unparse(node))


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


LOADERS = {"import_module", "__import__"}


def test_an_import_by_a_function_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import_module('onnxruntime.capi')")
    (tmp_path / "b.py").write_text("import openvino.runtime")
    assert [list(loaded(tmp_path / name)) for name in ("a.py", "b.py")] == [["onnxruntime"], ["openvino"]]


@of_each(sorted(set(MODULES) - {"vtp.engines.child"}))
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


@of_each(MODULES)
def test_nothing_is_mocked_outside_of_tests(module: str) -> None:
    assert not [name for name, _ in imports(MODULES[module]) if name.startswith(("unittest", "mock"))]


# -- how large, and how named --------------------------------------------------------------------------------


def test_a_room_can_be_taken_in_at_a_glance() -> None:
    rooms: dict[str, list[str]] = defaultdict(list)
    for name, path in MODULES.items():
        if path.name != "__init__.py":
            rooms[name.rpartition(".")[0]].append(path.stem)
    assert not {name: len(files) for name, files in rooms.items() if len(files) > ROOM_FOR}.keys() - LISTS


def test_files_stay_short() -> None:
    long = {str(path): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert not {path: lines for path, lines in long.items() if lines > LONGEST}


# -- each module by itself -----------------------------------------------------------------------------------


@of_each([name for name in MODULES if "optimum_command" not in name])
def test_every_module_imports(module: str) -> None:
    importlib.import_module(module)


@of_each(MODULES)
def test_every_module_says_what_it_is_for(module: str) -> None:
    tree = parsed(MODULES[module])
    assert not tree.body or ast.get_docstring(tree), f"{module} has no docstring"


@of_each(MODULES)
def test_every_public_name_says_what_it_does(module: str) -> None:
    """Functions and classes of a module's top level."""
    public = [
        node
        for node in parsed(MODULES[module]).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert not [node.name for node in public if not ast.get_docstring(node)]


def test_importing_the_light_rooms_loads_nothing_heavy() -> None:
    light = ["vtp", "vtp.engines", "vtp.runtime", "vtp.runtime.commands.run", "vtp.scenes"]
    light += ["vtp.scenes.generator.pictures", "vtp.serve.cli", "vtp.serve.http.app"]
    light += ["vtp.serve.streams.cli", "vtp.serve.robots.ros2", "vtp.serve.robots.node"]
    light += ["vtp.serve.robots.zenoh.cli"]
    script = (
        f"import sys; [__import__(name) for name in {light}]; "
        f"print(sorted({HEAVY | {'onnxruntime', 'openvino', 'av', 'zenoh'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_vtp_alone_loads_nothing_of_the_house() -> None:
    script = (
        "import sys, vtp; print(vtp.__version__, sorted(m for m in sys.modules if m.startswith('vtp.'))); "
        "from vtp import Pipeline; print(Pipeline.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{PROJECT['project']['version']} []", "vtp.runtime.pipeline"]


def test_commands_show_help_without_torch() -> None:
    """`vtp-export --help` neither needs nor waits for the export extra."""
    absent = (
        "torch",
        "transformers",
        "onnx",
        "onnxruntime",
        "openvino",
        "starlette",
        "uvicorn",
        "av",
        "zenoh",
    )
    blocked = "; ".join(f"sys.modules['{name}'] = None" for name in absent)
    commands = ("vtp.export.cli", "vtp.runtime.commands.run", "vtp.calib.cli", "vtp.serve.cli")
    robots = ("vtp.serve.streams.cli", "vtp.serve.robots.ros2", "vtp.serve.robots.zenoh.cli")
    for command in (*commands, *robots):
        script = f"import sys; {blocked}; from {command} import main; main(['--help'])"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "usage: vtp-" in done.stdout


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"].values())
def test_declared_commands_exist(command: str) -> None:
    module, _, function = command.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
