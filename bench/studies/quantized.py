"""How much faster vtp-calib's int8 makes the vision encoder of LLaVA-1.5: ViT-L/14-336, random weights.

    python -m vtp.bench.studies.quantized [--rounds 15] [--threads N] [--work build/quantized] [--json FILE]

Exports the encoder in float32 (1.2 GB; kept for the next run), quantises it as vtp-calib does, and runs both
in turn on the same pictures, so that what else the machine does meets both. The speed of a matrix product
does not depend on the weights' values; accuracy is measured elsewhere, on a trained model. The 95 % interval
of the ratio of medians is of a bootstrap that draws rounds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.common.fewer_bits import write_quantised
from vtp.calib.quantize.layers import load_graph
from vtp.calib.quantize.quantizer import Wish
from vtp.engines import Engine, UsageError, open_graph
from vtp.export.cli import quiet_libraries
from vtp.export.exporter import Request, export
from vtp.runtime.bundle.folder import MANIFEST, Bundle, open_bundle
from vtp.runtime.commands.arguments import add_debug, add_threads, whole
from vtp.runtime.commands.console import Parser, Progress, run_command, table
from vtp.scenes import model_dir

ENCODER, ENGINE = "vision_encoder.onnx", "ort-cpu"
DRAWS = 10_000
TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "projection_dim": 768,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(
        prog="python -m vtp.bench.studies.quantized", description="The int8 encoder against float32."
    )
    add = parser.add_argument
    add("--rounds", type=whole, default=15, help="runs of each, in turn (default: %(default)s)")
    add("--pictures", type=whole, default=2, help="pictures to calibrate on (default: %(default)s)")
    add_threads(parser, type=whole)
    add("--layers", type=whole, default=24, help="layers of the tower (default: %(default)s)")
    add("--activations", default="auto", help="auto, uint8 or int8 (default: %(default)s)")
    add("--work", default="build/quantized", help="folder for the bundles (default: %(default)s)")
    add("--json", metavar="FILE", help="also write the figures to a file")
    add_debug(parser)
    args = parser.parse_args(argv)
    return run_command("quantized", lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> None:
    """Quantise one vision encoder and time it beside the float one, in turns."""
    if min(args.rounds, args.pictures, args.layers) < 1:
        raise UsageError("--rounds, --pictures and --layers are whole numbers of at least 1")
    quiet_libraries()
    progress, work = Progress(), Path(args.work)
    progress.step("export the float32 bundle")
    before = _float_bundle(work, args.layers)
    progress.step(f"quantise on {args.pictures} pictures")
    after, found = _int8_bundle(before, work / "int8", args)
    progress.step(f"{args.rounds} rounds of both, in turn")
    times = _times([before.path(ENCODER), after.path(ENCODER)], args.rounds, args.threads)
    progress.end()
    figures = {**found, **_figures(times, args.rounds), "threads": args.threads, "layers": args.layers}
    sizes = [before.path(f"{ENCODER}.data").stat().st_size, after.path(f"{ENCODER}.data").stat().st_size]
    rows = [
        [name, f"{1e3 * np.median(taken):.0f}", f"{size / 1e6:.0f}"]
        for name, taken, size in zip(("float32", "int8"), times, sizes, strict=True)
    ]
    print(table(["encoder", "ms (median)", "MB"], rows))
    low, high = figures["interval"]
    print(
        f"\nint8 is {figures['times_faster']:.2f} times faster ({low:.2f}-{high:.2f}, {args.rounds} rounds); "
        f"{found['quantised']} of {found['layers_in_all']} matrices, activations {found['activations']}"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


def _float_bundle(work: Path, layers: int) -> Bundle:
    """The float32 bundle of a tower with this many layers, exported unless an earlier run left it."""
    folder = work / f"float32-{layers}"
    if (folder / MANIFEST).exists():
        return open_bundle(folder)
    model = work / f"model-{layers}"
    save_model(model, layers)
    return export(Request(folder, str(model), "vispruner", "64", verify="none"))


def save_model(folder: Path, layers: int = 24) -> None:
    """A LLaVA with that tower, random, around the built-in model's small decoder and its tokenizer."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = json.loads((model_dir() / "config.json").read_text())
    config["vision_config"].update({**TOWER, "num_hidden_layers": layers})
    torch.manual_seed(0)
    LlavaForConditionalGeneration(LlavaConfig.from_dict(config)).save_pretrained(folder)
    for file in model_dir().iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)


def _int8_bundle(bundle: Bundle, folder: Path, args: argparse.Namespace) -> tuple[Bundle, dict[str, Any]]:
    """The quantised bundle, and how many matrices it has in int8."""
    wish = Wish("int8", "none", activations=args.activations)
    quantizer = write_quantised(bundle, folder, wish, args.pictures, args.threads)
    ours = [one for one in quantizer.judged if one.layer.file == ENCODER]
    nodes = [node.op_type for node in load_graph(folder / ENCODER).graph.node]
    return open_bundle(folder), {
        "quantised": sum(not one.left for one in ours),
        "layers_in_all": len(ours),
        "float_attentions": nodes.count("Attention"),
        "activations": quantizer.activations,
    }


def _times(paths: Sequence[Path], rounds: int, threads: int | None) -> list[list[float]]:
    """Seconds of every run of every graph, after one that is not counted."""
    engines = [open_graph(path, ENGINE, threads) for path in paths]
    pixels = np.random.default_rng(0).standard_normal((1, 3, 336, 336)).astype(np.float32)
    times: list[list[float]] = [[] for _ in engines]
    for number in range(rounds + 1):
        for engine, taken in zip(engines, times, strict=True):
            seconds = _one(engine, pixels)
            if number:
                taken.append(seconds)
    return times


def _one(engine: Engine, pixels: np.ndarray) -> float:
    value = engine.put(pixels)
    start = time.perf_counter()
    engine.run({"pixel_values": value})
    return time.perf_counter() - start


def _figures(times: Sequence[Sequence[float]], rounds: int) -> dict[str, Any]:
    before, after = (np.array(taken) for taken in times)
    draws = np.random.default_rng(0).integers(0, rounds, (DRAWS, rounds))
    ratios = np.median(before[draws], axis=1) / np.median(after[draws], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return {
        "times_faster": float(np.median(before) / np.median(after)),
        "interval": [float(low), float(high)],
        "rounds": rounds,
        "seconds": [before.tolist(), after.tolist()],
    }


if __name__ == "__main__":
    sys.exit(main())
