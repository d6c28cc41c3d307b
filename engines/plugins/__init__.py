"""vtp.engines.plugins: operators of our own for TensorRT, each a kernel and the graph it takes the place of.

Not used unless asked for. What is here knows a pattern of nodes, and no pruner by name.
"""

PLUGINS = ("greedy",)

__all__ = ["PLUGINS"]
