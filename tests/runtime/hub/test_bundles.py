"""Bundles of the hub: what is fetched, which commit is opened, and what its cache does without the hub."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from vtp import VtpForImageTextToText
from vtp.engines import UsageError, VtpError
from vtp.runtime import Pipeline
from vtp.runtime.hub.bundles import local_bundle
from vtp.runtime.hub.names import HubName, hub_name, origin_of

from ...stand_ins.hub_server import Handler, Hub

OFFLINE = "huggingface_hub.constants.HF_HUB_OFFLINE"


def fetch(given: str, revision: str | None = None) -> tuple[Path, list[str]]:
    """The folder of a bundle of the hub, and what was said."""
    said: list[str] = []
    return local_bundle(given, revision, said.append), said


def commit_of(folder: Path) -> str:
    name = origin_of(folder)
    assert name is not None
    return name.revision


def test_it_answers_as_the_folder_does(
    hub: Hub, pipe: Pipeline, picture: Image.Image, files: dict[str, bytes]
) -> None:
    """Only the manifest's files are fetched, at one commit; the next time the hub is asked once."""
    commit = hub.repos["org/name"].refs["main"]
    wanted = pipe.generate(picture, "what is it ?", max_new_tokens=4)
    with Pipeline.load("org/name", threads=1) as fetched:
        result = fetched.generate(picture, "what is it ?", max_new_tokens=4)
        assert result.token_ids == wanted.token_ids and result.kept == wanted.kept
        assert fetched.bundle.origin == fetched.bundle.given == f"org/name@{commit}"
        folder = fetched.bundle.folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert not any(path.is_symlink() for path in folder.iterdir())
    fetched_names = {path.rpartition("/")[2] for path in hub.paths("HEAD")}
    assert fetched_names == set(files)
    assert all(f"/resolve/{commit}/" in path for path in hub.paths("HEAD"))
    hub.asked.clear()
    assert local_bundle("org/name") == folder
    assert [path for _, path, _ in hub.asked] == ["/api/models/org/name/revision/main"]


def test_what_is_said_of_it(hub: Hub, files: dict[str, bytes]) -> None:
    """The size before it is fetched, the whole commit after it; the second time only the commit."""
    folder, said = fetch("org/name")
    commit = commit_of(folder)
    fetched = len(files) - 1
    size = sum(map(len, files.values())) - len(files["manifest.json"])
    assert said == [
        f"org/name@{commit[:12]} on the hub: {fetched} files, {size / 1e6:.1f} MB to fetch"
        if size >= 1e6
        else f"org/name@{commit[:12]} on the hub: {fetched} files, {size / 1e3:.1f} kB to fetch",
        f"bundle org/name@{commit}",
    ]
    assert fetch("org/name")[1] == said[1:]


def test_revisions(hub: Hub, files: dict[str, bytes]) -> None:
    """A branch moves and a tag does not; a commit that is there is not asked about again."""
    repo = hub.repos["org/name"]
    first = repo.refs["v1"] = repo.refs["main"]
    old, _ = fetch("org/name")
    second = repo.commit({**files, "README.md": b"# another card"})
    new, _ = fetch("org/name")
    assert (commit_of(old), commit_of(new)) == (first, second)
    assert local_bundle("org/name", "v1") == local_bundle("hf://org/name@v1") == old
    hub.asked.clear()
    assert local_bundle(f"org/name@{second}") == local_bundle("org/name", second) == new
    assert hub.asked == []
    with Pipeline.load("org/name", threads=1, revision="v1") as pipe:
        assert pipe.bundle.origin == f"org/name@{first}"


def test_without_the_hub_the_cache_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = fetch("org/name")
    hub.down = True
    again, said = fetch("org/name")
    used = (
        f"the hub was not reached, so the cache's org/name@{commit_of(folder)[:12]} is used (HfHubHTTPError"
    )
    assert again == folder and said[0].startswith(used) and "503" in said[0]
    hub.asked.clear()
    monkeypatch.setattr(OFFLINE, True)
    assert fetch("org/name") == (folder, [f"bundle org/name@{commit_of(folder)}"])
    assert hub.asked == []
    with pytest.raises(VtpError, match="does not have all of org/name@v1, while HF_HUB_OFFLINE forbids"):
        local_bundle("org/name@v1")
    with pytest.raises(VtpError, match=r"does not have all of org/name@0123456.*HF_HUB_OFFLINE forbids"):
        local_bundle(f"org/name@{'0123456789' * 4}")


