"""Graph clean-up after tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter

from vtp.export.patched import patched


def optimize(model: ir.Model, rewrite: bool = True) -> None:
    """Fold constants, drop what nothing reads, share equal nodes and initializers; in place.

    With `rewrite`, onnxscript's pattern rules run as well. They remove transposes around attention, but match
    dozens of patterns against every node: on an unrolled pruner of 900 nodes they took ten seconds and found
    nothing, so pruners go without.
    """
    if rewrite:
        with screened_rules():
            optimizer.optimize_ir(model)
        return
    optimizer.inline(model)
    optimizer.fold_constants(model)
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


@contextmanager
def screened_rules() -> Iterator[None]:
    """Let onnxscript's rules be matched against those nodes only that can be the last of their pattern.

    onnxscript sets up a match for each rule and node, and then compares the operator first: nearly every
    match ends there. The operator of a rule is not public; without it every rule is matched as ever.
    """
    with patched(rewriter.RewriteRule, "try_rewrite", _screened(rewriter.RewriteRule.try_rewrite)):
        yield


def _screened(try_rewrite: Callable[..., Any]) -> Callable[..., Any]:
    """`try_rewrite`, which is asked only if the node's operator is the rule's or the rule takes several."""

    def asked(rule: Any, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
        wanted = _operator(rule)
        if wanted is not None and wanted != (node.domain, node.op_type):
            return None
        return try_rewrite(rule, model, graph, node, **options)

    return asked


def _operator(rule: Any) -> tuple[str, str] | None:
    """Domain and name of the operator that a rule's pattern ends with; None if it is not one operator."""
    try:
        identifier = rule._target_pattern.output_nodes[0].op_identifier()
    except (AttributeError, IndexError):
        return None
    return None if identifier is None else identifier[:2]
