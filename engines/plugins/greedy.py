"""The greedy selection as a plugin of TensorRT, its kernel (greedy.cu) compiled ahead of time.

A "quick-deployable" plugin: described in Python while building; the engine carries the kernel's PTX, so that
running it needs neither Python nor this file. TensorRT 10.9 or newer.
"""

# No postponed annotations: TensorRT reads those of the functions below, and wants the types themselves.

import importlib
from pathlib import Path
from typing import Any

from vtp.engines.cuda.driver import probe_cuda
from vtp.engines.errors import UsageError, VtpError
from vtp.engines.plugins.nvcc import compile_ptx, find_nvcc
from vtp.engines.plugins.rewrite import DOMAIN, OPERATOR, Greedy, with_greedy_node
from vtp.engines.versions import version_numbers

SOURCE = Path(__file__).with_name("greedy.cu")
KERNEL = "vtp_greedy"
THREADS = 256  # as in greedy.cu
LARGEST = 48 * 1024 // 4 - 2 * THREADS  # tokens whose scores fit a block's shared memory
_OLDEST = (10, 9)
_ID = f"{DOMAIN}::{OPERATOR}"


def check_plugin(engine: str, version: str) -> None:
    """Refuse a library that takes no such plugin, and a machine that cannot compile one.

    Raises UsageError for TensorRT-RTX, VtpError for TensorRT before 10.9 and where nvcc is missing.
    """
    if engine != "tensorrt":
        raise UsageError(
            f"--plugin is for --engine tensorrt: {engine} {version} takes no plugin with a kernel compiled "
            "ahead of time; leave out --plugin"
        )
    if version_numbers(version)[:2] < _OLDEST:
        raise VtpError(f"--plugin wants TensorRT 10.9 or newer, this is {version}; leave it out")
    find_nvcc()


def shared_bytes(count: int) -> int:
    """Shared memory that a block takes for `count` tokens."""
    return 4 * (count + 2 * THREADS)


def register_greedy(trt: Any, trtp: Any, found: Greedy, ptx: str) -> None:
    """Make the plugin known to TensorRT, for the selection of one graph and the kernel compiled for it.

    `trt` and `trtp` are the modules tensorrt and tensorrt.plugin. Once in a process: a build has its own.
    """
    import numpy as np
    import numpy.typing as npt

    def describe(
        scores: trtp.TensorDesc, factors: trtp.TensorDesc, keep: npt.NDArray[np.int32]
    ) -> trtp.TensorDesc:
        return trtp.from_shape_expr((scores.shape_expr[0], int(keep[0])), dtype=trt.int64)

    def launch(
        scores: trtp.TensorDesc,
        factors: trtp.TensorDesc,
        keep: npt.NDArray[np.int32],
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        """How the kernel runs: name, PTX, one block for each row of scores, and the numbers N and keep.

        scores float32 [B,N], factors float32 [B,N,N], keep int32 [1] -> outputs: picks int64 [B,keep].
        """
        params = trtp.KernelLaunchParams()
        params.grid_x = scores.shape_expr[0]  # a block for each picture
        params.block_x = THREADS
        params.shared_mem = shared_bytes(found.count)
        # Whole numbers go to the kernel between its inputs and its outputs.
        numbers = trtp.SymIntExprs.from_tuple(
            [trtp.SymInt32(number) for number in (found.count, int(keep[0]))]
        )
        return KERNEL, ptx, params, numbers

    trtp.register(_ID)(describe)
    trtp.aot_impl(_ID)(launch)


def prepare_graph(trt: Any, path: Path) -> bytes:
    """A graph file with its greedy selection as one node, and TensorRT ready to take it.

    Compiles the kernel for this machine's GPU and registers the plugin. Raises VtpError in one line.
    """
    content, found = with_greedy_node(path)
    if found.count > LARGEST:
        raise VtpError(f"the greedy plugin takes up to {LARGEST} visual tokens, these are {found.count}")
    cuda = probe_cuda()
    if not cuda.devices:
        raise VtpError(f"a plugin is compiled for the GPU that runs it, and there is none: {cuda.reason}")
    ptx = compile_ptx(SOURCE, cuda.devices[0].sm, cuda.driver)
    try:
        plugins = importlib.import_module(f"{trt.__name__}.plugin")
    except ImportError as error:
        raise VtpError(f"{trt.__name__} {trt.__version__} came without plugins: {error}") from error
    register_greedy(trt, plugins, found, ptx)
    return content
