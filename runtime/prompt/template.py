"""A chat template, compiled in the sandbox that transformers sets up for it, and rendered within bounds.

A template comes with its model, from anyone: the sandbox keeps it from Python's internals, and a budget from
taking for ever or all memory. Before it is compiled, its tree is rewritten: each pass of a loop and each call
of a macro or block is charged for the nodes in it, and what may be large when it is read whole (compared,
printed, used as a key) goes through a filter that measures it. What is rendered stays the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from vtp.engines.errors import VtpError
from vtp.runtime.prompt.template_budget import (
    CALL,
    ELEMENT,
    TemplateLimit,
    charge,
    counted,
    deep,
    limited,
    shallow,
    text_units,
)
from vtp.runtime.prompt.template_costs import (
    bounded_filter,
    bounded_test,
    charge_method,
    charge_operator,
    spec_width,
)

__all__ = ["ChatTemplate", "TemplateLimit", "TemplateRefusal", "first_line"]

LONGEST = 2**17  # characters of a template's source; real ones have up to 20,000
_MOST_NODES = 25_000  # of the tree; real ones have up to 5,000
_MOST_BRANCHES = 2**18  # conditions times names: compiling one looks at all the others
_NODE = 10  # units of a node of the tree, each time it is passed
_DEEP, _MADE, _PASS = "0deep", "0made", "0pass"  # filters whose names no template can spell as filters
_DATE_FORMAT = 256  # characters


class TemplateRefusal(TemplateError):
    """What a template itself says of messages that it does not take."""


class ChatTemplate:
    """A compiled chat template. Raises `VtpError`, in one line, for a source that does not compile."""

    def __init__(self, source: str) -> None:
        if len(source) > LONGEST:
            raise VtpError(
                f"the model's chat template has {len(source)} characters (limit: {LONGEST}); use another"
            )
        try:
            with limited():
                environment = _Environment()
                self._template = environment.from_string(_bounded(environment, source))
        except Exception as error:  # Python's own compiler raises many kinds for what Jinja lets pass
            raise VtpError(f"the model's chat template does not compile: {first_line(error)}") from error

    def render(self, **variables: Any) -> str:
        """The text for these variables. Raises whatever the template raises; `TemplateLimit` past a bound."""
        with limited():
            return self._template.render(**variables)


def first_line(error: BaseException, most: int = 240) -> str:
    """An exception's first line, cut to `most` characters; its type's name where it has no text."""
    lines = str(error).strip()[: 4 * most].splitlines()
    return lines[0][:most] if lines else type(error).__name__


# -- the tree ------------------------------------------------------------------------------------------------


def _bounded(environment: _Environment, source: str) -> nodes.Template:
    tree = environment.parse(source)
    _check_tree(tree)
    tree = _Charging().visit(tree)
    tree.set_environment(environment)
    tree.set_lineno(1)  # of the nodes that have none
    return tree


def _check_tree(tree: nodes.Template) -> None:
    """Refuse what takes long to compile, which no budget interrupts."""
    count = sum(1 for _ in tree.find_all(nodes.Node))
    if count > _MOST_NODES:
        raise TemplateLimit(f"it has {count} parts (limit: {_MOST_NODES})")
    names = len({name.name for name in tree.find_all(nodes.Name)})
    branches = sum(1 for _ in tree.find_all((nodes.If, nodes.Macro, nodes.Block)))
    if names * branches > _MOST_BRANCHES:
        raise TemplateLimit(f"it has {branches} conditions and macros for {names} names; that is too many")


class _Charging(NodeTransformer):
    """Puts the charges into a template's tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        cost = _cost([node.target, *node.body])
        tested = None if node.test is None else _cost([node.target, node.test])
        self.generic_visit(node)
        node.body.insert(0, _passing(cost))
        if tested is not None and node.test is not None:
            node.test = nodes.And(_filter(nodes.Const(tested), _PASS), node.test)
        return node

    def _body(self, node: Any) -> nodes.Node:
        cost = 4 * CALL + _cost(node.body)
        self.generic_visit(node)
        node.body.insert(0, _passing(cost))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            child if isinstance(child, nodes.TemplateData) else _filter(child, _DEEP) for child in node.nodes
        ]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filter(node.expr, _DEEP)
        for operand in node.ops:
            operand.expr = _filter(operand.expr, _DEEP)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filter(child, _DEEP) for child in node.nodes]
        return node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        for pair in node.items:
            pair.key = _filter(pair.key, _DEEP)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filter(node, _MADE)
        if not isinstance(node.arg, nodes.Const):
            node.arg = _filter(node.arg, _DEEP)
        return node


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _passing(units: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_filter(nodes.Const(units), _PASS))


