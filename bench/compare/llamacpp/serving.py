"""A llama-server for several clients at once, on the model that a bundle was exported from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vtp.bench.compare.llamacpp.built import binary
from vtp.bench.compare.llamacpp.convert import TEXT, VISION, text_file, vision_file
from vtp.bench.compare.llamacpp.server import LlamaServer
from vtp.engines import UsageError
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.preprocess.idefics3 import Idefics3Spec

# Of every request: nothing is kept of an earlier one, and no end of sequence ends it early.
OPTIONS = {"cache_prompt": False, "ignore_eos": True, "temperature": 0.0, "top_k": 1}


def read_bits(text: str) -> tuple[str, str]:
    """`VISION,TEXT`, such as q8_0,q4_0. Raises UsageError for what llama.cpp's files are not made in."""
    vision, _, decoder = text.partition(",")
    if vision not in VISION or decoder not in TEXT:
        raise UsageError(
            f"--bits '{text}' is not VISION,TEXT; VISION is one of {', '.join(VISION)}, "
            f"TEXT one of {', '.join(TEXT)}"
        )
    return vision, decoder


@contextmanager
def llama_server(
    model: str, bits: tuple[str, str], threads: int | None, slots: int, manifest: Manifest
) -> Iterator[int]:
    """The port of a server on `model` (in Hugging Face layout) in `bits`, until the block is left.

    slots     requests that decode together, as vtp-serve's --slots
    manifest  of the bundle beside it: how long a prompt and its answer may be, for the server's cache has as
              many places for each slot, and how large a picture is before it is cut into tiles
    """
    binary("llama-server")  # before anything is converted
    with tempfile.TemporaryDirectory(prefix="vtp-gguf-") as name:
        folder = Path(name)
        text, vision = text_file(model, folder, bits[1]), vision_file(model, folder, bits[0], _edge(manifest))
        cache = ("--ctx-size", str(slots * manifest.model.max_length))
        count = threads or os.cpu_count() or 1
        with LlamaServer(text, vision, count, folder / "server.log", slots, cache) as server:
            yield server.port


def _edge(manifest: Manifest) -> int | None:
    """The longest edge of a picture before it is cut; None for kinds that llama.cpp does not cut."""
    image = manifest.image
    if not isinstance(image, Idefics3Spec):
        return None
    return image.longest_edge if image.do_image_splitting else image.height
