"""make test-js, its second half: docs/examples/browser in a real Chromium, on WASM, answers as the pipeline.

    python -m tests.js.browser NODE_FOLDER

NODE_FOLDER is that of `python -m tests.js`, which made the built-in model's folder; it also holds
node_modules/playwright-core. The page is served as it stands, and a screenshot is left in NODE_FOLDER.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

from vtp import Pipeline
from vtp.scenes import examples_dir

HERE = Path(__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "examples" / "browser"
QUESTIONS = 8
# Folders of `python -m tests.js`, the bundles that answer as they do, and what the page says of them; the
# last one stands in the screenshot.
CASES = {
    "builtin-small": ("builtin-small-int8", "model: 64 of 576 visual tokens, chosen by divprune, on wasm"),
    "builtin-vispruner": (
        "builtin-vispruner",
        "model: 64 of 576 visual tokens, chosen by vispruner, on wasm",
    ),
}


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what is asked for stands in the test's own answer."""


def main() -> int:
    """See the module's words."""
    root = Path(sys.argv[1]).resolve()
    return max(answer(root, name) for name in CASES)


def answer(root: Path, name: str) -> int:
    """Serve the page with one folder as its model and ask; returns the exit code."""
    site = root / "site"
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(PAGE, site)
    shutil.copytree(root / "models" / name, site / "model")
    script = shutil.copy(HERE / "page.mjs", root / "page.mjs")
    handler = functools.partial(_Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        done = subprocess.run(
            ["node", script, url, str(root / "node_modules"), str(root / "browser.jpg")],
            input=json.dumps(questions()),
            capture_output=True,
            text=True,
            env=os.environ,
            check=False,
            timeout=900,
        )
        server.shutdown()
    if done.returncode:
        print(done.stderr)
        return 1
    bundle, about = CASES[name]
    return check(name, json.loads(done.stdout), root / "work" / "bundles" / bundle, about)


def questions() -> list[dict[str, str]]:
    """Questions about the example pictures."""
    given = json.loads((examples_dir() / "questions.json").read_text(encoding="utf-8"))
    return [
        {"picture": str(examples_dir() / one["image"]), "prompt": one["prompt"]}
        for one in islice(given, QUESTIONS)
    ]


def check(name: str, told: dict[str, Any], bundle: Path, about: str) -> int:
    """Tokens, the number of image tokens in the prompt, and that nothing was asked of anyone else."""
    assert told["foreign"] == [] and told["complaints"] == [], told
    assert told["about"] == about
    equal = 0
    with Pipeline.load(bundle, engine="ort-cpu") as pipe:
        for question, answer in zip(questions(), told["answers"], strict=True):
            wanted = pipe.generate(question["picture"], question["prompt"], max_new_tokens=32)
            same = answer["tokens"] == list(wanted.token_ids) and answer["text"] == wanted.text.strip()
            equal += same
            if not same:
                print(f"  {answer} where the pipeline has {wanted.token_ids} {wanted.text!r}")
    print(f"{name} in Chromium: {equal} of {len(told['answers'])} answers equal", flush=True)
    return 0 if equal == len(told["answers"]) else 1


if __name__ == "__main__":
    sys.exit(main())
