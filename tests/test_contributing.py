"""What CONTRIBUTING.md shows to authors of pruners and families works as it stands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from vtp.export.families.base import Family
from vtp.export.families.llava import llava
from vtp.export.families.tiled.idefics3 import Idefics3
from vtp.export.graphs.decoder import Decoder
from vtp.export.graphs.encoder import Projector, VisionEncoder
from vtp.export.pruners import ops
from vtp.export.pruners.base import Pruner

from .export.pruners.compared import Case, lattice, run_module
from .oracles.numpy_pruners import Chosen, descending, gap

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TOLD: dict[str, Any] = {
    "Chosen": Chosen,
    "descending": descending,
    "gap": gap,
    "np": np,
    "ops": ops,
    "Pruner": Pruner,
    "Family": Family,
    "Idefics3": Idefics3,
    "Decoder": Decoder,
    "Projector": Projector,
    "VisionEncoder": VisionEncoder,
    "_ClipEmbeddings": llava._ClipEmbeddings,
}


def shown(start: str) -> str:
    """The guide's Python block that begins so."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    return next(block for block in blocks if block.startswith(start))


def carried_out(start: str) -> dict[str, Any]:
    names = dict(TOLD)
    exec(shown(start), names)
    return names


def test_the_pruner_and_its_loops_agree() -> None:
    method = carried_out("class Brightest")["Brightest"]
    loops = carried_out("def brightest")["brightest"]
    case = Case((5, 7), 11)
    for seed in range(5):
        cues = lattice(case, 2, seed)
        (found,) = run_module(method(case.grid, case.keep), cues)
        for row in range(2):
            given = {name: cue[row] for name, cue in cues.items()}
            kept, margin = loops(case.grid, case.keep, **given)
            assert found[row].tolist() == kept and margin > 0


def test_the_smallest_family_is_smolvlms_own_file() -> None:
    file = (ROOT / "export/families/tiled/smolvlm.py").read_text(encoding="utf-8")
    assert file.endswith(shown("class SmolVLM"))


def test_the_skeleton_of_a_family_is_whole(model_folder: Callable[[str], Path]) -> None:
    """On a tiny LLaVA, whose parts bear the skeleton's names, it gives what LLaVA's own family gives."""
    mine = carried_out("class Mine(Family)")["FAMILY"]
    assert not inspect.isabstract(mine) and mine.architectures
    model = LlavaForConditionalGeneration.from_pretrained(model_folder("gqa")).eval()
    mine.check(model.config.to_dict())
    one, other = mine(model), llava.Llava(model)
    for fact in ("grid", "image_size", "feature_width", "image_token_id", "tower"):
        assert getattr(one, fact) == getattr(other, fact), fact
    pixels = torch.randn(1, 3, *one.image_size)
    with torch.no_grad():
        (features,), (wanted,) = (family.vision_encoder(())(pixels) for family in (one, other))
        torch.testing.assert_close(features, wanted, rtol=0, atol=0)
        embeds = one.projector(True)(features)
        torch.testing.assert_close(embeds, other.projector(True)(features), rtol=0, atol=0)
    assert type(one.decoder) is type(other.decoder)


def test_the_command_for_ones_own_tests_is_the_assertions_too() -> None:
    from .export.pruners import test_pruners

    assert "-m pytest tests/export/pruners/test_pruners.py -k brightest" in GUIDE
    source = inspect.getsource(test_pruners.test_every_method_has_a_numpy_reference)
    for file in ("numpy_pruners_more.py", "numpy_merging.py", "numpy_text.py"):
        assert file in source and (ROOT / "tests/oracles" / file).is_file()
