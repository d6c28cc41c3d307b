"""Checkpoints and the log of a training run, in one folder outside the package."""

import time
from pathlib import Path
from typing import Any

import torch


class Run:
    """A run folder: `state.pt` (swapped in whole) and `training.log`, whose clock goes on after a resume."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.started = folder, time.monotonic()

    @property
    def minutes(self) -> float:
        """Minutes trained so far."""
        return (time.monotonic() - self.started) / 60

    def log(self, text: str) -> None:
        """Print a line and append it to the log, with the minutes so far."""
        line = f"{self.minutes:6.1f} min  {text}"
        print(line, flush=True)
        with (self.folder / "training.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def save(self, state: dict[str, Any], name: str = "state.pt") -> None:
        """Save `state` (tensors, numbers and strings only) and the clock."""
        aside = self.folder / f"{name}.part"
        torch.save({**state, "minutes": self.minutes}, aside)
        aside.replace(self.folder / name)

    def load(self, name: str = "state.pt") -> dict[str, Any] | None:
        """The saved state, or None when there is none yet; sets the clock back to it."""
        path = self.folder / name
        if not path.is_file():
            return None
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.started = time.monotonic() - 60 * state["minutes"]
        return state
