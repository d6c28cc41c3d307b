"""Answers of bundles with whatever versions run this file: written by one environment, compared by another.

    python tests/oldest.py export FOLDER TARGET      the built-in model with every method, and some of them in
                                                     every precision (needs vtp[export,calib])
    python tests/oldest.py write FILE FOLDER         answers of this environment
    python tests/oldest.py compare FILE              the same questions here; 1 if one fails or differs

Imports what the runtime needs and, but for `export`, nothing else: no torch, no pytest. `make test-oldest`
runs it with the oldest versions that docs/engines.md names.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from contextlib import closing
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from vtp.engines import VtpError, open_graph
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands import doctor
from vtp.runtime.machine.facts import look
from vtp.runtime.parity_gate import Case, cases

PROMPTS = ("what color is the star ?", "how many circle ?")
PACKAGES = ("onnxruntime", "numpy", "tokenizers", "pillow", "jinja2")
# In each precision are asked one method that keeps every token, so that answers are always compared, and one
# that chooses. dtype, then what vision encoder and projector, and the decoder become.
PRECISE = ("none", "adaptprune")
PRECISIONS = {
    "ort": (
        ("float16", "none", "none"),
        ("float32", "int8", "none"),
        ("float32", "none", "int4"),
        ("float32", "int8", "int4"),
        ("float32", "int8", "int8"),
        ("float32", "int8", "int4", "int8"),
        ("float16", "int8", "int4"),
    ),
    "jetpack6": (("float32", "none", "none"), ("float32", "int8", "none"), ("float16", "int8", "none")),
}


def answers(folder: str) -> list[dict]:
    """Greedy tokens and kept indices of two questions about a picture of noise."""
    picture = np.random.default_rng(3).integers(0, 256, (120, 90, 3), dtype=np.uint8)
    with Pipeline.load(folder, engine="ort-cpu", threads=1) as pipe:
        results = [pipe.generate(Image.fromarray(picture), prompt, max_new_tokens=8) for prompt in PROMPTS]
    return [{"tokens": result.token_ids, "text": result.text, "kept": result.kept} for result in results]


def export_all(folder: str, target: str) -> None:
    """A bundle for every method, named as the method, and those of PRECISIONS."""
    from vtp.export.exporter import Request, export
    from vtp.export.pruners import picture_methods

    def make(name: str, method: str, dtype: str | None) -> Path:
        out, keep = Path(folder) / name, None if method == "none" else "64"
        wishes = {"keep_tokens": keep, "target": target, "dtype": dtype, "verify": "none"}
        export(Request(out, method=method, overwrite=True, **wishes))
        print(out, flush=True)
        return out

    for method in picture_methods():
        make(method, method, None)
    for method in PRECISE:
        make_precisions(target, method, make)


def make_precisions(target: str, method: str, make: Callable[[str, str, str | None], Path]) -> None:
    """A method's bundles in every precision; those in fewer bits are made from float ones beside them."""
    from vtp.bench.common.fewer_bits import write_quantised
    from vtp.calib.quantize.quantizer import Wish

    floats: dict[str, Path] = {}
    for dtype, vision, decoder, *prompt in PRECISIONS[target]:
        if dtype not in floats:
            floats[dtype] = make(f"{method}-{dtype}", method, dtype)
        if (vision, decoder) != ("none", "none"):
            out = floats[dtype].with_name("-".join((method, dtype, vision, decoder, *prompt)))
            wish = Wish(vision, decoder, prompt=prompt[0] if prompt else "decoder")
            write_quantised(open_bundle(floats[dtype]), out, wish, 4, 1)
            print(out, flush=True)


def write(file: Path, folders: list[str]) -> None:
    """Answers, and beside the file what every pruner was given and chose."""
    file.write_text(json.dumps({folder: answers(folder) for folder in folders}), encoding="utf-8")
    for folder in folders:
        for number, case in enumerate(choices(folder)):
            arrays = {f"in {name}": array for name, array in case.feeds.items()}
            np.savez(_choice(file, folder, number), **arrays, out=case.outputs["keep_indices"])


def choices(folder: str) -> list[Case]:
    """One run of every pruner's graph, on what the bundle computes here."""
    return [case for case in cases(open_bundle(folder)) if "keep_indices" in case.outputs]


def _choice(file: Path, folder: str, number: int) -> Path:
    return file.with_name(f"{file.stem}-{Path(folder).name}-{number}.npz")


def other_choices(file: Path, folder: str) -> list[str]:
    """The pruners that choose otherwise here, given the very same numbers."""
    wrong = []
    for number, case in enumerate(choices(folder)):
        told = dict(np.load(_choice(file, folder, number)))
        wanted = told.pop("out")
        with closing(open_graph(open_bundle(folder).path(case.file), "ort-cpu")) as engine:
            feeds = {name.removeprefix("in "): engine.put(array) for name, array in told.items()}
            if not np.array_equal(engine.run(feeds)["keep_indices"].numpy(), wanted):
                wrong.append(case.file)
    return wrong


def problem(file: Path, folder: str, wanted: list[dict]) -> str:
    """What is wrong with a bundle here; empty if it opens, as the doctor says, chooses and answers as wanted.

    Another encoder's rounding may turn a close call, which VisPruner's rounds magnify (docs/methods.md): if
    other tokens were kept, the choice is judged on the same numbers, and the answer is not.
    """
    engines = doctor.examine(look(), open_bundle(folder))["engines"]
    judged = next(one for one in engines if one["engine"] == "ort-cpu")
    try:
        found, wrong = answers(folder), other_choices(file, folder)
    except VtpError as error:
        said = "" if not judged["accepted"] else "; vtp-doctor calls it runnable"
        return f"{error}{said}"
    if not judged["accepted"]:
        return f"it answers, and vtp-doctor says: {judged['reason']}"
    if wrong:
        return f"{', '.join(wrong)} chooses other tokens of the same numbers"
    same_kept = [one["kept"] for one in found] == [one["kept"] for one in wanted]
    return f"{found} instead of {wanted}" if same_kept and found != wanted else ""


def main(action: str, file: str, *rest: str) -> int:
    """See the module's words."""
    if action == "export":
        export_all(file, *rest)
        return 0
    here = {name: metadata.version(name) for name in PACKAGES}
    print(f"Python {platform.python_version()}", here)
    if action == "write":
        folders = sorted(str(path.parent) for path in Path(rest[0]).glob("*/manifest.json"))
        write(Path(file), folders)
        return 0
    if doctor.main([]) != 0:
        return 1
    wanted = json.loads(Path(file).read_text(encoding="utf-8"))
    problems = {folder: problem(Path(file), folder, told) for folder, told in wanted.items()}
    for folder, found in problems.items():
        print(f"{folder}: {found or 'opens, the same choices'}")
    return int(not wanted or any(problems.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
