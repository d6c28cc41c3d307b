"""Graph clean-up after tracing."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer


def optimize(model: ir.Model, rewrite: bool = True) -> None:
    """Fold constants, drop what nothing reads, share equal nodes and initializers; in place.

    With `rewrite`, onnxscript's pattern rules run as well. They remove transposes around attention, but match
    dozens of patterns against every node: on an unrolled pruner of 900 nodes they took ten seconds and found
    nothing, so pruners go without.
    """
    if rewrite:
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
