"""Two small bundles that a mixture would not betray by its shapes."""

from __future__ import annotations

from pathlib import Path


def make_bundles(root: Path) -> tuple[Path, Path]:
    """Two bundles of tiny models that differ in their weights alone: any mixture would open and answer."""
    from vtp.export.exporter import Request, export

    from ..models.tiny import save_tiny  # torch: only where no bundles are given

    made = []
    for seed in (0, 1):
        save_tiny(root / f"model-{seed}", layers=2, vision_layers=2, seed=seed)
        request = Request(
            root / f"bundle-{seed}",
            model=str(root / f"model-{seed}"),
            method="vispruner",
            keep_tokens="3,6",
            max_length=128,
            verify="none",
        )
        made.append(export(request).folder)
    return made[0], made[1]
