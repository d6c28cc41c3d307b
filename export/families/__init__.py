"""The families: one file each, exposing `FAMILY`; found by the architecture name in config.json."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from vtp.engines import VtpError
from vtp.export.families.base import Family


def families() -> list[type[Family]]:
    """Every family, by name."""
    names = sorted(item.name for item in iter_modules(__path__) if item.name != "base")
    return [import_module(f"{__name__}.{name}").FAMILY for name in names]


def find_family(config: dict[str, Any]) -> type[Family]:
    """The family of a config.json. Raises VtpError naming the architecture and what is supported."""
    named = config.get("architectures") or []
    architectures = [str(name) for name in named] if isinstance(named, list) else [str(named)]
    known = {name: family for family in families() for name in family.architectures}
    for name in architectures:
        if name in known:
            return known[name]
    given = ", ".join(architectures) or f"none (model_type {config.get('model_type')!r})"
    raise VtpError(f"unsupported architecture {given}; supported: {', '.join(sorted(known))}")
