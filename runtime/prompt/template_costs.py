"""What a template's operators, methods and filters may cost, charged before they run.

Each is linear in what it reads and writes, or its size is known from its arguments, or it takes short texts
only; methods that are not listed are refused. Sizes and units: `vtp.runtime.prompt.template_budget`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sized
from functools import wraps
from typing import Any

from jinja2.utils import _PassArg

from vtp.runtime.prompt.template_budget import (
    BITS,
    CALL,
    ELEMENT,
    WORDS,
    TemplateLimit,
    charge,
    counted,
    deep,
    shallow,
    text_units,
)

# -- operators -----------------------------------------------------------------------------------------------


def charge_operator(operator: str, left: Any, right: Any) -> None:
    """Charge for `left operator right`; raises `TemplateLimit` where the result would be too large."""
    if operator == "%" and isinstance(left, str | bytes):
        _percent(left, right)
    elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
        _times(left, right)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_size(left.bit_length() * max(right, 0), BITS, "bits")
    elif operator == "+" and isinstance(left, Sized):
        charge(shallow(left) + shallow(right))


def _times(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_size(left.bit_length() + right.bit_length(), 2 * BITS, "bits")
    else:
        count, value = (left, right) if isinstance(left, int) else (right, left)
        charge(shallow(value) * max(count, 0))


def _percent(form: str | bytes, values: Any) -> None:
    """`form % values`: every field may hold all the values, and be as wide as any number says."""
    if isinstance(form, bytes):
        raise TemplateLimit("it formats bytes")
    fields, units = form.count("%"), deep(values)
    widths = spec_width(form)
    if "*" in form and isinstance(values, tuple):
        widths += fields * sum(abs(value) for value in values if isinstance(value, int))
    charge(text_units(form) + fields * units + widths)


def spec_width(spec: str) -> int:
    """All numbers that a format holds: widths and precisions among them."""
    return sum(int(digits[:16]) for digits in re.findall(r"[0-9]+", spec))


def _check_size(size: int, most: int, what: str) -> None:
    if size > most:
        raise TemplateLimit(f"it makes a number of {size} {what} (limit: {most})")


# -- methods -------------------------------------------------------------------------------------------------

_Cost = Callable[[Any, list[Any]], None]  # of the object and all arguments
_CODECS = {"utf8", "utf16", "utf32", "utf16le", "utf16be", "utf32le", "utf32be", "ascii", "latin1"}


def _over_all(owner: Any, given: list[Any]) -> None:
    deep(owner)
    for value in given:
        deep(value)


def _by_arguments(_owner: Any, given: list[Any]) -> None:
    """Nothing but the arguments is read: a dictionary hashes its key."""
    for value in given:
        deep(value)


def _pairwise(owner: Any, given: list[Any]) -> None:
    """Each character may be held against each of the arguments'."""
    charge(shallow(owner) * (1 + sum(shallow(value) for value in given if isinstance(value, str | bytes))))


def _wide(owner: Any, given: list[Any]) -> None:
    _over_all(owner, given)
    charge(sum(4 * abs(value) for value in given if isinstance(value, int)))


def _tabs(owner: Any, given: list[Any]) -> None:
    width = max((abs(value) for value in given if isinstance(value, int)), default=8)
    charge(shallow(owner) * (1 + width))


def _replaced(owner: Any, given: list[Any]) -> None:
    _over_all(owner, given)
    if len(given) > 1 and isinstance(owner, str | bytes):
        charge((owner.count(given[0]) + 1) * shallow(given[1]))


def _joined(owner: Any, given: list[Any]) -> None:
    _by_arguments(owner, given)
    charge(sum(len(value) for value in given if isinstance(value, Sized)) * shallow(owner))


def _translated(owner: Any, given: list[Any]) -> None:
    units = [deep(value) for value in given]
    charge(shallow(owner) * (1 + sum(units)))


def _coded(owner: Any, given: list[Any]) -> None:
    """Codecs by other names may be slower than linear, such as punycode."""
    deep(owner)
    names = [value.lower().replace("-", "").replace("_", "") for value in given[:1] if isinstance(value, str)]
    if any(name not in _CODECS for name in names):
        _check_short(owner)


def _formatted(owner: Any, given: list[Any]) -> None:
    """The fields are charged one by one: see `vtp.runtime.prompt.template`."""
    del owner, given


_LINEAR = (
    "as_integer_ratio bit_count bit_length capitalize casefold conjugate copy count endswith escape find "
    "from_bytes fromhex fromkeys hex index is_integer isalnum isalpha isascii isdecimal isdigit isidentifier "
    "islower isnumeric isprintable isspace istitle isupper lower maketrans partition removeprefix "
    "removesuffix split splitlines startswith swapcase title unescape upper isdisjoint"
)
_METHODS: dict[str, _Cost] = {
    **dict.fromkeys(_LINEAR.split(), _over_all),
    **dict.fromkeys(["get", "items", "keys", "values"], _by_arguments),
    **dict.fromkeys(["lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"], _pairwise),
    **dict.fromkeys(["center", "ljust", "rjust", "to_bytes", "zfill"], _wide),
    **dict.fromkeys(["decode", "encode"], _coded),
    **dict.fromkeys(["format", "format_map"], _formatted),
    "expandtabs": _tabs,
    "join": _joined,
    "replace": _replaced,
    "translate": _translated,
}


