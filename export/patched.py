"""An attribute replaced for a while: of a module of transformers, of one layer, or of a class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let `owner`.`name` be `value`; afterwards it is what it was, the owner's own or inherited.

    Raises AttributeError for a name that the owner does not have.
    """
    inherited = name not in vars(owner)
    before = getattr(owner, name) if inherited else vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
