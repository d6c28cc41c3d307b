"""make test-evals: lmms-eval and VLMEvalKit, unmodified, each in an environment of its own, ask a bundle.

    python -m tests.evals [lmms-eval] [vlmevalkit]

Both run by their own command on a set made here, load it with their own loaders, and every answer must be the
pipeline's. Packages come from PyPI; torch, transformers and ONNX Runtime are this environment's.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from base64 import b64encode
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vtp.export.cli import quiet_libraries
from vtp.export.exporter import Request, export
from vtp.runtime import Pipeline
from vtp.scenes.exam import held_out

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/evals"
TASKS = Path(__file__).parent / "tasks"
KEEP, TOKENS, COUNT = 64, 4, 6
PATIENCE = 1200.0  # seconds of one harness
# What each imports on the way to a plain set of questions: their own lists are longer.
LMMS = """datasets evaluate loguru sacrebleu pytablewriter tenacity sqlitedict pydantic accelerate
tqdm-multiprocess jsonlines numexpr scikit-learn python-dotenv zss"""
VLM = """pandas tabulate openpyxl xlsxwriter validators rich python-dotenv portalocker json_repair tiktoken
timeout-decorator sty requests matplotlib nltk num2words imageio termcolor lxml editdistance levenshtein
distance apted anls rouge zss sympy scikit-learn scikit-image jieba einops nest_asyncio openai
opencv-python-headless omegaconf>=2.4.0.dev4 pylatexenc latex2sympy2-extended math-verify datasets
accelerate decord"""
# transformers must not take the stand-in of torchvision for the real one: it looks before that is there.
SITE = """\
import sys
from transformers.utils import import_utils
import_utils.is_torchvision_available()
sys.path.append({folder!r})
"""


@dataclass(frozen=True)
class Harness:
    """A harness and what it needs: `alone` is installed without its dependencies.

    site  a sitecustomize.py, which Python runs when it starts
    """

    name: str
    alone: tuple[str, ...]
    packages: tuple[str, ...]
    site: str = ""

    @property
    def python(self) -> Path:
        return BUILD / self.name / "bin/python"

    def prepare(self) -> None:
        """Make its environment, unless just these packages are there; vtp is installed anew."""
        folder, stamp = BUILD / self.name, BUILD / self.name / "packages.json"
        wanted = json.dumps([self.alone, self.packages])
        pip = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if not stamp.is_file() or stamp.read_text() != wanted:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            here = sysconfig.get_paths()["purelib"]
            (_site_packages(folder) / "zz_main.pth").write_text(f"import site; site.addsitedir({here!r})\n")
            (_site_packages(folder) / "sitecustomize.py").write_text(self.site)
            subprocess.run([*pip, *self.packages], check=True)
            subprocess.run([*pip, "--no-deps", *self.alone], check=True)
            stamp.write_text(wanted)
        subprocess.run([*pip, "--no-deps", "--force-reinstall", str(_wheel())], check=True)

    def run(self, *words: str, **environment: str) -> str:
        """Run a command of its environment, from an empty folder; RuntimeError with the end of its words.

        What it printed last is returned.
        """
        work = BUILD / f"{self.name}-run"
        work.mkdir(exist_ok=True)
        done = subprocess.run(
            [str(self.python), *words],
            cwd=work,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        return f"{done.stdout[-1000:]}\n{done.stderr[-1000:]}"


LMMS_EVAL = Harness("lmms-eval", ("lmms-eval==0.7.3", "filelock==3.20.0"), tuple(LMMS.split()))
VLMEVALKIT = Harness(
    "vlmevalkit",
    ("ms-vlmeval==0.0.20", "qwen_vl_utils"),  # VLMEvalKit itself is not on PyPI; its files are the same
    tuple(VLM.split()),
    SITE.format(folder=str(Path(__file__).parent / "stand_in")),
)


def main() -> int:
    """See the module's words."""
    wanted = sys.argv[1:] or ["lmms-eval", "vlmevalkit"]
    bundle, questions = make()
    expected = answers_of(bundle, questions)
    wrong = 0
    for name, harness, ask in (
        ("lmms-eval", LMMS_EVAL, ask_lmms_eval),
        ("vlmevalkit", VLMEVALKIT, ask_vlmevalkit),
    ):
        if name in wanted:
            harness.prepare()
            found = ask(bundle, questions)
            wrong += found != expected
            print(f"{'ok    ' if found == expected else 'FAILED'} {name}: {len(found)} answers", flush=True)
            if found != expected:
                print(f"  {found}\n  instead of {expected}", flush=True)
    return int(bool(wrong))


