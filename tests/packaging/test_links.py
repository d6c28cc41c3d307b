"""What setup.py and the site make of pages: links, docstrings, names; and the models that setup.py knows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
AT = "https://example.org/o/r"


def loaded(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP, SITE = loaded("setup.py"), loaded(".ci/docs_site.py")


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("[a](docs/a.md)", f"[a]({AT}/blob/v1.0.0/docs/a.md)"),
        ("[a](docs/a.md#part)", f"[a]({AT}/blob/v1.0.0/docs/a.md#part)"),
        ("[a](#part)", f"[a]({AT}/blob/v1.0.0/README.md#part)"),
        ("![a](docs/a.png)", f"![a]({AT}/raw/v1.0.0/docs/a.png)"),
        ('<img src="docs/a.jpg" width="9">', f'<img src="{AT}/raw/v1.0.0/docs/a.jpg" width="9">'),
        ("[![a](docs/a.png)](docs/a.md)", f"[![a]({AT}/raw/v1.0.0/docs/a.png)]({AT}/blob/v1.0.0/docs/a.md)"),
        ("[a](https://example.org/x)", "[a](https://example.org/x)"),
        ("[a](mailto:a@example.org)", "[a](mailto:a@example.org)"),
        ("`row[0](docs/a.md)`", "`row[0](docs/a.md)`"),
        ("```python\nrow[0](x)\n```\n[a](b.md)", f"```python\nrow[0](x)\n```\n[a]({AT}/blob/v1.0.0/b.md)"),
    ],
)
def test_links_of_the_package_page_lead_to_the_repository(given: str, made: str) -> None:
    assert SETUP.package_page(given, AT, "1.0.0") == made
    assert SETUP.package_page(made, AT, "1.0.0") == made


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("serve.md#stopping", "serve.md#stopping"),
        ("#stopping", "#stopping"),
        ("examples/camera.py", "examples/camera.py"),
        ("../README.md#try-it", f"{AT}/blob/main/README.md#try-it"),
        ("../scenes/examples/scene.png", f"{AT}/raw/main/scenes/examples/scene.png"),
    ],
)
def test_links_that_leave_docs_lead_to_the_repository(given: str, made: str) -> None:
    assert SITE.site_link(given, AT) == made


def test_links_to_files_that_are_gone_are_told(caplog: pytest.LogCaptureFixture) -> None:
    for target in ("../nothing.md", "../../elsewhere.md"):
        assert SITE.site_link(target, AT) == target
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def test_pages_named_in_code_type_are_links_on_the_site() -> None:
    text = "see `docs/a.md`, `docs/none.md` and [`docs/a.md`](a.md)\n```\ncat `docs/a.md`\n```\n"
    made = "see [`docs/a.md`](a.md), `docs/none.md` and [`docs/a.md`](a.md)\n```\ncat `docs/a.md`\n```\n"
    assert SITE.with_named_pages(text, {"a.md"}) == made


def test_columns_of_a_docstring_become_a_list() -> None:
    text = "Open it.\n\nbundle  a folder; or\n        a name\nengine, threads  as above\n\nRaises VtpError."
    made = "Open it.\n\n- `bundle`: a folder; or a name\n- `engine`, `threads`: as above\n\nRaises VtpError."
    assert SITE.in_lists(text) == made
    assert SITE.in_lists("One line.\nA second  one.") == "One line.\nA second  one."


def test_the_pages_of_the_interface_show_every_public_name() -> None:
    import vtp.runtime
    import vtp.runtime.scheduler
    import vtp.serve.streams

    for page, module in (
        ("runtime", vtp.runtime),
        ("scheduler", vtp.runtime.scheduler),
        ("streams", vtp.serve.streams),
    ):
        for name in module.__all__:
            assert SITE.api_page(page).count(f"::: {module.__name__}.{name}\n") == 1


def test_every_page_of_the_nav_exists() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = [line.strip("- ").strip() for line in nav.splitlines() if line.endswith(".md")]
    assert pages and len(pages) == len(set(pages))
    for page in pages:
        folder, _, name = page.rpartition("/")
        assert Path(name).stem in SITE.PAGES if folder == "api" else (ROOT / "docs" / page).is_file(), page


def test_the_repositorys_address_stands_in_one_place() -> None:
    """Links in pages are relative."""
    address = SITE.source()
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".ci").iterdir()]
    pages += [ROOT / name for name in ("mkdocs.yml", "Makefile", "setup.py")]
    assert not [str(path) for path in pages if path.is_file() and address in path.read_text(encoding="utf-8")]


def test_models_that_are_not_built_in_end_a_build_with_one_line() -> None:
    assert SETUP.models("none") == set() and SETUP.models("model, reader") == set(SETUP.MODELS)
    assert all((ROOT / "scenes" / name).is_dir() for name in SETUP.MODELS)
    with pytest.raises(
        SystemExit, match="VTP_MODELS=modle is not valid; give none, or some of model, reader"
    ):
        SETUP.models("modle")
