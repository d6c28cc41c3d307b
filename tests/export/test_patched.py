"""`patched` gives back what was there."""

from __future__ import annotations

import pytest

from vtp.export.patched import patched


class Thing:
    def answer(self) -> int:
        return 1


def test_an_inherited_attribute_is_inherited_again() -> None:
    thing = Thing()
    with pytest.raises(ZeroDivisionError), patched(thing, "answer", lambda: 2):
        assert thing.answer() == 2
        raise ZeroDivisionError
    assert thing.answer() == 1 and "answer" not in vars(thing)


def test_an_own_attribute_is_put_back() -> None:
    before = Thing.answer
    with patched(Thing, "answer", lambda _: 3):
        assert Thing().answer() == 3
    assert Thing.answer is before


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError), patched(Thing(), "anser", None):
        pass
