"""From a family and a method to graphs and an ordered list of stages: what a bundle will hold."""

from __future__ import annotations

from dataclasses import dataclass

from vtp.export.onnx.emit import GraphSpec
from vtp.export.plan.bundle_layout import BundleLayout
from vtp.export.plan.image import image_stages
from vtp.export.plan.prompt import caches, prompt_stages, states
from vtp.export.plan.step import step_stages
from vtp.runtime.bundle.caches import KvInfo, StateTensors
from vtp.runtime.bundle.manifest import StageInfo


@dataclass(frozen=True)
class Plan:
    """Graphs to emit (in the order in which weights are laid down), stages in order; caches, and the states
    beside them, by graph name."""

    graphs: list[GraphSpec]
    stages: list[StageInfo]
    caches: dict[str, KvInfo]
    states: dict[str, list[StateTensors]]


def make_plan(layout: BundleLayout) -> Plan:
    """Lay out a bundle."""
    items = [*image_stages(layout), *prompt_stages(layout), *step_stages(layout)]
    return Plan(
        graphs=[item for item in items if isinstance(item, GraphSpec)],
        stages=[item for item in items if isinstance(item, StageInfo)],
        caches=caches(layout),
        states=states(layout),
    )
