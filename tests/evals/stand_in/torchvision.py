"""Stands in for torchvision, which VLMEvalKit imports with its hundred models: names, and nothing that works.

The build of torchvision on PyPI wants CUDA's torch. What is tested here uses none of it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

__path__: list[str] = []


class _Anything(type):
    """A class with every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Names(ModuleType):
    """A module with every name."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


for _name in ("transforms", "transforms.functional", "transforms.v2", "models", "io", "ops", "utils"):
    _module = sys.modules[f"{__name__}.{_name}"] = _Names(f"{__name__}.{_name}")
    if "." not in _name:
        globals()[_name] = _module
