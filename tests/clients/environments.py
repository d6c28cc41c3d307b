"""An environment for each client, made once: a venv or a node_modules with the versions of versions.toml."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib

HERE = Path(__file__).parent
SCRIPTS = HERE / "scripts"
PATIENCE = 600  # seconds of one client


@dataclass(frozen=True)
class Client:
    """One entry of versions.toml; `models` are those that it is asked about, None: all."""

    name: str
    told: str
    script: str
    pip: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None

    def prepare(self, root: Path) -> None:
        """Install its packages in `root`, unless just these are there."""
        folder, stamp = root / self.name, root / self.name / "packages.json"
        wanted = json.dumps([self.pip, self.npm])
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if self.pip:
            _call([sys.executable, "-m", "venv", str(folder)], folder)
            pip = [str(folder / "bin/pip"), "install", "--quiet", "--disable-pip-version-check"]
            _call([*pip, *self.pip], folder)
        else:
            (folder / "package.json").write_text("{}")
            _call(["npm", "install", "--no-audit", "--no-fund", "--silent", *self.npm], folder)
        stamp.write_text(wanted)

    def run(self, root: Path, task: dict[str, Any]) -> dict[str, Any]:
        """Run its script and return what it prints; RuntimeError with the end of its words if it fails."""
        folder = root / self.name
        environment = {**_plain_environment(), "VTP_TASK": json.dumps(task)}
        done = subprocess.run(
            self._command(folder),
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode:
            raise RuntimeError((done.stderr or done.stdout).strip()[-2000:])
        report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return report

    def _command(self, folder: Path) -> list[str]:
        """A module of Node's looks for packages beside itself, so the script is put there."""
        if self.pip:
            return [str(folder / "bin/python"), str(SCRIPTS / self.script)]
        return ["node", str(shutil.copy(SCRIPTS / self.script, folder))]


def clients() -> list[Client]:
    """All of them, in the order of versions.toml."""
    table = tomllib.loads((HERE / "versions.toml").read_text(encoding="utf-8"))
    lists = ("pip", "npm", "models")
    return [
        Client(name, **{key: tuple(value) if key in lists else value for key, value in one.items()})
        for name, one in table.items()
    ]


def _plain_environment() -> dict[str, str]:
    """This process's, without what would lead a client elsewhere: keys, addresses, proxies, import paths."""
    drop = ("OPENAI_", "OLLAMA_", "PYTHONPATH", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    return {**kept, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def _call(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-2000:]}")
