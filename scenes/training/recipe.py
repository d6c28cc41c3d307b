"""What is trained: the two built-in models, their forms and curricula."""

from dataclasses import dataclass

from vtp.scenes.generator.pictures import KINDS, READER_KINDS
from vtp.scenes.training.folder import SHIPPED, Form


@dataclass(frozen=True)
class TowerStage:
    """One step of the tower's curriculum; it ends at `goal` or after `steps`.

    `goal` bounds the accuracies on patches of things, and of characters and their slots. With `windows`,
    a picture smaller than the tower's grid stands somewhere in it and takes the position embeddings found
    there; without, it takes all of them, interpolated.
    """

    name: str
    sizes: tuple[int, ...]
    objects: tuple[int, int]
    batch: int
    rate: float
    goal: float
    steps: int
    signs: tuple[int, int] = (0, 0)
    windows: bool = False

    def batch_of(self, size: int) -> int:
        """Pictures of that size in a batch: with windows, as many patches whatever their size."""
        return max(1, round(self.batch * (168 / size) ** 2)) if self.windows else self.batch


@dataclass(frozen=True)
class Stage:
    """One step of the decoder's curriculum: it ends at `goal` or after `steps`.

    `goal` bounds the mean accuracy over all kinds. `batch` is the number of pictures of 336 pixels; smaller
    ones come in larger batches. A `loose` stage crowds small pictures, and squeezes the places of the visual
    tokens in half of its batches, so that the model reads pictures by content and not by place. `fresh` is
    the share of `batch` that is encoded anew for each step.
    """

    name: str
    sizes: tuple[int, ...]
    objects: tuple[int, int]
    style: str
    batch: int
    rate: float
    goal: float
    steps: int
    loose: bool = False
    fresh: float = 0.5


@dataclass(frozen=True)
class Recipe:
    """One built-in model; a `grown` one starts from the first model.

    `name` is its folder in scenes/, `run` that of its checkpoints in build/, `every` the steps of a log line.
    """

    name: str
    run: str
    form: Form
    kinds: tuple[str, ...]
    tower: tuple[TowerStage, ...]
    decoder: tuple[Stage, ...]
    grown: bool = False
    every: int = 100


FIRST = Recipe(
    "model",
    "scenes",
    SHIPPED,
    KINDS,
    (
        TowerStage("tower-168", (168,), (1, 3), 48, 1e-3, 0.93, 1800),
        TowerStage("tower-mix", (336, 168, 336, 224, 336, 280), (3, 6), 24, 1e-3, 2.0, 600),
    ),
    (
        Stage("bare-168", (168,), (1, 4), "bare", 16, 2e-3, 0.92, 2500),
        Stage("full-168", (168,), (1, 6), "full", 16, 1.5e-3, 0.88, 1500),
        Stage("full-252", (252, 168), (2, 6), "full", 12, 1.5e-3, 0.88, 1200),
        Stage("chat", (336, 168, 280, 224, 336, 140, 252, 308), (3, 6), "chat", 12, 1.5e-3, 1.0, 300),
        Stage("loose", (336, 168, 336, 224, 336, 112, 336, 280), (2, 6), "chat", 12, 1.5e-3, 2.0, 900, True),
    ),
)

READER = Recipe(
    "reader",
    "reader",
    Form(tower_layers=13, tower_mlp=176, decoder_mlp=176, reads=True),
    READER_KINDS,
    (
        TowerStage("signs-168", (168,), (3, 6), 32, 1e-3, 0.95, 1400, (6, 10), windows=True),
        TowerStage("signs-mix", (168, 336, 168), (3, 6), 32, 1e-3, 2.0, 600, (2, 14), windows=True),
    ),
    (
        Stage("signs-168", (168,), (1, 4), "full", 16, 1e-3, 0.92, 600),
        Stage(
            "loose", (336, 168, 336, 224, 336, 112, 336, 280), (2, 6), "chat", 12, 1e-3, 2.0, 700, True, 0.25
        ),
    ),
    grown=True,
    every=50,
)

RECIPES = {recipe.name: recipe for recipe in (FIRST, READER)}