def make() -> tuple[Path, list[dict[str, str]]]:
    """A bundle of the built-in model, and questions about pictures on the disk."""
    quiet_libraries()
    bundle = export(
        Request(BUILD / "vis", method="vispruner", keep_tokens=f"{KEEP}", verify="none", overwrite=True)
    )
    questions = []
    for place, item in enumerate(held_out(COUNT)):
        file = BUILD / f"pictures/{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        item.image.save(file)
        questions.append({"image": str(file), "prompt": item.prompt, "answer": item.answer})
    return bundle.folder, questions


def answers_of(bundle: Path, questions: list[dict[str, str]]) -> list[str]:
    """What the pipeline says."""
    with Pipeline.load(bundle, "ort-cpu", threads=1) as pipe:
        return [
            pipe.generate(one["image"], one["prompt"], keep_tokens=KEEP, max_new_tokens=TOKENS).text
            for one in questions
        ]


def ask_lmms_eval(bundle: Path, questions: list[dict[str, str]]) -> list[str]:
    """By its command, a task in YAML and its JSON loader; the answers stand in its log of samples."""
    tasks, out = BUILD / "tasks", BUILD / "lmms-eval-out"
    tasks.mkdir(exist_ok=True)
    data = BUILD / "made.jsonl"
    data.write_text("".join(f"{json.dumps(one)}\n" for one in questions))
    (tasks / "made.py").write_text((TASKS / "made.py").read_text())
    (tasks / "made.yaml").write_text((TASKS / "made.yaml").read_text().replace("DATA", str(data)))
    for old in out.rglob("*_samples_*.jsonl"):
        old.unlink()
    arguments = f"bundle={bundle},keep_tokens={KEEP},engine=ort-cpu,threads=1"
    words = ["-m", "lmms_eval", "--model", "vtp", "--model_args", arguments, "--tasks", "vtp_made"]
    words += ["--include_path", str(tasks), "--batch_size", "1", "--log_samples", "--output_path", str(out)]
    said = LMMS_EVAL.run(*words, HF_HOME=str(BUILD / "hf"))
    log = next(out.rglob("*_samples_*.jsonl"), None)
    if log is None:  # it ends with 0 all the same
        raise RuntimeError(f"lmms-eval wrote no answers: {said}")
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    return [_text(one["filtered_resps"]) for one in sorted(samples, key=lambda one: one["doc_id"])]


def _text(responses: Any) -> str:
    return str(responses[0] if isinstance(responses, list) else responses)


def ask_vlmevalkit(bundle: Path, questions: list[dict[str, str]]) -> list[str]:
    """By its command and its TSV loader, as a set of one's own; the answers stand in its table."""
    root, out = BUILD / "LMUData", BUILD / "vlmevalkit-out"
    root.mkdir(exist_ok=True)
    with (root / "VtpMade.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "answer"])
        for place, one in enumerate(questions):
            picture = b64encode(Path(one["image"]).read_bytes()).decode()
            table.writerow([place, picture, one["prompt"], one["answer"]])
    words = [
        "-m",
        "vtp.calib.adapters.vlmevalkit",
        f"{bundle}:{KEEP}",
        "--data",
        "VtpMade",
        "--mode",
        "infer",
    ]
    VLMEVALKIT.run(*words, "--work-dir", str(out), LMUData=str(root), PRED_FORMAT="tsv")
    newest = max(out.rglob("*VtpMade.tsv"), key=lambda file: file.stat().st_mtime)
    with newest.open(newline="") as file:
        return [row["prediction"] for row in csv.DictReader(file, delimiter="\t")]


@cache
def _wheel() -> Path:
    """vtp, built by this environment: in those of the harnesses, other tools stand before the build's own."""
    folder = BUILD / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "-w", str(folder), str(ROOT)], check=True)
    (found,) = folder.glob("vtp_edge-*.whl")
    return found


def _site_packages(folder: Path) -> Path:
    (found,) = folder.glob("lib/python3.*/site-packages")
    return found


if __name__ == "__main__":
    sys.exit(main())
