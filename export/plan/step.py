"""What runs once a token: the same graphs as for a prompt, without the pruners."""

from __future__ import annotations

from collections.abc import Iterator

from vtp.export.plan.bundle_layout import BundleLayout, reads_rows
from vtp.export.plan.names import part_name, part_role, part_source, stage
from vtp.runtime.bundle.manifest import StageInfo


def step_stages(layout: BundleLayout) -> Iterator[StageInfo]:
    """Stages: embed_tokens -> decoder, or all its parts in turn."""
    yield stage("embed_tokens", "step", ["input_ids"], layout.embeds, role="embed")
    hidden, cuts = "inputs_embeds", layout.cuts
    for number in range(len(layout.parts)):
        last, gives = number == len(cuts), "hidden_states" + layout.tail(number)
        reads = {part_source(number, cuts): hidden, "position_ids": "position_ids"}
        if not last and reads_rows(layout.cut_needs):
            # Nobody reads the cues of a step: any indices will do, and these are at hand.
            reads["text_rows"] = "input_ids"
        if layout.has_lookahead:
            reads["ahead"] = "input_ids"  # a single token is the row's end, and sees no further
        if layout.restore:
            reads["key_bias"] = "key_bias"
        outputs = {"logits": "logits"} if last else {"hidden_states": gives}
        yield stage(part_name(number, cuts), "step", reads, outputs, role=part_role(number, cuts))
        hidden = gives
