"""make test-clients: unmodified clients, each in an environment of its own, ask a real vtp-serve.

    python -m tests.clients [CLIENT ...]

Every answer, streamed or not, must be vtp-run's, and usage, finish reasons, lists of models and errors what
they should be. One line a client; exit code 1 where anything differs. Packages come from PyPI and npm.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .environments import Client, clients
from .expected import (
    ERRORS,
    MOST,
    MOST_OF_FORM,
    PICTURE,
    PROMPT,
    ROOT,
    SCHEMA,
    answers_of,
    command,
    facts_of,
    make_bundles,
)

BUILD = ROOT / "build/clients"


def main() -> int:
    """See the module's words."""
    wanted = sys.argv[1:]
    chosen = [client for client in clients() if not wanted or client.name in wanted]
    if unknown := set(wanted) - {client.name for client in chosen}:
        known = ", ".join(client.name for client in clients())
        raise SystemExit(f"{', '.join(sorted(unknown))}: no such client; there are {known}")
    bundles = make_bundles(BUILD / "bundles")
    answers = {name: answers_of(folder) for name, folder in bundles.items()}
    with serving(bundles) as url:
        task = task_for(url, list(bundles))
        if task["schema"] is None:
            print("structured output is not served by this version: left out", flush=True)
        wrong = [client.name for client in chosen if not tried(client, task, answers)]
        wrong += unanswered(url)
    print(f"{len(chosen) - len(wrong)} of {len(chosen)} clients work" + (f"; not {wrong}" if wrong else ""))
    return int(bool(wrong))


def task_for(url: str, models: list[str]) -> dict[str, Any]:
    """What each script is told."""
    schema = SCHEMA if constrains(url, models[0]) else None
    task = {"url": url, "models": models, "picture": str(PICTURE), "prompt": PROMPT, "max_tokens": MOST}
    return {**task, "schema": schema, "max_tokens_of_form": MOST_OF_FORM}


def tried(client: Client, task: dict[str, Any], answers: dict[str, Any]) -> bool:
    """Whether a client got what it should; a line says so."""
    try:
        client.prepare(BUILD)
        models = client.models or task["models"]
        report = client.run(BUILD, {**task, "models": models})
        wrong = list(differences(report, {name: answers[name] for name in models}, task["models"]))
        checked, held = (sum(map(len, report.get(name, {}).values())) for name in ("answers", "objects"))
    except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
        wrong, checked, held = [str(error)], 0, 0
    if wrong:
        print(f"FAILED {client.told}", *wrong, sep="\n  ", flush=True)
        return False
    print(f"ok     {client.told}: {checked} answers and {held} objects equal vtp-run's", flush=True)
    return True


def differences(report: dict[str, Any], answers: dict[str, Any], served: list[str]) -> Iterator[str]:
    """What a client's report says that it should not, or leaves out.

    answers  of the models that it was asked about
    served   all models of the server
    """
    if set(report["answers"]) != set(answers) or not all(report["answers"].values()):
        yield f"answers of {sorted(report['answers'])}, not of {sorted(answers)}"
    for model, texts in report["answers"].items():
        for label, text in texts.items():
            if text != (right := right_text(label, answers[model])):
                yield f"{model}, {label}: {text!r}, not {right!r}"
    for model, facts in report.get("facts", {}).items():
        yield from wrong_facts(model, facts, answers[model])
    for name in ("models", "running"):
        if name in report and report[name] != served:
            yield f"{name}: {report[name]}, not {served}"
    for name, error in report.get("errors", {}).items():
        if error not in ERRORS[name]:
            yield f"error of {name}: {error}, not one of {ERRORS[name]}"
    for model, objects in report.get("objects", {}).items():
        for label, found in objects.items():
            if not (is_seen(found) and found == answers[model]["object"]):
                yield f"{model}, structured output, {label}: {found}, not {answers[model]['object']}"


def right_text(label: str, answer: dict[str, Any]) -> str:
    """What an answer must be: words may come before the picture or alone, and some clients cut spaces."""
    if label.startswith("stripped"):
        return str(answer["text first"]).strip()
    kinds = (kind for kind in ("text first", "text only") if label.startswith(kind))
    return str(answer[next(kinds, "text")])


def wrong_facts(model: str, facts: dict[str, Any], answer: dict[str, Any]) -> Iterator[str]:
    """Facts of one model that are not as they should be; how many pieces a stream has is a matter of time."""
    right = facts_of(answer)
    for name, fact in facts.items():
        if name == "pieces":
            if not 1 <= fact <= len(answer["token_ids"]) + 1:
                yield f"{model}: the stream had {fact} pieces of {len(answer['token_ids'])} tokens"
        elif fact != right[name]:
            yield f"{model}, {name}: {fact}, not {right[name]}"


def is_seen(found: Any) -> bool:
    """Whether an object obeys SCHEMA."""
    if not isinstance(found, dict):
        return False
    colors = SCHEMA["properties"]["color"]["enum"]  # type: ignore[index]
    return set(found) == {"color", "sure"} and found["color"] in colors and isinstance(found["sure"], bool)


@contextmanager
def serving(bundles: dict[str, Path]) -> Iterator[str]:
    """A real vtp-serve of the bundles, as a process; its address."""
    names = [flag for name in bundles for flag in ("--name", name)]
    process = subprocess.Popen(
        [command("vtp-serve"), *map(str, bundles.values()), *names, "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = next(
            found[1] for line in process.stdout if (found := re.search(r"listening on (http://\S+)", line))
        )
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield url
        process.terminate()
        assert process.wait(60) == 0, f"vtp-serve ended with {process.returncode}"
    finally:
        process.kill()
        process.wait()


def constrains(url: str, model: str) -> bool:
    """Whether the server serves response_format json_schema."""
    form = {"type": "json_schema", "json_schema": {"name": "seen", "strict": True, "schema": SCHEMA}}
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "x"}],
        "response_format": form,
        "max_tokens": 1,
    }
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode())
    try:
        urllib.request.urlopen(request, timeout=60).close()
    except urllib.error.HTTPError as error:
        return "response_format" not in error.read().decode()
    return True


def unanswered(url: str) -> list[str]:
    """What /metrics must not say after all that: failures of the server, and requests that go on."""
    text = urllib.request.urlopen(url + "/metrics", timeout=60).read().decode()
    wrong = re.findall(r'^vtp_requests_total\{.*status="5.*$', text, re.MULTILINE)
    return wrong + re.findall(
        r"^vtp_requests_(?:in_flight|running|waiting)\{.*\} [^0].*$", text, re.MULTILINE
    )


if __name__ == "__main__":
    sys.exit(main())
