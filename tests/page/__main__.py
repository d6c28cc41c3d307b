"""make test-page: the page of a real vtp-serve, driven in a real Chromium; screenshots go to OUT.

    python -m tests.page BUNDLE NODE_FOLDER OUT

NODE_FOLDER holds node_modules/playwright-core. The answers are those of `Pipeline.generate`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtp import Pipeline

HERE = Path(__file__).parent
PICTURE = Path(__file__).parents[2] / "scenes" / "examples" / "scene.png"
PROMPT = "what color is the star ?"


def main() -> int:
    """See the module's words."""
    bundle, folder, out = (Path(argument).resolve() for argument in sys.argv[1:4])
    out.mkdir(parents=True, exist_ok=True)
    script = shutil.copy(HERE / "page.mjs", folder / "page.mjs")
    command = [str(Path(sys.executable).parent / "vtp-serve"), str(bundle), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = address(iter(server.stdout.readline, ""))
            arguments = ["node", script, url, str(PICTURE), PROMPT, str(out)]
            done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ, timeout=300)
        finally:
            server.terminate()
    if done.returncode:
        print(done.stderr)
        return 1
    told = json.loads(done.stdout)
    check(told, bundle)
    print(f"the page answers as the pipeline does, at {len(told['counts'])} keep-counts; pictures in {out}")
    return 0


def address(lines: Iterator[str]) -> str:
    """The address in the server's ready line."""
    for line in lines:
        if found := re.search(r"http://[\w.:\[\]]+", line):
            return found[0]
    raise SystemExit("vtp-serve ended before it was ready")


def check(told: dict[str, Any], bundle: Path) -> None:
    """Answers, kept tokens, and that nothing was asked of anyone else or complained about."""
    assert told["foreign"] == [] and told["complaints"] == [], told
    pipe = Pipeline.load(bundle)
    for keep, answer in told["answers"].items():
        result = pipe.generate(PICTURE, PROMPT, keep_tokens=int(keep))
        assert answer == result.text.strip(), (keep, answer, result.text)
    assert told["phone"] == told["keys"] == pipe.generate(PICTURE, PROMPT).text.strip()
    kept = told["kept"]
    assert kept["kept"] == pipe.generate(PICTURE, PROMPT).kept, "other tokens are shown than were kept"
    assert told["camera"] and told["refused"] == "This file is not a picture that the browser can read."
    pipe.close()


if __name__ == "__main__":
    sys.exit(main())