def test_a_snapshot_that_another_program_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `hf download org/name` does it: whole, with files beside the bundle's, and all of them links."""
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download("org/name"))
    assert (snapshot / "engine.plan").is_symlink()
    monkeypatch.setattr(OFFLINE, True)
    hub.asked.clear()
    folder, _ = fetch("org/name")
    assert hub.asked == [] and not (folder / "engine.plan").exists() and not (folder / "README.md").exists()
    assert (folder / "decoder.onnx").stat().st_ino == (snapshot / "decoder.onnx").resolve().stat().st_ino


def test_the_librarys_own_tools_take_the_cache(hub: Hub) -> None:
    """They see a repository in order, and remove all of it."""
    from huggingface_hub import scan_cache_dir

    folder, _ = fetch("org/name")
    found = scan_cache_dir()
    assert not found.warnings
    (repo,) = found.repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash, revision.refs) == ("org/name", commit_of(folder), {"main"})
    found.delete_revisions(revision.commit_hash).execute()
    assert not folder.exists()


def test_a_link_that_leaves_the_cache(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot, outside = Path(snapshot_download("org/name")), tmp_path / "outside"
    outside.write_bytes((snapshot / "tokenizer.json").read_bytes())
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(outside)
    with pytest.raises(VtpError, match=r"tokenizer\.json is a link that leaves the hub's cache"):
        local_bundle("org/name")


def test_paths_are_not_asked_about(hub: Hub, tmp_path: Path) -> None:
    """A folder of that name wins, and so does a path into a folder that is there."""
    for given in (
        "bundle",
        "./org/name",
        "../name",
        "/org/name",
        "org/name/",
        "a/b/c",
        "~/name",
        "org\\name",
    ):
        assert hub_name(given) is None, given
    assert hub_name(Path("org/name")) is None
    assert hub_name("org/name") == hub_name("hf://org/name") == HubName("org/name")
    (tmp_path / "org").mkdir()
    assert hub_name("org/name") is None and hub_name("org/name@v1") == HubName("org/name", "v1")
    with pytest.raises(VtpError, match=r"no bundle at org/name: no such folder.*hf://org/name"):
        Pipeline.load("org/name")
    (tmp_path / "org/name").mkdir()
    with pytest.raises(VtpError, match="org/name is not a bundle: it has no manifest"):
        Pipeline.load("org/name")
    assert hub_name("hf://org/name") == HubName("org/name")
    (tmp_path / "org/name@v1").mkdir()
    assert hub_name("org/name@v1") is None
    assert hub.asked == []


@pytest.mark.parametrize(
    ("given", "revision", "message"),
    [
        ("hf://name", None, "hf://name is not a name on the Hugging Face hub; give hf://ORG/NAME"),
        ("hf://a--b/name", None, "is not a name on the Hugging Face hub"),
        ("org/name@", None, "'' is not a revision"),
        ("org/name@../../x", None, "is not a revision; give a branch"),
        ("org/name@refs//x", None, "is not a revision"),
        ("org/name", 5, "5 is not a revision; give a branch"),
        (5, None, "a bundle is a path, or ORG/NAME of the hub, not 5"),
        (b"org/name", None, "a bundle is a path, or ORG/NAME of the hub, not b'org/name'"),
        ("org/name@v1", "v2", "has a revision, and revision= is another one"),
        (".", "v1", r"revision= belongs to a bundle of the hub, and \. is a path here"),
    ],
)
def test_names_that_are_none(hub: Hub, given: str, revision: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        local_bundle(given, revision)
    assert hub.asked == []


@pytest.mark.parametrize("given", ["x" * 5000, f"{'x' * 300}/y", "a\0b", Path("x" * 5000)])
def test_what_no_path_is_called_is_one_line(hub: Hub, given: str | Path) -> None:
    for load in (Pipeline.load, VtpForImageTextToText.from_pretrained):
        with pytest.raises(VtpError, match=r"^no bundle at ") as refused:
            load(given)
        assert len(str(refused.value)) < 140
    assert hub.asked == []


def test_a_login_page_is_not_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that answers everything with a page of its own: what the cache has is used."""
    folder, _ = fetch("org/name")
    page = b"<!doctype html><title>Welcome</title>"
    monkeypatch.setattr(Handler, "_route", lambda handler, _: handler._send(200, page, {}))
    again, said = fetch("org/name")
    assert again == folder
    assert "is used (what answered sends no JSON, so it is not the hub; a proxy or a login" in said[0]


def test_without_the_library(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(VtpError, match=r"which is not installed; run: pip install 'vtp-edge\[hub\]'"):
        local_bundle("org/name")
