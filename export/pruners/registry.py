"""The registry of pruning methods: one file per method, its name the method's name on the command line.

Files are listed, not imported: a method's module is imported when the method is asked for.
`none` (keep every token) is a method name without a pruner: the baseline of every comparison.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from vtp.engines.errors import UsageError
from vtp.export.method_files import NONE, check_method_name, is_outside, method_names
from vtp.export.named_options import read_options
from vtp.export.pruners.base import Pruner
from vtp.export.pruners.site import Site
from vtp.export.tower_cues import SCORES, TOWER_CUES

_PACKAGE = __name__.rpartition(".")[0]

# What a pruner may ask for, by the kind of its site.
CUES: dict[str, tuple[str, ...]] = {
    "vision": ("image_features", *TOWER_CUES, "picture", "reference_picture"),
    "projector": ("image_embeds", *SCORES, "text_embeds", "text_mask"),
    "decoder": (
        "attention_scores",
        "next_scores",
        "keys",
        "hidden_states",
        "text_attention",
        "text_gravity",
        "image_embeds",
        "text_embeds",
        "text_mask",
    ),
}
POSITIONS = ("compact", "original")

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def find_method(name: str) -> type[Pruner]:
    """Import the pruner class of a method by its name.

    Raises UsageError for an unknown name (with the nearest one and the list) and for "none",
    which has no class.
    """
    check_method_name(name)
    if name == NONE:
        raise UsageError("method none keeps every visual token and has no pruner")
    module = importlib.import_module(f"{_PACKAGE}.{name}")
    method = _only_class(module)
    if method.name != name:
        raise UsageError(f"method file {name}.py declares the name '{method.name}'; the two must be equal")
    return method


def picture_methods() -> list[str]:
    """Every method's name, "none" first, but those for videos alone."""
    return [name for name in method_names() if name == NONE or not find_method(name).reads_frames]


def load_outside(spec: str) -> type[Pruner]:
    """Load a pruner class from a user's own file, written "FILE.py:CLASS", and check its declaration.

    The file is executed. Raises UsageError in one line: no such file or class, an exception while
    the file ran, a class that is not a Pruner, or a declaration that cannot work.
    """
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise UsageError(f"method '{spec}' is not of the form FILE.py:CLASS, for example ./mine.py:Mine")
    module = _run_file(Path(path))
    if not hasattr(module, name):
        classes = ", ".join(found.__name__ for found in _classes(module)) or "none"
        raise UsageError(f"{path} has no class '{name}'; its pruners: {classes}")
    return check_method(getattr(module, name), spec)


def resolve_method(text: str) -> type[Pruner] | None:
    """What `--method` means: a name, FILE.py:CLASS, or None for "none"; UsageError otherwise."""
    if text == NONE:
        return None
    return load_outside(text) if is_outside(text) else find_method(text)


def parse_site(text: str) -> tuple[str, int | None]:
    """The site that a method declares as (kind, layer): ("vision", None), ("decoder", 2); see `Site`.

    ("decoder", None) is a method that names its layers itself (`Pruner.sites`), as one with several layers
    must. Raises UsageError for what is not a site.
    """
    site = declared_site(text)
    return site.kind, site.layers[0] if site.layers else None


def declared_site(text: str) -> Site:
    """The site that a method declares, of one layer at most; UsageError for what is not one."""
    site = Site.parse(text)
    if len(site.layers) > 1:
        raise UsageError(f"site '{site}' names several layers; declare site decoder and name them in sites()")
    return site


def check_method(method: Any, label: str) -> type[Pruner]:
    """Return `method` if its declaration can work; else raise UsageError, one line that names `label`."""
    if not (isinstance(method, type) and issubclass(method, Pruner)):
        raise UsageError(f"{label} is not a subclass of vtp.export.pruners.base.Pruner")
    problem = _problem(method)
    if problem:
        raise UsageError(f"{label}: {problem}")
    return method


def parse_options(method: type[Pruner], texts: Iterable[str]) -> dict[str, Any]:
    """Turn `k=v` strings into options of `method`, each of its default's type (int, float, bool or str).

    Raises UsageError for a string without "=", an unknown or repeated option, or an unfit value.
    """
    return read_options(texts, method.options, f"method {method.name}", "method-option")


def _problem(method: type[Pruner]) -> str:
    """Say what is wrong with a declaration, or ""."""
    name, site, needs = (getattr(method, field, None) for field in ("name", "site", "needs"))
    if not (isinstance(name, str) and _NAME.fullmatch(name)) or name == NONE:
        return f"name is {name!r}; give a lower-case word such as 'mine' (not '{NONE}')"
    try:
        kind = declared_site(site or "").kind
    except UsageError as error:
        return str(error)
    allowed = CUES[kind]
    if not isinstance(needs, tuple) or not needs or not set(needs) <= set(allowed):
        return f"needs is {needs!r}; give a tuple of names, for site {site} from: {', '.join(allowed)}"
    if len(set(needs)) != len(needs):
        return f"needs names a cue twice: {needs!r}"
    if method.forward is Pruner.forward:
        return "forward is missing; it takes the cues by name and returns keep_indices int64 [B,K]"
    if site == "decoder" and inspect.getattr_static(method, "sites") is vars(Pruner)["sites"]:
        return "site decoder needs sites(), which says at which layers; or give one site, such as decoder:2"
    if method.merges and kind == "decoder":
        return f"a method at site {site} cannot merge; choose site vision or projector"
    if not (isinstance(method.inside, tuple) and set(method.inside) <= set(CUES["decoder"])):
        return f"inside is {method.inside!r}; give a tuple of names from: {', '.join(CUES['decoder'])}"
    if method.positions not in POSITIONS:
        return f"positions is {method.positions!r}; give {' or '.join(POSITIONS)}"
    return _option_problem(method.options)


def _option_problem(options: Any) -> str:
    if not isinstance(options, dict):
        return f"options is {options!r}; give a dict of name -> default"
    for key, default in options.items():
        if key == "positions":
            return "option positions is every method's already; choose another name"
        if type(default) not in (bool, int, float, str):
            return f"option {key} has the default {default!r}; give an int, a float, a bool or a str"
    return ""


def _classes(module: ModuleType) -> list[type[Pruner]]:
    """The pruners that `module` itself defines (not those it imports)."""
    found = vars(module).values()
    return [
        value
        for value in found
        if inspect.isclass(value) and issubclass(value, Pruner) and value.__module__ == module.__name__
    ]


def _only_class(module: ModuleType) -> type[Pruner]:
    classes = _classes(module)
    if len(classes) != 1:
        raise UsageError(f"method file {module.__name__} defines {len(classes)} pruners; it must define one")
    return check_method(classes[0], module.__name__)


def _run_file(path: Path) -> ModuleType:
    """Execute a user's file as a module of its own; any exception becomes one line."""
    if not path.is_file():
        raise UsageError(f"method file {path} does not exist")
    name = f"vtp_outside_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # given for every .py path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch.export look a class's module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        reason = " ".join(str(error).split())
        raise UsageError(f"method file {path} fails when run: {type(error).__name__}: {reason}") from error
    return module
