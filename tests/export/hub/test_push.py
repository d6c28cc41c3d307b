"""Bundles pushed to a stand-in of the hub, and fetched from it again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vtp.engines import UsageError, VtpError
from vtp.export import cli
from vtp.export.hub.push import push, push_transformers_js
from vtp.export.request import Request
from vtp.runtime import Bundle, open_bundle
from vtp.runtime.hub.bundles import local_bundle

from ...stand_ins.hub_server import TOKEN, Hub, connect, serving


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, and a client that is logged in."""
    monkeypatch.chdir(tmp_path)
    with serving() as hub:
        connect(hub, tmp_path / "home", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def bundle(exported: Callable[[str], Any]) -> Path:
    folder: Path = exported("vispruner").folder
    return folder


def held(hub: Hub, name: str) -> dict[str, bytes]:
    found = hub.repos[name].at("main")
    assert found is not None
    return found[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_pushed_is_fetched_again(hub: Hub, bundle: Path) -> None:
    """All of it in one commit, beside a card that names method and counts."""
    said: list[str] = []
    pushed = push(bundle, "org/pruned", say=said.append)
    assert (pushed.repo, pushed.url) == ("org/pruned", f"{hub.url}/org/pruned")
    assert len(said) == 1 and re.fullmatch(r"org/pruned: 14 files, [\d.]+ [kM]B to send", said[0])
    assert list(hub.repos["org/pruned"].commits)[1:] == [pushed.commit]  # the first made it
    assert not hub.repos["org/pruned"].private
    files = held(hub, "org/pruned")
    assert files.keys() - contents(bundle).keys() == {"README.md", ".gitattributes"}
    folder = local_bundle(f"org/pruned@{pushed.commit}")
    assert contents(folder) == contents(bundle)
    text = files["README.md"].decode()
    visual = json.loads((bundle / "manifest.json").read_text())["visual"]
    assert f"{visual['count']} → {', '.join(map(str, visual['keep']))} visual tokens" in text
    assert 'Pipeline.load("org/pruned")' in text and "vtp-run org/pruned --image" in text


def test_a_second_bundle_takes_the_first_ones_place(hub: Hub, bundle: Path) -> None:
    """What the first had more is removed; a file that is not of it stays."""
    first = contents(bundle)
    manifest = json.loads(first["manifest.json"])
    manifest["files"]["pruner_9.onnx"] = {"sha256": hashlib.sha256(b"old").hexdigest(), "bytes": 3}
    first |= {"manifest.json": json.dumps(manifest).encode(), "pruner_9.onnx": b"old"}
    hub.repo("org/pruned", {**first, "notes.onnx": b"mine", "demo.png": b"mine"})
    push(bundle, "org/pruned")
    more = held(hub, "org/pruned").keys() - contents(bundle).keys()
    assert more == {"README.md", "notes.onnx", "demo.png"}
    assert contents(local_bundle("org/pruned")) == contents(bundle)


def test_private_is_private_or_refused(hub: Hub, bundle: Path) -> None:
    push(bundle, "org/secret", private=True)
    assert hub.repos["org/secret"].private
    push(bundle, "org/secret", private=True)
    push(bundle, "org/open")
    with pytest.raises(VtpError, match="org/open is on the hub and public, so --private cannot hold"):
        push(bundle, "org/open", private=True)


def no_token(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN")


def old_token(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", "hf_of_yesterday")


def offline(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def down(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.down = True


def checkpoint(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.repo("org/pruned", {"config.json": b"{}", "README.md": b"# mine"})


def nothing(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "situation", "message"),
    [
        ("pruned", nothing, "'pruned' is not a name on the Hugging Face hub; give ORG/NAME"),
        ("org/a/b", nothing, "'org/a/b' is not a name"),
        (5, nothing, "5 is not a name on the Hugging Face hub; give ORG/NAME"),
        ("org/pruned", no_token, "needs a token: log in with hf auth login, or set HF_TOKEN"),
        ("org/pruned", old_token, "does not accept the token it was given for org/pruned: log in"),
        ("org/pruned", offline, "HF_HUB_OFFLINE forbids to push org/pruned; unset it"),
        ("org/pruned", down, r"the hub did not take org/pruned: HfHubHTTPError: .*503"),
        ("org/pruned", checkpoint, r"holds config\.json and no manifest\.json, so it is something else"),
        ("stranger/pruned", nothing, "the hub forbids this of stranger/pruned: .*don't have the rights"),
    ],
)
def test_what_cannot_be_pushed(
    hub: Hub,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    situation: Callable[[Hub, pytest.MonkeyPatch], None],
    message: str,
) -> None:
    """One line, no secret in it, and nothing on the hub."""
    situation(hub, monkeypatch)
    before = {one: dict(repo.commits) for one, repo in hub.repos.items()}
    with pytest.raises(VtpError, match=message) as caught:
        push(bundle, name)
    text = str(caught.value)
    assert "\n" not in text and TOKEN not in text and "yesterday" not in text
    assert {one: repo.commits for one, repo in hub.repos.items()} == before
    assert not hub.sent


def test_a_base_model_of_no_name_is_refused(hub: Hub, bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"'a\\nb: c' is not a name on the Hugging Face hub"):
        push(bundle, "org/pruned", base_model="a\nb: c")
    assert hub.asked == []


def test_a_changed_bundle_is_not_pushed(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    data = (copy / "tokenizer.json").read_bytes()
    (copy / "tokenizer.json").write_bytes(data[:-1] + b" ")
    with pytest.raises(VtpError, match=r"tokenizer\.json does not have the manifest's sha256"):
        push(copy, "org/pruned")
    assert not hub.repos


# -- folders for transformers.js -----------------------------------------------------------------------------


def laid_out(folder: Path, **more: dict[str, str]) -> Path:
    """A folder with the record that names its files."""
    (folder / "onnx").mkdir(parents=True)
    files = {"onnx/decoder_model_merged.onnx": b"graph", "README.md": b"---\n---\n", "config.json": b"{}"}
    named = {path: {"sha256": hashlib.sha256(data).hexdigest()} for path, data in files.items()}
    for path, data in files.items():
        (folder / path).write_bytes(data)
    (folder / "vtp.json").write_text(json.dumps({"files": {**named, **more}}))
    return folder


def test_a_folder_for_transformers_js(hub: Hub, tmp_path: Path) -> None:
    """Its own card, its record, and what that names; not what lies beside it."""
    folder = laid_out(tmp_path / "js")
    (folder / "notes.txt").write_text("mine")
    push_transformers_js(folder, "org/js")
    assert held(hub, "org/js").keys() == {
        ".gitattributes",
        "README.md",
        "config.json",
        "onnx/decoder_model_merged.onnx",
        "vtp.json",
    }
    with pytest.raises(VtpError, match=r"org/js on the hub is laid out for transformers\.js, not a bundle"):
        local_bundle("org/js")


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "link", "onnx", "absent"])
def test_a_record_that_names_something_else(hub: Hub, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_text("secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    folder = laid_out(tmp_path / "js", **{path: {"sha256": digest}})
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(VtpError, match=r"is not what vtp\.json says of it"):
        push_transformers_js(folder, "org/js")
    assert not hub.repos


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_export_is_pushed(
    hub: Hub,
    exported: Callable[[str], Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    real: bool,
) -> None:
    """Not `real`: what the export gives was exported before."""

    def export(request: Request, *_: Any, **__: Any) -> Bundle:
        return open_bundle(shutil.copytree(exported("vispruner").folder, request.output))

    if not real:
        monkeypatch.setattr("vtp.export.exporter.export", export)
    small = ["--method", "none", "--verify", "none", "--max-length", "128", "-o", "out"]
    flags = ["--model", str(exported("vispruner").model), *small, "--push-to-hub", "org/pruned"]
    assert cli.main([*flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["hub"] == {
        "repo": "org/pruned",
        "commit": hub.repos["org/pruned"].refs["main"],
        "url": f"{hub.url}/org/pruned",
    }
    assert contents(local_bundle("org/pruned")) == contents(Path("out"))


def test_an_existing_bundle_is_pushed_by_the_command(
    hub: Hub, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    push_it = ["--from-bundle", str(bundle), "--push-to-hub", "org/pruned"]
    assert cli.main(push_it) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"pushed: {hub.url}/org/pruned (commit ") and "vtp-run org/pruned" in out
    for more, message in (
        (["--private"], "is on the hub and public"),
        (["--model", "x"], "is pushed as it is; leave out --model"),
        (["--keep-tokens", "3"], "is decided in the bundle of --from-bundle"),
    ):
        assert cli.main([*push_it, *more]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["--private", "--method", "none"]) == 2
    assert "give --push-to-hub ORG/NAME as well" in capsys.readouterr().err


def test_a_push_that_fails_after_the_export(
    hub: Hub, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle stays, and the line says how it is pushed then."""
    from vtp.export.hub import command

    args = cli_arguments("--push-to-hub", "org/pruned", "--private")
    hub.down = True
    again = f"vtp-export --from-bundle {bundle} --push-to-hub org/pruned --private"
    with pytest.raises(
        VtpError, match=re.escape(f"(the folder is whole in {bundle}; push it with: {again})")
    ):
        command.push_made(args, bundle, lambda _: None)


def cli_arguments(*flags: str) -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(flags)
