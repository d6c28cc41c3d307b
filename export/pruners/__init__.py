"""The pruning methods: one file per method, its name the method's name on the command line."""

from vtp.export.pruners.registry import (
    CUES,
    NONE,
    POSITIONS,
    check_method,
    find_method,
    load_outside,
    method_names,
    parse_options,
    parse_site,
    picture_methods,
    resolve_method,
)
from vtp.export.pruners.site import Site

__all__ = [
    "CUES",
    "NONE",
    "POSITIONS",
    "Site",
    "check_method",
    "find_method",
    "load_outside",
    "method_names",
    "parse_options",
    "parse_site",
    "picture_methods",
    "resolve_method",
]
