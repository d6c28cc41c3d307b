"""What a scheduler does and did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SchedulerStats:
    """A scheduler at one moment; all but the first four are totals since it was made.

    running, waiting      requests with a slot, and without one yet
    slots, queue          how many there may be of each
    requests              that are over; of them failed, cancelled, timed_out
    tokens, prompt_tokens generated, and of the prompts' text
    visual_tokens_before, visual_tokens_kept  of the pictures that were read
    steps, stepped_rows   decode steps, and the rows in all of them: their quotient is the mean batch
    copies, copied_bytes  rows of the cache that were moved or begun from another's
    stage_seconds         stage -> seconds: each stage up to the first token, "queue" and "step"
    """

    running: int
    waiting: int
    slots: int
    queue: int
    requests: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    visual_tokens_before: int = 0
    visual_tokens_kept: int = 0
    steps: int = 0
    stepped_rows: int = 0
    copies: int = 0
    copied_bytes: int = 0
    stage_seconds: dict[str, float] = field(default_factory=dict)