def _cost(body: Sequence[nodes.Node]) -> int:
    """Units of passing these nodes once, all branches and raw text included."""
    total, pending = CALL, list(body)
    while pending:
        node = pending.pop()
        total += _NODE
        if isinstance(node, nodes.TemplateData):
            total += text_units(node.data)
        elif isinstance(node, nodes.Const) and isinstance(node.value, str):
            total += text_units(node.value) // 8
        pending += node.iter_child_nodes()
    return total


def _measured(value: Any) -> Any:
    deep(value)
    return value


def _sliced(value: Any) -> Any:
    charge(shallow(value))
    return value


# -- the sandbox ---------------------------------------------------------------------------------------------


class _GenerationTag(Extension):
    """{% generation %}...{% endgeneration %}, which marks words for training; rendered as is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' sandbox, in which operators, calls, filters and tests are charged."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while compiling
            extensions=[_GenerationTag, loopcontrols],
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: bounded_filter(name, one) for name, one in self.filters.items()}
        self.filters |= {_DEEP: _measured, _MADE: _sliced, _PASS: charge}
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: bounded_test(name, one) for name, one in tests.items()}
        del self.globals["lipsum"]  # as much random text as one likes
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_TemplateDict(),
            namespace=_TemplateNamespace,
        )

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        charge_operator(operator, left, right)
        return self.binop_table[operator](left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call an object for a template: charge its work beforehand, and count what it makes."""
        charge(CALL + ELEMENT * (len(args) + len(kwargs)))
        if isinstance(__obj, BuiltinMethodType) or _of_markup(__obj):
            args = charge_method(__obj.__name__, __obj.__self__, args, kwargs)
        elif isinstance(__obj, FunctionType | MethodType | _TemplateDict):
            for value in [*args, *kwargs.values()]:
                deep(value)
        made = super().call(__context, __obj, *args, **kwargs)
        return made if _looks_up(__obj) else counted(made)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's wrapper of `str.format`, with every field charged."""
        if super().wrap_str_format(value) is None:
            return None
        text: str = value.__self__
        mapped = value.__name__ == "format_map"
        formatter: SandboxedFormatter = _Formatter(self)
        if isinstance(text, Markup):
            formatter = _EscapeFormatter(self, escape=text.escape)

        def run(*args: Any, **kwargs: Any) -> str:
            if mapped:
                (kwargs,), args = args, ()
            charge(shallow(text))
            return type(text)(formatter.vformat(text, args, kwargs))

        return run


def _of_markup(called: Any) -> bool:
    return isinstance(called, MethodType) and isinstance(called.__self__, Markup)


def _looks_up(called: Any) -> bool:
    """Whether a call makes nothing: it finds what is there."""
    return isinstance(called, BuiltinMethodType) and called.__name__ == "get"


class _Fields(SandboxedFormatter):
    """Charges for the fields of a format before they are written."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        deep(value)
        charge(CALL + spec_width(format_spec))
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion is not None:
            deep(value)
        return super().convert_field(value, conversion)


class _Formatter(_Fields):
    pass


class _EscapeFormatter(_Fields, SandboxedEscapeFormatter):
    pass


class _TemplateNamespace(Namespace):
    """Jinja's namespace without underscore names, which could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not store the underscore-prefixed attribute {name!r}")


class _TemplateDict:
    """`dict` for templates: callable, with `fromkeys`, and no way to the type's other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(message)


def _strftime_now(format: str) -> str:
    if len(format) > _DATE_FORMAT or re.search("[0-9]", format):
        raise TemplateLimit(f"it formats a date with {format[:40]!r}")
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters; prompts want them as they are."""
    if indent is None and separators is None:
        return json.dumps(value, ensure_ascii=ensure_ascii, sort_keys=sort_keys)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=_short_indent(indent), separators=separators, sort_keys=sort_keys
    )
    return "".join(_charged(encoder.iterencode(value)))


def _short_indent(indent: Any) -> Any:
    if (abs(indent) if isinstance(indent, int) else len(indent or "")) > 64:
        raise TemplateLimit("it indents JSON by more than 64")
    return indent


def _charged(pieces: Iterator[str]) -> Iterator[str]:
    for piece in pieces:
        charge(ELEMENT + shallow(piece))
        yield piece
