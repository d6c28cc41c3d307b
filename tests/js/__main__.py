"""make test-js: folders of layout transformers.js, in the unmodified client: tokens are the pipeline's.

    python -m tests.js NODE_FOLDER [NAME...]

NODE_FOLDER holds node_modules/@huggingface/transformers. The built-in model is asked held-out questions of
the exam, tiny random models of every family that the layout serves are asked about noise of the size that
they look at (for other sizes the client's own resizing decides, which is not Pillow's).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import vtp.calib.cli
from vtp import Pipeline
from vtp.export.exporter import Request, export
from vtp.export.layouts.transformers_js.folder import export_folder, lay_out
from vtp.scenes.exam import held_out

from ..models.tiny import save_tiny
from ..models.tiny_gemma import save_gemma, tiny_gemma3, tiny_paligemma
from ..models.tiny_split import save_idefics3

HERE = Path(__file__).parent
BUILTIN_QUESTIONS, TINY_QUESTIONS = 40, 20
PROMPTS = ("what color is the star ?", "how many circle ?", "Describe the picture.", "where is it, and why ?")
IMAGES_FIRST, TEXT_FIRST, PLAIN = "image, text", "text, images", "plain"


@dataclass(frozen=True)
class Case:
    """A model, how its bundle is made, the edge of its pictures, and how its processor is called.

    Without `save` it is the built-in model. `exported`: the folder is an export of its own, as a user makes
    it; else it is laid out of the bundle that answers are compared with. `quantized`: that bundle is what
    vtp-calib makes of the one that is exported.
    """

    order: str
    edge: int
    wishes: dict[str, Any]
    save: Callable[[Path], Any] | None = None
    most: int = 12
    suffixes: set[str] = field(default_factory=lambda: {""})
    exported: bool = False
    quantized: bool = False


def _tiny(order: str, edge: int, save: Callable[[Path], Any], **wishes: Any) -> Case:
    return Case(order, edge, {"max_length": 128, "verify": "none", **wishes}, save)


CASES = {
    "builtin-vispruner": Case(IMAGES_FIRST, 336, {"method": "vispruner", "keep_tokens": "64"}, exported=True),
    "builtin-divprune": Case(
        IMAGES_FIRST, 336, {"method": "divprune", "keep_tokens": "57", "verify": "none"}
    ),
    "builtin-fp16": Case(
        IMAGES_FIRST,
        336,
        {"method": "vispruner", "keep_tokens": "64", "dtype": "float16", "verify": "none"},
        suffixes={"_fp16"},
    ),
    "builtin-small": Case(
        IMAGES_FIRST,
        336,
        {"method": "divprune", "keep_tokens": "64", "verify": "none"},
        suffixes={"_int8"},
        quantized=True,
    ),
    "llava": _tiny(
        IMAGES_FIRST, 56, lambda path: save_tiny(path, layers=3), method="vispruner", keep_tokens="5"
    ),
    "llava-tied": _tiny(
        IMAGES_FIRST, 56, lambda path: save_tiny(path, tied=True, seed=4), method="visionzip", keep_tokens="6"
    ),
    "llava-none": _tiny(IMAGES_FIRST, 56, lambda path: save_tiny(path, seed=7), method="none"),
    "llava-siglip": _tiny(
        IMAGES_FIRST,
        56,
        lambda path: save_tiny(path, vision="siglip", seed=5),
        method="holov",
        keep_tokens="5",
    ),
    "idefics3": _tiny(
        TEXT_FIRST,
        28,
        lambda path: save_idefics3(path, seed=4),
        method="vispruner",
        keep_tokens="2",
        image_size=(28, 28),
    ),
    "smolvlm": _tiny(
        TEXT_FIRST,
        56,
        lambda path: save_idefics3(path, kind="smolvlm", tied=True, side=8, seed=7),
        method="divprune",
        keep_tokens="5",
        image_size=(56, 56),
    ),
    "paligemma": _tiny(
        PLAIN, 56, lambda path: save_gemma(path, tiny_paligemma()), method="vispruner", keep_tokens="6"
    ),
    "paligemma2": _tiny(
        PLAIN, 56, lambda path: save_gemma(path, tiny_paligemma("gemma2")), method="divprune", keep_tokens="6"
    ),
    "gemma3": _tiny(
        TEXT_FIRST, 56, lambda path: save_gemma(path, tiny_gemma3()), method="vispruner", keep_tokens="6"
    ),
}


def main() -> int:
    """See the module's words."""
    root = Path(sys.argv[1]).resolve()
    names = sys.argv[2:] or list(CASES)
    work, models = root / "work", root / "models"
    for name in names:
        for part in ("models", "bundles", "pictures"):
            shutil.rmtree(work / part / name, ignore_errors=True)
    models.mkdir(parents=True, exist_ok=True)
    bundles = {name: make(CASES[name], name, work, models) for name in names}
    questions = {name: list(ask(CASES[name], work / "pictures" / name)) for name in names}
    told = node(root, models, {name: (CASES[name], questions[name]) for name in names})
    wrong = sum(compare(name, bundles[name], questions[name], told[name]) for name in names)
    return 1 if wrong else 0


