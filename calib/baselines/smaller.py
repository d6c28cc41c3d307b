"""A smaller picture as a baseline: nothing pruned, and as many visual tokens as a method keeps.

The baseline that VTC-Bench (arXiv 2510.07143) demands. A bundle cannot be asked it as it is, for its tower's
positions are part of a graph, so another bundle of the same model is exported, once, by vtp-export in a
process of its own (which needs torch): with `--tower downsample:SIZE` where the tower takes square pictures
of one size, with `--image-size` where it takes any.
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from vtp.engines import UsageError, VtpError
from vtp.engines.child import python_command
from vtp.engines.errors import shown
from vtp.runtime.bundle.folder import MANIFEST, open_bundle
from vtp.runtime.bundle.manifest import Manifest

DOWNSAMPLE = "downsample"
_OWN = "model"  # what bundles call the built-in model, which vtp-export takes without --model
_ANY_SIZE = ("qwen", "pixtral", "naflex")  # kinds of preprocessing that give a picture any whole grid
_SAME = (
    "do_resize",
    "do_pad",
    "do_center_crop",
    "resample",
    "mean",
    "std",
    "fit",
)  # of both bundles' pictures
_FAR = 0.25  # most by which the tokens may differ from those that a method keeps, as a share of these


@dataclasses.dataclass(frozen=True)
class SmallerPicture:
    """Makes the bundles of smaller pictures of one model.

    model     as vtp-export takes it; None: the built-in one
    out       folder that gets a folder for each of them, which a later run takes again
    progress  called with what is done
    """

    model: str | None
    out: Path
    progress: Callable[[str], None]

    def check(self, manifest: Manifest) -> None:
        """Raise UsageError, before a question is asked, where there can be none."""
        if self.model is None and manifest.model.name != _OWN:
            raise UsageError(
                f"--against downsample exports the model once more, for a smaller picture: give --model with "
                f"the folder or hub name of what this bundle was made from ({shown(manifest.model.name)})"
            )
        if find_spec("torch") is None:
            raise UsageError(
                "--against downsample exports a bundle, and torch is not installed: pip install "
                "'vtp-edge[export]', or give a bundle that was exported elsewhere, --against BUNDLE"
            )
        _wishes(manifest, 1)

    def bundle(self, manifest: Manifest, keep: int) -> Path:
        """The folder of a bundle whose picture has about `keep` tokens: an earlier run's, or a new one.

        Raises UsageError or VtpError, in one line, where the export does, and for another model than the
        bundle's own.
        """
        wishes = _wishes(manifest, keep)
        size = wishes[1].rpartition(":")[2]
        folder = self.out / f"{DOWNSAMPLE}-{size}-{manifest.target}-{manifest.dtype}"
        if not (folder / MANIFEST).exists():
            self.progress(f"export a smaller picture: {' '.join(wishes)}")
            _export([*self._model(), *wishes, *_alike(manifest), "-o", str(folder)])
        self._check_made(folder, manifest, keep)
        return folder

    def _model(self) -> list[str]:
        return [] if self.model is None else ["--model", self.model]

    def _check_made(self, folder: Path, own: Manifest, keep: int) -> None:
        """Refuse a bundle of other weights or other pictures, which would say nothing of the method."""
        made = open_bundle(folder).manifest
        if _embedding(made) != _embedding(own) and not own.quantization:
            given = "the built-in model" if self.model is None else f"--model {shown(self.model)}"
            raise UsageError(
                f"{given} is not what this bundle was made from ({shown(own.model.name)}): their embeddings "
                f"differ; give the bundle's own model, and remove {shown(folder)}"
            )
        if any(getattr(made.image, name, None) != getattr(own.image, name, None) for name in _SAME):
            raise VtpError(
                f"{shown(folder)} cuts pictures otherwise than the bundle; export a smaller picture by hand "
                "and give that as --against"
            )
        if abs(made.visual.count - keep) > max(_FAR * keep, math.isqrt(keep) + 1):
            raise UsageError(
                f"the smaller picture of this model that is nearest to {keep} tokens has "
                f"{made.visual.count}; leave out --against downsample"
            )


def nearest_side(keep: int, whole: int) -> int:
    """The side below `whole` of the square of patches that is nearest to K; of two, the smaller one."""
    return min(range(1, whole), key=lambda side: (abs(side**2 - keep), side))


def _wishes(manifest: Manifest, keep: int) -> list[str]:
    """The flag of vtp-export that makes the picture smaller, and its value. Raises UsageError."""
    (rows, columns), kind = manifest.visual.grid, manifest.image.kind
    if manifest.image.frames is not None:
        raise UsageError("--against downsample is for pictures, and this bundle answers about videos")
    height, width = manifest.image.fixed_size
    if kind == "clip" and rows == columns and height == width and height % rows == 0 and rows > 1:
        return ["--tower", f"{DOWNSAMPLE}:{nearest_side(keep, rows) * height // rows}"]
    if kind in _ANY_SIZE and height % rows == 0 and width % columns == 0 and rows * columns > 1:
        share = math.sqrt(keep / manifest.visual.count)
        high, wide = (max(1, round(edge * share)) for edge in (rows, columns))
        return ["--image-size", f"{wide * width // columns}x{high * height // rows}"]
    raise UsageError(
        f"--against downsample does not serve family {manifest.model.family}, whose pictures do not come in "
        "every size; export one yourself (vtp-export --method none, a smaller --image-size) and give that "
        "bundle as --against"
    )


def _alike(manifest: Manifest) -> list[str]:
    """Flags that make another bundle of the model take pictures and compute as this one does."""
    image = manifest.image
    flags = ["--method", "none", "--target", manifest.target, "--dtype", manifest.dtype]
    if image.kind != "clip":
        return [*flags, "--image-fit", str(getattr(image, "fit", "letterbox"))]
    crop, pad = getattr(image, "do_center_crop", True), getattr(image, "do_pad", False)
    return [*flags, "--image-fit", "crop" if crop else "letterbox" if pad else "stretch"]


def _embedding(manifest: Manifest) -> list[str]:
    """Hashes of the embedding's weights, which tell a model from another one of the same shape."""
    files = [stage.file for stage in manifest.stages_of("embed")]
    return [
        info.sha256 for name, info in manifest.files.items() if name in {f"{file}.data" for file in files}
    ]


def _export(arguments: list[str]) -> None:
    """vtp-export in a process of its own; raises with its last line where it fails."""
    command = python_command("vtp.export.cli", *arguments)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        kind = UsageError if done.returncode == 2 else VtpError
        raise kind(f"--against downsample: {lines[-1]}")
