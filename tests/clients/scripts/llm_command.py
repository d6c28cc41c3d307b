"""The command `llm` with its extra-openai-models.yaml: a picture as attachment, streamed or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TASK = json.loads(os.environ["VTP_TASK"])


def ask(folder: str, model: str, *more: str) -> str:
    command = [str(Path(sys.executable).with_name("llm")), "-m", model, TASK["prompt"], "-a", TASK["picture"]]
    command += ["-o", "max_tokens", str(TASK["max_tokens"]), "--no-log", *more]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "LLM_USER_PATH": folder}, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.removesuffix("\n")


with tempfile.TemporaryDirectory() as home:
    entries = [
        f'- model_id: {name}\n  model_name: {name}\n  api_base: "{TASK["url"]}/v1"\n  vision: true\n'
        for name in TASK["models"]
    ]
    Path(home, "extra-openai-models.yaml").write_text("".join(entries))
    answers = {
        name: {"text first: stream": ask(home, name), "text first: whole": ask(home, name, "--no-stream")}
        for name in TASK["models"]
    }
print(json.dumps({"answers": answers}))
