"""What pyproject.toml cannot say of a build: which built-in models go along, where README.md's links lead.

A wheel is built in a folder that is emptied before (setuptools would take along what an earlier build left).
VTP_MODELS names the built-in models that go into a wheel: "model" (10 MB) unless set, "model,reader", or
"none". An sdist holds all of them, and the repository's whole layout the other way round: files of the rooms
lie in vtp/, so that it builds where there are no links, and engines/, runtime/ ... are links to them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from setuptools import setup
from setuptools.command.build import build
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info
from setuptools.command.sdist import sdist

MODELS = ("model", "reader")  # folders of scenes/
BUILT = "build/package"
ROOMS = ("bench", "calib", "engines", "export", "runtime", "scenes", "serve")
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
# Code, which stays as it is, or where a link leads: ](...), src="..." or href="...".
_LINK = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]+`)|(?P<before>\]\(|\b(?:src|href)=\")(?P<target>[^)\s\"]+)",
    flags=re.DOTALL | re.MULTILINE,
)


def models(wanted: str) -> set[str]:
    """The built-in models that VTP_MODELS names; ends the build with one line for other names."""
    names = {name.strip() for name in wanted.split(",")} - {"none"}
    if not names <= set(MODELS):
        raise SystemExit(f"VTP_MODELS={wanted} is not valid; give none, or some of {', '.join(MODELS)}")
    return names


def with_links(text: str, moved: Callable[[str], str]) -> str:
    """A Markdown page whose relative links are what `moved` makes of them; code and absolute links stay."""

    def link(match: re.Match[str]) -> str:
        target = match["target"] or ""
        if match["code"] or re.match(r"[A-Za-z][\w+.-]*:|/", target):
            return match[0]
        return match["before"] + moved(target)

    return _LINK.sub(link, text)


def in_repository(target: str, source: str, revision: str) -> str:
    """Address of a file of the repository, from its path and perhaps an anchor; pictures as they are.

    source  the repository's address
    """
    kind = "raw" if target.partition("#")[0].lower().endswith(PICTURES) else "blob"
    return f"{source}/{kind}/{revision}/{target}"


def package_page(readme: str, source: str, version: str) -> str:
    """README.md as the package index shows it: links lead to the repository, at the version's tag."""

    def moved(target: str) -> str:
        path = f"README.md{target}" if target.startswith("#") else target
        return in_repository(path, source, f"v{version}")

    return with_links(readme, moved)


class Build(build):
    """In a folder of its own, empty at first."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_base = BUILT

    def run(self) -> None:
        shutil.rmtree(BUILT, ignore_errors=True)
        super().run()


class BuildPy(build_py):
    """With the built-in models that were asked for."""

    def find_data_files(self, package: str, src_dir: str) -> list[str]:
        files: list[str] = super().find_data_files(package, src_dir)
        apart = set(MODELS) - models(os.environ.get("VTP_MODELS") or "model")
        return [file for file in files if Path(file).parent.name not in apart]


class EggInfo(egg_info):
    """With README.md's links led to the repository."""

    def run(self) -> None:
        about = self.distribution.metadata
        source = about.project_urls["Source"]
        about.long_description = package_page(about.long_description, source, about.version)
        super().run()


class Sdist(sdist):
    """With a link at the root for each room, and nothing that Python compiled."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, [name for name in files if "__pycache__" not in name])
        for room in ROOMS:
            Path(base_dir, room).symlink_to(Path("vtp", room), target_is_directory=True)


if __name__ == "__main__":
    setup(cmdclass={"build": Build, "build_py": BuildPy, "egg_info": EggInfo, "sdist": Sdist})
