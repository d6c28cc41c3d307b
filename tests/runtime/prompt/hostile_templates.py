"""Chat templates that would hang or take all memory, one for each way; each stops at a bound.

Run as a program with a budget, it renders all of them (or those that are named) under a limit of memory, and
prints a JSON line for each.
"""

import json
import resource
import sys
import time
from pathlib import Path

MEMORY = 2**30  # bytes of address space that rendering may add
DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = OP %}{% endfor %}{{ ns.x }}"
LISTS = "{% set ns = namespace(a=[1], b=[1], t=(1,)) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
LISTS += "{% set ns.b = [ns.b, ns.b] %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}"
NESTED = "{% for a in R %}{% for b in R %}{% for c in R %}OP{% endfor %}{% endfor %}{% endfor %}"
LONG = "{% set s = 'ab ' * 1000000 %}"
MANY = "{% for i in range(99999) %}OP{% endfor %}"

HOSTILE = {
    "nested_ranges": NESTED.replace("R", "range(99999)").replace("OP", "x"),
    "nested_silent_ranges": NESTED.replace("R", "range(99999)").replace("OP", ""),
    "filtered_ranges": "{% for a in range(99999) %}"
    "{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "recursive_loop": "{% for a in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "wide_percent": "{{ '%1000000000d' % 1 }}",
    "precise_percent": "{{ '%.1000000000f' % 1 }}",
    "starred_percent": "{{ '%*d' % (1000000000, 1) }}",
    "percent_by_name": "{{ ('%(a)s' * 9999) % {'a': 'x' * 999999} }}",
    "format_filter": "{{ '%1000000000d' | format(1) }}",
    "format_method": "{{ '{:>1000000000}'.format(1) }}",
    "format_precision": "{{ '{:.1000000000f}'.format(1.0) }}",
    "format_nested": "{{ '{:{}}'.format(1, '>1000000000') }}",
    "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "format_repeats": "{{ ('{0}' * 9999).format('x' * 999999) }}",
    "markup_format": "{{ ('{:>1000000000}' | safe).format(1) }}",
    "repeat": "{{ 'a' * 10**9 }}",
    "repeat_list": "{{ ([0] * 10**9) | length }}",
    "repeat_left": "{{ (10**9 * 'a') | length }}",
    "repeat_markup": "{{ (('a' | safe) * 10**9) | length }}",
    "double_plus": DOUBLING.replace("OP", "ns.x + ns.x"),
    "double_tilde": DOUBLING.replace("OP", "ns.x ~ ns.x"),
    "double_replace": DOUBLING.replace("OP", "ns.x.replace('a', 'aa')"),
    "double_replace_filter": DOUBLING.replace("OP", "ns.x | replace('a', 'aa')"),
    "double_join": DOUBLING.replace("OP", "[ns.x, ns.x] | join(ns.x)"),
    "double_join_method": DOUBLING.replace("OP", "ns.x.join([ns.x, ns.x])"),
    "double_format": DOUBLING.replace("OP", "'%s%s' % (ns.x, ns.x)"),
    "double_block": DOUBLING.replace("{% set ns.x = OP %}", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
                                     "{% set ns.x = y %}"),
    "double_list": DOUBLING.replace("OP", "ns.x | list + ns.x | list"),
    "double_json": DOUBLING.replace("OP", "[ns.x, ns.x] | tojson"),
    "translate": LONG + "{{ s.translate({97: s}) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(10000000) }}",
    "replace_empty": LONG + "{{ s.replace('', s) }}",
    "join_letters": LONG + "{{ s.join(s) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(width) }}".replace("width", "10**9"),
    "indent": "{{ 'a' | indent(10**9, true) }}",
    "indent_lines": "{{ ('\n' * 100000) | indent('x' * 100000) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list | length }}",
    "slice": "{{ [1] | slice(10**9) | list | length }}",
    "wordwrap": "{{ ('a ' * 8000) | wordwrap(1, wrapstring='x' * 16000) }}",
    "json_indent": "{{ [[[1]]] | tojson(indent=10**9) }}",
    "json_separators": "{{ ([1] * 100000) | tojson(separators=('x' * 100000, ':')) }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power_steps": "{% set ns = namespace(x=3) %}"
    "{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "round": "{{ 5 | round(-1000000000) }}{{ 5 | round(1000000000, 'ceil') }}",
    "print_lists": LISTS + "{{ ns.a }}",
    "string_lists": LISTS + "{{ ns.a | string }}",
    "json_lists": LISTS + "{{ ns.a | tojson }}",
    "join_lists": LISTS + "{{ ns.a | join }}",
    "format_lists": LISTS + "{{ '%s' % (ns.a,) }}",
    "format_method_lists": LISTS + "{{ '{}'.format(ns.a) }}",
    "tilde_lists": LISTS + "{{ ns.a ~ 'x' }}",
    "compare_lists": LISTS + "{{ ns.a == ns.b }}",
    "order_lists": LISTS + "{{ ns.a < ns.b }}",
    "in_lists": LISTS + "{{ ns.a in [ns.b] }}",
    "test_lists": LISTS + "{{ ns.a is eq ns.b }}",
    "select_lists": LISTS + "{{ [ns.a] | select('eq', ns.b) | list }}",
    "index_lists": LISTS + "{{ [ns.a].index(ns.b) }}",
    "sort_lists": LISTS + "{{ [ns.a, ns.b] | sort }}",
    "unique_lists": LISTS + "{{ [ns.t, ns.t] | unique | list | length }}",
    "hash_literal": LISTS + "{{ {ns.t: 1} | length }}",
    "hash_item": LISTS + "{{ {}[ns.t] }}",
    "hash_get": LISTS + "{{ {}.get(ns.t) }}",
    "hash_fromkeys": LISTS + "{{ dict.fromkeys([ns.t]) | length }}",
    "missing_lists": LISTS + "{{ {}[ns.a].x }}",
    "raise_lists": LISTS + "{{ raise_exception(ns.a) }}",
    "changed_lists": LISTS + "{% for i in [1, 2] %}{{ loop.changed([ns.a]) }}{% endfor %}",
    "namespace_in_itself": "{% set ns = namespace() %}{% set ns.a = [ns, ns] %}{{ ns }}",
    "sum_lists": "{{ ([[1] * 1000] * 10000) | sum(start=[]) | length }}",
    "macro_doubles": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(99) }}",
    "macro_for_ever": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "block_for_ever": "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "caller_doubles": "{% macro m(n) %}{{ caller() }}{{ caller() }}{% if n %}"
    "{% call m(n - 1) %}{{ n }}{% endcall %}"
    "{% call m(n - 1) %}{{ n }}{% endcall %}{% endif %}{% endmacro %}{% call m(99) %}x{% endcall %}",
    "maps": MANY.replace("OP", "{{ range(99999) | map('string') | select('eq', 'x') | list }}"),
    "lists": MANY.replace("OP", "{% set x = range(99999) | list %}"),
    "slices": LONG + MANY.replace("OP", "{% set x = s[1:] %}"),
    "uppers": LONG + MANY.replace("OP", "{% set x = s.upper() %}"),
    "finds": LONG + MANY.replace("OP", "{% set x = 'c' in s %}"),
    "prints": MANY.replace("OP", "x" * 100000),
    "stars": MANY.replace("OP", "{% set x = dict(*range(99999)) %}"),
    "rfind": "{% set s = 'a' * 4000000 %}{{ s.rfind('b' + 'a' * 100000) }}",
    "rsplit": "{% set s = 'a' * 4000000 %}{{ s.rsplit('b' + 'a' * 100000) }}",
    "strip": "{% set s = 'a' * 4000000 %}{{ s.strip('b' * 4000000 + 'a') }}",
    "striptags": "{{ ('<!---->' * 1000000) | striptags }}",
    "striptags_method": "{{ (('<!---->' * 1000000) | safe).striptags() }}",
    "urlize": "{{ ('http://' * 100000) | urlize }}",
    "punycode": "{{ ('\u00e9a' * 100000).encode('punycode') }}",
    "int_of_text": "{{ ('f' * 1000000) | int(0, 16) }}",
    "attribute_path": "{{ range(99999) | map(attribute='a' + '.a' * 9999) | list }}",
    "pprint": "{{ ([[1] * 100] * 10000) | pprint }}",
    "date": "{{ strftime_now('%1000000000d') }}",
    "lorem": "{{ lipsum(n=100000) }}",
    "bytes_format": "{{ '%1000000000d'.encode() % 1 }}",
    "deep_source": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "long_sum": "{{ 1" + " + 1" * 50000 + " }}",
    "many_ifs": "{% set a = 1 %}{% if a %}" * 2000 + "{% endif %}" * 2000,
    "many_conditions": "{% if a %}{% set bNUMBER = 1 %}{% endif %}" * 3000,
    "many_parts": "{{ a.b }}" * 14000,
    "long_source": "x" * 10_000_000,
}  # fmt: skip


def verdict(source: str) -> dict[str, object]:
    """What becomes of a question under this template: the line of its error, None where there is none."""
    from vtp.engines.errors import VtpError
    from vtp.runtime.prompt.template import ChatTemplate, first_line

    began = time.monotonic()
    try:
        for number in range(source.count("NUMBER")):
            source = source.replace("NUMBER", str(number), 1)
        text = ChatTemplate(source).render(messages=[{"role": "user", "content": "hi"}])
        found: dict[str, object] = {"error": None, "length": len(text)}
    except VtpError as error:
        found = {"error": "VtpError", "line": str(error)}
    except Exception as error:
        found = {"error": type(error).__name__, "line": first_line(error)}
    return {**found, "seconds": round(time.monotonic() - began, 2)}


def main(units: int, names: list[str]) -> None:
    """Print a line for each template."""
    import vtp.runtime.prompt.template
    from vtp.runtime.prompt import template_budget

    del vtp.runtime.prompt.template  # imported before memory is limited
    template_budget.UNITS = units or template_budget.UNITS
    now = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    for name in names or HOSTILE:
        print(json.dumps({"name": name, **verdict(HOSTILE[name])}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
