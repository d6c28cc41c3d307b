"""From a family and a method to graphs and an ordered list of stages: what a bundle will hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vtp.export.families.base import Family
from vtp.export.onnx.emit import GraphSpec
from vtp.export.plan.bundle_layout import BundleLayout
from vtp.export.plan.image import image_stages
from vtp.export.plan.prompt import caches, prompt_stages
from vtp.export.plan.schedule import Chain
from vtp.export.plan.step import step_stages
from vtp.runtime.bundle.manifest import KvInfo, StageInfo


@dataclass(frozen=True)
class Plan:
    """Graphs to emit (in the order in which weights are laid down), stages in order, caches by graph name."""

    graphs: list[GraphSpec]
    stages: list[StageInfo]
    caches: dict[str, KvInfo]


def make_plan(
    family: Family, chains: Sequence[Chain], positions: str, dtype: torch.dtype, max_length: int
) -> Plan:
    """Lay out a bundle. `chains` holds one chain per keep-count of one method, or is empty for `none`."""
    layout = BundleLayout(family, chains, positions, dtype, max_length)
    items = [*image_stages(layout), *prompt_stages(layout), *step_stages(layout)]
    return Plan(
        graphs=[item for item in items if isinstance(item, GraphSpec)],
        stages=[item for item in items if isinstance(item, StageInfo)],
        caches=caches(layout),
    )
