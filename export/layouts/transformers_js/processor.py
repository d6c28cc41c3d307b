"""preprocessor_config.json and processor_config.json: how pictures become pixels, and K."""

from __future__ import annotations

from typing import Any

from vtp.export.layouts.transformers_js.clients import Client
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.preprocess import ImageSpec
from vtp.runtime.preprocess.clip import ClipSpec
from vtp.runtime.preprocess.idefics3 import Idefics3Spec


def preprocessor_config(manifest: Manifest, client: Client) -> dict[str, Any]:
    """The image processor's settings; PaliGemma's processor reads K here."""
    image = manifest.image
    size = _tile(image) if isinstance(image, Idefics3Spec) else _clip(image)
    return {
        "image_processor_type": client.image_processor,
        "processor_class": client.processor,
        "do_convert_rgb": image.do_convert_rgb,
        "do_rescale": image.do_rescale,
        "rescale_factor": image.rescale_factor,
        "do_normalize": image.do_normalize,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "resample": image.resample,
        "do_resize": image.do_resize,
        **size,
        "image_seq_length": manifest.visual.keep[0],
    }


def processor_config(manifest: Manifest, client: Client) -> dict[str, Any]:
    """The processor's settings, K among them under the name that it has for the family.

    LLaVA's processor counts floor(H / patch_size) · floor(W / patch_size) + num_additional_image_tokens.
    """
    keep = manifest.visual.keep[0]
    height, width = manifest.image.fixed_size
    patch = max(height, width)
    counted = (height // patch) * (width // patch)
    return {
        "processor_class": client.processor,
        "image_token": manifest.text.image_token,
        "patch_size": patch,
        "num_additional_image_tokens": keep - counted,
        "image_seq_len": keep,
        "image_seq_length": keep,
    }


def _clip(image: ImageSpec) -> dict[str, Any]:
    assert isinstance(image, ClipSpec)  # see `served.check_manifest`
    size = {"shortest_edge": image.shortest_edge, "height": image.height, "width": image.width}
    crop = {"height": image.crop_height, "width": image.crop_width}
    return {
        "size": {name: edge for name, edge in size.items() if edge is not None},
        "do_center_crop": image.do_center_crop,
        **({"crop_size": crop} if image.do_center_crop else {}),
    }


def _tile(image: Idefics3Spec) -> dict[str, Any]:
    """One tile, to which a picture is resized at once: the client's second resizing would blur it."""
    return {
        "size": {"height": image.height, "width": image.width},
        "max_image_size": {"longest_edge": image.height},
        "do_image_splitting": False,
    }
