"""What transformers calls the keys and values that a model or a layer is handed, which changed in 5.24."""

from __future__ import annotations

import inspect
from typing import Any


def with_cache(module: Any, cache: Any) -> dict[str, Any]:
    """The keyword that hands `cache` to a module's forward: `cache`, or before 5.24 `past_key_values`.

    The older name warns in 5.24 and is gone in 5.40.
    """
    named = "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"
    return {named: cache}
