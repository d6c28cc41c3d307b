"""What the layout does not serve, each refused in one line that says what works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vtp.engines import UsageError, VtpError
from vtp.export.checkpoint import loading as checkpoint
from vtp.export.keep_counts import parse_keep
from vtp.export.layouts.transformers_js.clients import CLIENTS, UNSERVED
from vtp.export.pruners import Site, find_method, method_names
from vtp.export.pruners.base import Pruner
from vtp.export.request import VERIFY, Choice, Job, Request
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.bundle.stream_info import REUSES
from vtp.runtime.preprocess import ImageSpec
from vtp.runtime.preprocess.clip import ClipSpec
from vtp.runtime.preprocess.idefics3 import Idefics3Spec

NAME = "transformers.js"


def check_request(request: Request) -> None:
    """Raise UsageError for what can be refused before a model is loaded, VtpError for a family."""
    _check_target(request.target)
    if request.frames is not None:
        raise UsageError(f"layout {NAME} is for pictures, not videos: leave out --frames")
    _check_choice(request.choice)
    _check_then(request.then)
    _check_restore(request.restore)
    _check_tower(request.reduction is not None and request.reduction.name == REUSES)
    keeps = [] if request.keep_tokens is None else parse_keep(request.keep_tokens)
    _check_keeps(keeps)
    _check_family(checkpoint.check(checkpoint.resolve(request.model)).name)


def check_verify(verify: str) -> None:
    """Raise UsageError for a mode of verification that does not exist."""
    if verify not in VERIFY:
        raise UsageError(f"unknown verify '{verify}'; choose one of {', '.join(VERIFY)}")


def settle(job: Job) -> Job:
    """The job with methods that compute in float32: browsers' ONNX Runtime has nothing wider.

    Raises UsageError or VtpError for what the loaded model shows.
    """
    _check_image(job.model.image)
    if job.positions == "original":
        raise UsageError(_positions_message(f"family {job.model.family.name}"))
    return replace(job, target=replace(job.target, float64=False))


def check_manifest(manifest: Manifest, folder: Path) -> None:
    """The same of a bundle that exists. Raises UsageError, naming the bundle."""
    _check_target(manifest.target)
    _check_family(manifest.model.family)
    if manifest.image.frames is not None:
        raise UsageError(f"layout {NAME} is for pictures, and the bundle {folder} is for videos")
    method = manifest.method
    if method.site.startswith("decoder"):
        raise UsageError(_decoder_message(method.name, method.site))
    _check_then(None if method.then is None else method.then.name)
    if any(stage.when != "image" for stage in manifest.stages_of("pruner")):
        raise UsageError(_text_message(method.name))
    _check_restore(method.restore)
    _check_tower(manifest.stream is not None)
    if any(graph.cache_of for graph in manifest.graphs.values()):
        raise UsageError(
            f"layout {NAME} has one decoder graph, and the bundle {folder} has two (--prompt int8); give one "
            "that vtp-calib quantize made without"
        )
    if method.positions == "original":
        raise UsageError(_positions_message(f"the bundle {folder}"))
    _check_keeps(manifest.visual.keep)
    _check_image(manifest.image)


def _check_restore(restore: bool) -> None:
    if restore:
        raise UsageError(
            f"layout {NAME} has no place for --restore: its library's cache and decoder inputs are fixed; "
            "export without it"
        )


def _check_tower(reuses: bool) -> None:
    if reuses:
        raise UsageError(
            f"layout {NAME} computes every picture whole, and --tower {REUSES} is for pictures of a camera "
            "that follow one another; export without it"
        )


def _check_then(name: str | None) -> None:
    if name is not None:
        raise UsageError(
            f"layout {NAME} runs the decoder as one graph, and --then {name} drops tokens inside it; export "
            "without it"
        )


def served_methods() -> list[str]:
    """Names of the methods whose choice depends on the picture alone."""
    return [name for name in method_names()[1:] if _serves(find_method(name))]


def _serves(method: type[Pruner]) -> bool:
    compares = method.reads_frames or "picture" in method.needs
    return not (Site.parse(method.site).in_decoder or _reads_text(method) or compares)


def _reads_text(method: type[Pruner]) -> bool:
    return any(cue.startswith("text_") for cue in method.needs)


def _check_target(target: str) -> None:
    if target != "ort":
        raise UsageError(f"layout {NAME} runs on ONNX Runtime: leave out --target {target}, or give ort")


def _check_choice(choice: Choice) -> None:
    method = choice.method
    if method is None:
        return
    if Site.parse(method.site).in_decoder:
        raise UsageError(f"{_decoder_message(method.name, method.site)}; for example --method vispruner")
    if _reads_text(method):
        raise UsageError(_text_message(method.name))
    if choice.positions == "original":
        raise UsageError(_positions_message(f"method {method.name}"))


def _check_keeps(keeps: list[int]) -> None:
    if len(keeps) > 1:
        raise UsageError(
            f"keep-tokens {','.join(map(str, keeps))} are {len(keeps)} keep-counts, and a folder of layout "
            f"{NAME} holds one; choose one of them"
        )


def _check_family(name: str) -> None:
    if name not in CLIENTS:
        why = UNSERVED.get(name, "it was not tried")
        raise VtpError(
            f"layout {NAME} does not serve family {name}: {why}; families that it serves: "
            f"{', '.join(CLIENTS)}"
        )


def _check_image(image: ImageSpec) -> None:
    if isinstance(image, Idefics3Spec) and image.views > 1:
        raise UsageError(
            f"this bundle cuts a picture into {image.views} tiles with K tokens for all of them, and {NAME} "
            f"writes equally many for each; export one tile: --image-size {image.width}x{image.height}"
        )
    if isinstance(image, ClipSpec) and image.do_pad:
        raise VtpError(
            f"this model's image processor pads pictures to a square first (do_pad), which {NAME} does not; "
            "set do_pad to false and give it square pictures"
        )


def _decoder_message(method: str, site: str) -> str:
    return (
        f"method {method} drops tokens inside the decoder ({site}), and {NAME} runs the decoder as one "
        f"graph; methods that work: {', '.join(served_methods())}"
    )


def _text_message(method: str) -> str:
    return (
        f"method {method} reads the question, which {NAME} does not give to the vision encoder; methods that "
        f"work: {', '.join(served_methods())}"
    )


def _positions_message(what: str) -> str:
    return (
        f"{what} keeps the original positions, and {NAME} numbers the tokens that are there; use "
        "--method-option positions=compact"
    )
