"""What methods may read of a vision tower: cues by name, and the block that each is taken from."""

from __future__ import annotations

from collections.abc import Iterable

# Attention to every patch, float32 [B,N], mean over heads. The CLS query's row, or the mean over all queries
# where there is no CLS; "received": the mean over all queries, CLS among them, in every tower.
SCORES = ("attention_scores", "received_scores", "middle_received", "early_scores")
# Keys [B,N,C], heads side by side.
KEYS = "vision_keys"
TOWER_CUES = (*SCORES, KEYS)

_RECEIVED = ("received_scores", "middle_received")
# Cues of earlier blocks: of how many eighths of the blocks come before theirs.
_EIGHTHS = {"early_scores": 2, "middle_received": 3}


def block_of(cue: str, blocks: int) -> int:
    """The number of the block, from 0, that `cue` is read in where the features need `blocks` blocks.

    Block 5 or 8 of LLaVA-1.5's 23, else the last one, which makes the features.
    """
    return _EIGHTHS[cue] * blocks // 8 if cue in _EIGHTHS else blocks - 1


def by_block(cues: Iterable[str], blocks: int) -> dict[int, tuple[str, ...]]:
    """Numbers of the blocks that are read, each with its cues."""
    wanted: dict[int, tuple[str, ...]] = {}
    for cue in cues:
        number = block_of(cue, blocks)
        wanted[number] = (*wanted.get(number, ()), cue)
    return wanted


def reads_cls(cue: str, has_cls: bool) -> bool:
    """Whether a cue of scores is the CLS query's row."""
    return has_cls and cue not in _RECEIVED


def of_whole_tower(cues: Iterable[str]) -> list[str]:
    """Those of `cues` that a tower with fewer rows in its blocks does not give."""
    return [cue for cue in cues if cue in _EIGHTHS or cue in _RECEIVED]
