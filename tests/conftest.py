"""What tests share: tiny random models on disk and the bundles exported from them, each made once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vtp.engines  # noqa: F401  (turns ONNX Runtime's telemetry off before any test imports it)

MAX_LENGTH = 128

# Tiny models by name: options of tests/models/tiny.py's `save_tiny`. Every one has 16 visual tokens.
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {"layers": 3},
    "mha": {"layers": 2, "heads": 2, "kv_heads": 2, "vision_layers": 2, "seed": 1},
    "qwen2": {"layers": 2, "decoder": "qwen2", "vision_layers": 2, "seed": 2},
    "mistral": {"layers": 2, "decoder": "mistral", "vision_layers": 2, "seed": 3},
    "tied": {"layers": 3, "tied": True, "vision_layers": 2, "seed": 4},
    "siglip": {"layers": 2, "vision": "siglip", "seed": 5},
    "four": {"layers": 4, "vision_layers": 2, "seed": 6},
}

# Bundles by name: the model, and fields of vtp.export.exporter's Request.
BUNDLES: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("gqa", {"method": "none"}),
    "vispruner": ("gqa", {"method": "vispruner", "keep_tokens": "3,6"}),
    "original": (
        "gqa",
        {"method": "vispruner", "keep_tokens": "3,6", "method_options": ["positions=original"]},
    ),
    "adaptprune": ("gqa", {"method": "adaptprune", "keep_tokens": "4,7"}),
    "fastv": ("gqa", {"method": "fastv", "keep_tokens": "5"}),
    "float16": ("gqa", {"method": "vispruner", "keep_tokens": "6", "dtype": "float16"}),
    "jetpack6": ("gqa", {"method": "adaptprune", "keep_tokens": "5", "target": "jetpack6"}),
    "mha": ("mha", {"method": "none"}),
    "qwen2": ("qwen2", {"method": "none"}),
    "mistral": ("mistral", {"method": "none"}),
    "tied": ("tied", {"method": "adaptprune", "keep_tokens": "16"}),
    "siglip": ("siglip", {"method": "vispruner", "keep_tokens": "5"}),
}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache of this run: tests leave nothing in the real one."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


# The long tail: cases of seconds to minutes whose kind another case of the default tier holds as well. They
# are marked slow here, in one place, and `make test-all` runs them.
LONG_TAIL = re.compile(
    "|".join(
        (
            r"test_anyres.*test_pruned_equals_the_torch_reference\[(next-fastv|onevision-vispruner)\]",
            r"test_split.*test_pruned_equals_the_torch_reference\[idefics3-fastv\]",
            r"test_qwen.*test_pruned_equals_the_torch_reference\[(2|3)-fastv\]",
            r"test_sites.*test_generation_is_verified_at_every_keep_count\[(BlurringLate|CuriousProjector)\]",
            r"test_pipeline.*test_repeats_itself_whatever_ran_before\[(fastv|original)\]",
            r"test_graph_check.*test_what_the_exporter_writes_is_taken\[(float16|jetpack6)\]",
            r"test_target.*test_a_right_padded_batch_equals_target_ort\[jetpack6\]",
            r"test_target.*test_jetpack6_writes_what_tensorrt_10_3_takes\[none\]",
            r"test_fidelity.*test_pruned_equals_the_reference_for_64_steps\[siglip-5\]",
            r"test_families.*test_a_family_is_quantised\[internvl-divprune-5-jetpack6\]",
        )
    )
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the long tail, before pytest picks tests by their marks."""
    for item in items:
        if LONG_TAIL.search(item.nodeid):
            item.add_marker(pytest.mark.slow)


@dataclass(frozen=True)
class Made:
    """A bundle on disk and the model folder that it was exported from."""

    folder: Path
    model: Path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by name; written at the first call. Read only: copy it before changing it."""
    from .models.tiny import save_tiny

    root, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def get(name: str) -> Path:
        if name not in made:
            save_tiny(root / name, **MODELS[name])
            made[name] = root / name
        return made[name]

    return get


@pytest.fixture(scope="session")
def exported(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]
) -> Callable[[str], Made]:
    """A bundle by name; exported at the first call. Read only: copy it before changing it."""
    from vtp.export.exporter import Request, export

    root, made = tmp_path_factory.mktemp("bundles"), dict[str, Made]()

    def get(name: str) -> Made:
        if name not in made:
            model, wishes = BUNDLES[name]
            source = model_folder(model)
            request = Request(root / name, model=str(source), max_length=MAX_LENGTH, verify="none", **wishes)
            made[name] = Made(export(request).folder, source)
        return made[name]

    return get


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """A picture of noise, larger than the models' input and not square."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory: pytest.TempPathFactory, picture: Image.Image) -> Path:
    """The same picture as a PNG file."""
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    picture.save(path)
    return path