def make(case: Case, name: str, work: Path, models: Path) -> Path:
    """Make a bundle and its folder for the client; returns the bundle."""
    model = None
    if case.save is not None:
        model = str(work / "models" / name)
        case.save(Path(model))
    bundle = export(Request(work / "bundles" / name, model=model, overwrite=True, **case.wishes)).folder
    if case.quantized:
        bundle = quantize(bundle, work)
    if case.exported:
        export_folder(Request(models / name, model=model, overwrite=True, **case.wishes))
    else:
        lay_out(bundle, model, models / name, overwrite=True)
    found = {
        path.stem.removeprefix("vision_encoder") for path in (models / name / "onnx").glob("vision*.onnx")
    }
    assert found == case.suffixes, (name, found)
    return bundle


def quantize(bundle: Path, work: Path) -> Path:
    """The bundle in int8 and int4, as vtp-calib makes it; returns the new one."""
    asked = ["-m", "vtp.scenes.questions", "--count", "40", "--seed", "5", "-o", str(work / "q")]
    subprocess.run([sys.executable, *asked], check=True, stdout=subprocess.DEVNULL)
    small = bundle.with_name(f"{bundle.name}-int8")
    argv = ["quantize", str(bundle), "--data", str(work / "q" / "questions.jsonl"), "--output", str(small)]
    code = vtp.calib.cli.main([*argv, "--samples", "8", "--max-new-tokens", "12", "--force", "--overwrite"])
    assert code == 0
    return small


def ask(case: Case, folder: Path) -> Iterator[dict[str, str]]:
    """Questions as the script wants them; their pictures are written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if case.save is None:
        for number, item in enumerate(islice(held_out(), BUILTIN_QUESTIONS)):
            path = folder / f"{number}.png"
            item.image.save(path)
            yield {"picture": str(path), "prompt": item.prompt}
        return
    rng = np.random.default_rng(3)
    for number in range(TINY_QUESTIONS):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (case.edge, case.edge, 3), dtype=np.uint8)).save(path)
        yield {"picture": str(path), "prompt": PROMPTS[number % len(PROMPTS)]}


def node(root: Path, models: Path, asked: dict[str, tuple[Case, list[dict[str, str]]]]) -> dict[str, Any]:
    """What the client answers, by folder."""
    script = shutil.copy(HERE / "ask.mjs", root / "ask.mjs")
    jobs = [
        {"folder": name, "order": case.order, "most": case.most, "questions": questions}
        for name, (case, questions) in asked.items()
    ]
    done = subprocess.run(
        ["node", script, str(models)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
        check=False,
        timeout=1800,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compare(name: str, bundle: Path, questions: list[dict[str, str]], told: list[dict[str, Any]]) -> int:
    """Say how many answers are the pipeline's, token for token; returns how many are not."""
    case, equal = CASES[name], 0
    with Pipeline.load(bundle, engine="ort-cpu") as pipe:
        keep = pipe.manifest.visual.keep[0]
        for question, answer in zip(questions, told, strict=True):
            wanted = pipe.generate(question["picture"], question["prompt"], max_new_tokens=case.most)
            same = answer["tokens"] == list(wanted.token_ids) and answer["text"] == wanted.raw_text
            equal += same and answer["image_tokens"] == keep
            if not same:
                print(f"  {name}: {answer} where the pipeline has {wanted.token_ids} {wanted.raw_text!r}")
    print(f"{name}: {equal} of {len(questions)} answers equal, {keep} image tokens", flush=True)
    return len(questions) - equal


if __name__ == "__main__":
    sys.exit(main())