def charge_method(name: str, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Charge for a method of a plain value; returns the arguments, iterators among them read to lists.

    Raises `TemplateLimit` for methods whose cost is not known here.
    """
    cost = _METHODS.get(name)
    if cost is None:
        raise TemplateLimit(f"it calls the method '{name[:40]}' of {type(owner).__name__}")
    args = tuple(_read(value) for value in args)
    cost(owner, [*args, *kwargs.values()])
    return args


# -- filters and tests ---------------------------------------------------------------------------------------

# Those that read no more than an element of their value, or none; and those that go over it step by step.
_CONSTANT = frozenset(["attr", "count", "d", "default", "first", "last", "length", "random", "safe"])
_STEPWISE = frozenset(["items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"])
# Slower than linear for some texts, whatever is allowed for.
_SHORT = frozenset(["float", "int", "pprint", "striptags", "title", "urlize", "wordwrap", "xmlattr"])
_BY_ATTRIBUTE = frozenset(["groupby", "join", "max", "min", "sort", "sum", "unique"])
_FACTORS = {"e": 6, "escape": 6, "forceescape": 6, "urlencode": 12, "tojson": 12}
_FACTORS |= dict.fromkeys(("dictsort", "groupby", "max", "min", "sort", "unique"), 16)
_COMPARISONS = (
    "!= < <= == > >= divisibleby eq equalto even ge greaterthan gt in le lessthan lower lt ne odd upper"
)
_COMPARING = frozenset(_COMPARISONS.split())


def bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, charged before it runs and for what it makes."""
    first = 0 if _PassArg.from_obj(function) is None else 1

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        charge(CALL + ELEMENT * (len(args) + len(kwargs)))
        given = _charged(name, list(args[first:]), kwargs)
        made = function(*args[:first], *given, **kwargs)
        return made if name in _CONSTANT else counted(made)

    return run


def bounded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The test, charged before it runs."""
    first = 0 if _PassArg.from_obj(function) is None else 1

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        charge(CALL)
        if name in _COMPARING:
            for value in args[first:]:
                deep(value)
        return function(*args, **kwargs)

    return run


def _charged(name: str, given: list[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Charge for a filter on given[0]; returns what it is called with."""
    if name in _CONSTANT:
        return given
    rest = [*given[1:], *kwargs.values()]
    if name in _STEPWISE:
        charge(shallow(given[0]) if given else 0)
        _check_path([*given[1:2], kwargs.get("attribute")])
        return given
    if name in _BY_ATTRIBUTE:
        _check_path(rest)
    given = [_read(value) for value in given]
    units = sum([deep(value) for value in [*given, *kwargs.values()]])
    charge(units * _FACTORS.get(name, 1))
    if name in _SHORT:
        _check_units(units)
    if cost := _FILTERS.get(name):
        cost(given[0] if given else None, [*given[1:], *kwargs.values()])
    return given


def _chunks(value: Any, rest: list[Any]) -> None:
    """`batch` and `slice`: a given number of lists, or of places in the last."""
    charge(shallow(value) + ELEMENT * _numbers(rest))


def _indented(value: Any, rest: list[Any]) -> None:
    """Every line may get the indentation, a number or a text."""
    width = max((abs(one) if isinstance(one, int) else shallow(one) for one in rest), default=4)
    charge((_units(value) + 1) * (1 + width))


def _summed(value: Any, rest: list[Any]) -> None:
    """Lists are added one by one, each time to a new one."""
    count = len(value) if isinstance(value, Sized) else 1
    charge(count * (_units(value) + sum(map(shallow, rest))))


def _rounded(_value: Any, rest: list[Any]) -> None:
    _check_size(_numbers(rest), 300, "digits")


def _separated(value: Any, rest: list[Any]) -> None:
    charge(shallow(value) * (1 + sum(map(_units, rest))))


def _wrapped(value: Any, rest: list[Any]) -> None:
    charge(_units(value) * (1 + sum(_units(one) for one in rest)))


_FILTERS: dict[str, _Cost] = {
    "batch": _chunks,
    "slice": _chunks,
    "center": _wide,
    "format": lambda value, rest: _percent(str(value), tuple(rest)),
    "indent": _indented,
    "join": _separated,
    "replace": lambda value, rest: _replaced(value if isinstance(value, str) else str(value), rest),
    "round": _rounded,
    "sum": _summed,
    "wordwrap": _wrapped,
    "xmlattr": _wrapped,
}


def _numbers(values: list[Any]) -> int:
    return sum(abs(value) for value in values if isinstance(value, int))


def _units(value: Any) -> int:
    """Units of a value's text, charged."""
    return deep(value)


def _read(value: Any) -> Any:
    """An iterator's elements in a list, as its reader would take them; anything else as it is."""
    if isinstance(value, Iterator) and not isinstance(value, Sized):
        return list(counted(value))
    return value


def _check_path(values: list[Any]) -> None:
    """Refuse an attribute of many parts, which is looked up for every element."""
    for value in values:
        if isinstance(value, str) and value.count(".") + value.count(",") > 16:
            raise TemplateLimit("it looks for an attribute of more than 16 parts")


def _check_short(value: Any) -> None:
    if isinstance(value, str | bytes):
        _check_units(shallow(value))


def _check_units(units: int) -> None:
    if units > WORDS:
        raise TemplateLimit(f"it gives {units} units to what takes short texts only (limit: {WORDS})")
