"""vtp-export: what it prints; for whatever is wrong one line, the right exit code, and nothing on disk."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vtp.engines import UsageError
from vtp.export.cli import main
from vtp.export.keep_counts import check_keep, keep_for_ratio, parse_keep
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.commands.run import main as run_main

BIN = Path(sys.executable).parent
PROGRESS = re.compile(r"\[ *\d+\.\d s\] \d+\. [a-z].*")


def run(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def refuse(
    argv: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str], silent: bool = False
) -> None:
    """The command fails with one line of error, below nothing but progress; with `silent` not even that."""
    assert run(argv) == code
    out, err = capfd.readouterr()
    *progress, last = err.splitlines()
    assert out == ""
    assert last.startswith("vtp-export: error: ") and re.search(message, last), last
    assert len(last) < 500
    assert all(PROGRESS.fullmatch(line) for line in progress), err
    assert not (silent and progress), err


@pytest.fixture
def spoil(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> Callable[[Callable[[Path], object]], list[str]]:
    """Copies the smallest model, lets a function spoil it, and gives the command that would export it."""

    def make(change: Callable[[Path], object]) -> list[str]:
        folder = Path(shutil.copytree(model_folder("mha"), tmp_path / "model"))
        change(folder)
        (tmp_path / "work").mkdir()
        return [
            "--model",
            str(folder),
            "--verify",
            "none",
            "--method",
            "none",
            "-o",
            str(tmp_path / "work" / "out"),
        ]

    return make


def nothing_left(tmp_path: Path) -> bool:
    return not list((tmp_path / "work").iterdir())


# -- bad models ----------------------------------------------------------------------------------------------


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file, "a__b" for nested ones; ... removes."""

    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        for path, value in changes.items():
            *steps, last = path.split("__")
            place = data
            for step in steps:
                place = place[step]
            if value is ...:
                place.pop(last, None)
            else:
                place[last] = value
        (folder / name).write_text(json.dumps(data))

    return change


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return act


def without(part: str) -> Callable[[Path], None]:
    return tensors(lambda found: {name: tensor for name, tensor in found.items() if part not in name})


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def misshapen(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(name for name in found if name.endswith("layers.0.mlp.up_proj.weight") and "language" in name)
    return {**found, name: found[name][:-1].contiguous()}


def endless(folder: Path) -> None:
    edit("generation_config.json", eos_token_id=...)(folder)
    edit("tokenizer_config.json", eos_token=...)(folder)


CONFIG, LLAVA = "config.json", "LlavaForConditionalGeneration"
BLIP = "Blip2ForConditionalGeneration"
BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (remove(CONFIG), "it has no config.json"),
    "config is no JSON": (write(CONFIG, b"{"), r"cannot read .*config\.json: JSONDecodeError"),
    "config is no text": (write(CONFIG, b"\xff\xfe"), r"cannot read .*config\.json"),
    "config is a list": (write(CONFIG, b"[]"), "does not hold a JSON object"),
    "architecture": (
        edit(CONFIG, architectures=[BLIP], model_type="blip-2"),
        f"unsupported architecture {BLIP}; supported: .*{LLAVA}",
    ),
    "no architecture": (
        edit(CONFIG, architectures=..., model_type="odd"),
        "unsupported architecture none .model_type 'odd'",
    ),
    "architecture is a number": (
        edit(CONFIG, architectures=[3], model_type=...),
        "unsupported architecture 3",
    ),
    "decoder": (
        edit(CONFIG, text_config__model_type="gemma"),
        "decoder is 'gemma'; supported decoders: llama",
    ),
    "tower": (
        edit(CONFIG, vision_config__model_type="vit"),
        "tower is 'vit'; supported towers: clip_vision_model",
    ),
    "feature layers": (
        edit(CONFIG, vision_feature_layer=[-1, -2]),
        r"vision_feature_layer is \[-1, -2\]; only one",
    ),
    "feature layer": (
        edit(CONFIG, vision_feature_layer=-9),
        "vision_feature_layer -9 is not one of the tower's 2",
    ),
    "strategy": (
        edit(CONFIG, vision_feature_select_strategy="full"),
        "'full' with a 'clip_vision_model' tower",
    ),
    "rotary": (
        edit(CONFIG, text_config__rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "rotary embedding is 'dynamic'; supported: default",
    ),
    "positions": (
        edit(CONFIG, text_config__max_position_embeddings=16),
        "knows 16 positions: too few for its 16",
    ),
    "image token": (edit(CONFIG, image_token_index=99, image_token_id=99), "cannot be prompted: .*id 4"),
    "no tokenizer": (remove("tokenizer.json"), r"has no tokenizer: one of tokenizer\.json"),
    "bad tokenizer": (write("tokenizer.json", b"{}"), "cannot load the tokenizer"),
    "no processor": (remove("preprocessor_config.json", "processor_config.json"), "has no image processor"),
    "bad processor": (write("preprocessor_config.json", b"?"), r"cannot read .*preprocessor_config\.json"),
    "other size": (
        edit("processor_config.json", image_processor__crop_size={"height": 70, "width": 70}),
        r"makes \(70, 70\) pixels",
    ),
    "odd processor": (
        edit("processor_config.json", image_processor__image_processor_type="Odd"),
        "'Odd' is not supported; supported",
    ),
    "bad template": (write("chat_template.jinja", b"{% if %}"), "cannot be prompted: .*does not compile"),
    "template without image": (write("chat_template.jinja", b"hello"), "cannot be prompted: "),
    "no end": (endless, "names no end-of-sequence token; add eos_token_id"),
    "odd end": (edit("generation_config.json", eos_token_id="x"), "eos_token_id of .* is 'x'; give an id"),
    "missing tensor": (
        without("layers.1.mlp.up_proj"),
        r"lacks the tensor model\.language_model\.layers\.1\.mlp",
    ),
    "extra tensor": (
        tensors(lambda found: {**found, "model.language_model.layers.9.x": torch.ones(3)}),
        r"no place for: model\.language_model\.layers\.9\.x",
    ),
    "misshapen tensor": (tensors(misshapen), r"up_proj\.weight as \[31, 16\]; its config says \[32, 16\]"),
    "truncated weights": (cut, "cannot load the model in .*SafetensorError"),
    "garbage weights": (write("model.safetensors", b"garbage" * 50), "SafetensorError"),
    "empty weights": (write("model.safetensors", b""), "SafetensorError"),
    "lost shard": (lost_shard, "No such file or directory: .*model-00002-of-00002"),
    "pickled weights": (pickled, r"has no \*\.safetensors; vtp loads no pickled weights"),
}
# Known from the folder alone: said before anything is loaded, with no other line at all.
AT_ONCE = {"no config", "architecture", "decoder", "tower", "feature layers", "no tokenizer", "no processor"}
AT_ONCE |= {"pickled weights", "config is no JSON", "config is a list"}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(
    spoil: Callable[[Callable[[Path], object]], list[str]],
    tmp_path: Path,
    name: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    change, message = BAD_MODELS[name]
    argv = spoil(change)
    capfd.readouterr()
    refuse(argv, 1, message, capfd, silent=name in AT_ONCE)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/folder", "no such model folder: /no/such/folder; give a folder"),
        ("./nothing", "no such model folder: ./nothing"),
        ("nothing", "no such model folder: nothing"),
        ("README.md", "model README.md is a file"),
    ],
)
def test_no_such_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "README.md").write_text("x")
    monkeypatch.chdir(tmp_path)
    refuse(["--model", model, "-o", "out"], 1, re.escape(message), capfd, silent=True)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_hub_id_without_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    message = "org/name; .* the hub did not give it .ConnectionError: Name or service not known"
    refuse(["--model", "org/name", "-o", str(tmp_path / "out")], 1, message, capfd)


# -- bad flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "adaptprun"], "unknown method 'adaptprun'; did you mean 'adaptprune'.; methods: none"),
        (["--method", ""], "unknown method ''"),
        (["--method", "./mine.py:Mine"], "method file mine.py does not exist"),
        (["--method", "./mine.py"], "FILE.py:CLASS"),
        (["--keep-tokens", "0"], "keep-tokens 0 keeps nothing"),
        (["--keep-tokens", "-1"], "keep-tokens -1 keeps nothing"),
        (
            ["--keep-tokens", "17"],
            "keep-tokens 17 exceeds the 16 visual tokens of this model; choose 1 to 16",
        ),
        (["--keep-tokens", "4,17"], "keep-tokens 17 exceeds"),
        (["--keep-tokens", "4:20:4"], "keep-tokens 20 exceeds"),
        (["--keep-tokens", "x"], "keep-tokens 'x' is not a whole number, a list"),
        (["--keep-tokens", ""], "keep-tokens '' is not"),
        (["--keep-tokens", "4,"], "keep-tokens '4,' is not"),
        (["--keep-tokens", "1:2"], "keep-tokens '1:2' is not"),
        (["--keep-tokens", "9:1:1"], "FIRST <= LAST"),
        (["--keep-tokens", "1:9:0"], "STEP >= 1"),
        (["--keep-tokens", "1:99999999:1"], "more than 4096 counts"),
        (["--keep-tokens", "5.0"], "keep-tokens '5.0' is not"),
        (["--prune-ratio", "1.01"], "prune-ratio 1.01 is outside 0 to 1"),
        (["--prune-ratio", "-0.5"], "prune-ratio -0.5 is outside"),
        (["--prune-ratio", "nan"], "prune-ratio nan is outside"),
        (["--prune-ratio", "90%"], "prune-ratio '90%' is not a number"),
        (["--prune-ratio", "0.5", "--keep-tokens", "4"], "either --keep-tokens or --prune-ratio"),
        (["--method", "none", "--keep-tokens", "4"], "method none keeps all 16 visual tokens"),
        (["--method", "none", "--prune-ratio", "0.5"], "method none keeps all 16"),
        (["--method", "none", "--method-option", "r=1"], "method none has no options"),
        (["--method", "vispruner", "--method-option", "r"], "'r' is not of the form name=value"),
        (["--method", "vispruner", "--method-option", "r=2"], "r 2.0 is outside 0 to 1"),
        (["--method", "vispruner", "--method-option", "rr=1"], "no option 'rr'; did you mean 'r'"),
        (["--method", "vispruner", "--method-option", "positions=odd"], "takes compact or original"),
        (["--method", "vispruner", "--method-option", "positions"], "'positions' is not of the form"),
        (["--method-option", "positions=original", "--method-option", "positions=compact"], "given twice"),
        (["--method", "fastv", "--method-option", "positions=compact"], "takes original only"),
        (["--method", "fastv"], "prunes before decoder layer 2, but this model has 2 layers"),
        (["--target", "tensort"], "unknown target 'tensort'; choose one of ort, tensorrt, jetpack6"),
        (["--dtype", "bfloat16"], "unknown dtype 'bfloat16'; choose one of float32, float16"),
        (["--verify", "maybe"], "unknown verify 'maybe'"),
        (["--max-length", "17"], "max-length 17 is outside 18 to 1024"),
        (["--max-length", "9999"], "max-length 9999 is outside 18 to 1024"),
        (["--max-length", "1e3"], "max-length '1e3' is not a whole number"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["stray"], "unrecognized arguments: stray"),
        (["--keep-tokens"], "expected one argument"),
    ],
)
def test_bad_flags(
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    argv = [
        "--model",
        str(model_folder("mha")),
        "--method",
        "vispruner",
        "--verify",
        "none",
        "-o",
        "out",
        *flags,
    ]
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    refuse(argv, 2, message, capfd)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_exist(
    exported: Callable[[str], Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All are refused before the model is loaded, and stay as they are."""
    made = exported("mha")
    bundle = Path(shutil.copytree(made.folder, tmp_path / "bundle"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "desk").mkdir()
    (tmp_path / "desk" / "thesis").write_text("x")
    capfd.readouterr()
    model = ["--model", str(made.model), "--method", "none"]
    refuse([*model, "-o", str(bundle)], 2, "exists; choose another folder or add --overwrite", capfd, True)
    refuse([*model, "-o", str(tmp_path / "file"), "--overwrite"], 2, "is a file", capfd, True)
    refuse([*model, "-o", str(tmp_path / "desk")], 2, "add --overwrite", capfd, True)
    refuse([*model, "-o", str(tmp_path / "desk"), "--overwrite"], 2, "is not a bundle", capfd, True)
    refuse([*model, "-o", "", "--overwrite"], 2, "the path is empty", capfd, True)
    refuse([*model, "-o", ".", "--overwrite"], 2, "holds the folder you are in", capfd, True)
    refuse([*model, "-o", str(tmp_path / "file" / "out")], 1, "cannot write to|cannot be used", capfd)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "file", "desk"}
    open_bundle(bundle, check_hashes=True)


@pytest.mark.parametrize("place", ["ir.save", "WeightStore._append"])
def test_a_full_disk_leaves_nothing(
    spoil: Callable[[Callable[[Path], object]], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    argv = spoil(lambda folder: None)
    monkeypatch.setattr(f"vtp.export.onnx.emit.{place}", full)
    capfd.readouterr()
    refuse(argv, 1, "No space left on device; nothing was left behind", capfd)
    assert nothing_left(tmp_path)


def _listen_to_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_an_export_that_is_stopped_half_way(
    exported: Callable[[str], Any], tmp_path: Path, sign: signal.Signals
) -> None:
    """The old bundle stays; an interrupted run cleans up, and after a killed one the next run does."""
    made = exported("mha")
    bundle = Path(shutil.copytree(made.folder, tmp_path / "bundle"))
    argv = ["--model", str(made.model), "--method", "none", "-o", str(bundle), "--overwrite"]
    command = [str(BIN / "vtp-export"), *argv]
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # A shell's background job ignores SIGINT and hands that down: the command is started as from a terminal.
    with subprocess.Popen(command, preexec_fn=_listen_to_interrupts, **streams) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("export projector" in line for line in lines)
        process.send_signal(sign)
        rest = list(lines)
    open_bundle(bundle, check_hashes=True)
    if sign == signal.SIGINT:
        assert process.returncode == 130
        assert rest[-1] == "vtp-export: error: interrupted; nothing was left behind\n"
        assert not [line for line in rest[:-1] if not PROGRESS.fullmatch(line.rstrip())]
    else:
        assert len(list(tmp_path.iterdir())) == 2
        (bundle / "decoder.onnx.data").write_bytes(b"")  # even a damaged bundle is replaced
        assert run([*argv, "--verify", "none"]) == 0
        open_bundle(bundle, check_hashes=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


# -- outside methods -----------------------------------------------------------------------------------------

MINE = """
import torch
from vtp.export.pruners.base import Pruner

class Mine(Pruner):
    \"\"\"Keeps the tokens with the largest first number.\"\"\"
    name = "mine"
    site = "projector"
    needs = ("image_embeds",)
    options = {"channel": 0}

    def forward(self, image_embeds):
        from vtp.export.pruners import ops
        return ops.raster(ops.top_k(image_embeds[:, :, self.settings["channel"]].float(), self.keep))

class Unsorted(Mine):
    name = "unsorted"
    def forward(self, image_embeds):
        return super().forward(image_embeds).flip(1)

class Twice(Mine):
    name = "twice"
    def forward(self, image_embeds):
        return torch.zeros(image_embeds.shape[0], self.keep, dtype=torch.int64)

class Fewer(Mine):
    name = "fewer"
    def forward(self, image_embeds):
        return super().forward(image_embeds)[:, 1:]

class Floats(Mine):
    name = "floats"
    def forward(self, image_embeds):
        return super().forward(image_embeds).float()

class Nothing(Mine):
    name = "nothing"
    def forward(self, image_embeds):
        return None

class Raises(Mine):
    name = "raises"
    def forward(self, image_embeds):
        raise ValueError("no such\\nchannel")

class Chance(Mine):
    name = "chance"
    def forward(self, image_embeds):
        return super().forward(image_embeds + 0 * torch.rand_like(image_embeds))

class Layers(Mine):
    name = "layers"
    site = "decoder"
    needs = ("hidden_states",)
    @classmethod
    def sites(cls, layers, count, keep, settings):
        return [1]
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Unsorted", "not ascending"),
        ("Twice", "without repeats"),
        ("Fewer", r"returns torch.int64 \[2, 3\]; keep_indices must be torch.int64 \[batch, 4\]"),
        ("Floats", "returns torch.float32"),
        ("Nothing", "returns NoneType"),
        ("Raises", r"method raises: forward\(\) fails: ValueError: no such channel \(--debug"),
        ("Layers", r"method layers: sites\(\) fails: TypeError"),
    ],
)
def test_an_outside_method_that_chooses_wrongly(
    model_folder: Callable[[str], Path],
    mine: Path,
    name: str,
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = str(model_folder("mha"))
    capfd.readouterr()
    argv = [
        "--model",
        model,
        "--method",
        f"{mine}:{name}",
        "--keep-tokens",
        "4",
        "-o",
        str(mine.parent / "out"),
    ]
    refuse(argv, 1, message, capfd)
    assert not (mine.parent / "out").exists()


def test_an_outside_method_whose_graph_no_bundle_may_hold(
    model_folder: Callable[[str], Path], mine: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Refused while it is written, unverified or not: no bundle is left that cannot be opened."""
    model, out = str(model_folder("mha")), mine.parent / "out"
    capfd.readouterr()
    argv = ["--model", model, "--method", f"{mine}:Chance", "--keep-tokens", "4", "--verify", "none"]
    refuse([*argv, "-o", str(out)], 1, r"pruner\.onnx has random numbers \(Random\w+\)", capfd)
    assert not out.exists()


def test_an_outside_method_exports_as_json_and_runs(
    model_folder: Callable[[str], Path],
    mine: Path,
    picture_file: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model, out = str(model_folder("mha")), mine.parent / "out"
    capfd.readouterr()
    argv = [
        "--model",
        model,
        "--method",
        f"{mine}:Mine",
        "--method-option",
        "channel=3",
        "--keep-tokens",
        "2,5",
    ]
    assert run([*argv, "-o", str(out), "--json", "--dtype", "float16"]) == 0
    text, err = capfd.readouterr()
    data = json.loads(text)
    assert data["visual_tokens"] == {"before": 16, "after": 5} and data["keep_tokens"] == [2, 5]
    assert data["method"] == "mine" and data["bundle"] == str(out) and data["parity"]["mode"] == "full"
    assert data["bytes"] == sum(info.bytes for info in open_bundle(out).manifest.files.values())
    assert all(PROGRESS.fullmatch(line) for line in err.splitlines())
    assert "\r" not in err and "\033" not in err
    assert open_bundle(out).manifest.method.options == {"channel": 3}
    for keep in (2, 5):
        ask = [
            str(out),
            "--image",
            str(picture_file),
            "--prompt",
            "what ?",
            "--keep-tokens",
            str(keep),
            "--json",
        ]
        assert run_main([*ask, "--max-new-tokens", "3"]) == 0
        answer = json.loads(capfd.readouterr().out)
        assert answer["visual_tokens"] == {"before": 16, "after": keep} and len(answer["kept"]) == keep


# -- what a good export prints -------------------------------------------------------------------------------


def test_the_report(model_folder: Callable[[str], Path], tmp_path: Path, picture_file: Path) -> None:
    """The command itself, checked fully: table, counts, fidelity, and a next command that works."""
    out = tmp_path / "new" / "bundle"
    argv = [
        "--model",
        str(model_folder("mha")),
        "--method",
        "vispruner",
        "--prune-ratio",
        "0.6",
        "-o",
        str(out),
    ]
    done = subprocess.run([str(BIN / "vtp-export"), *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["stage", "file", "MB", "parity"]
    rows = {line.split()[0]: line.split() for line in lines[2:8]}
    assert list(rows) == ["vision_encoder", "pruner", "projector", "embed_tokens", "splice", "decoder"]
    for stage, row in rows.items():
        assert row[1] == f"{stage}.onnx" and (out / row[1]).is_file()
        size = sum(
            (out / name).stat().st_size for name in (row[1], f"{row[1]}.data") if (out / name).exists()
        )
        assert float(row[2]) == round(size / 1e6, 2)
    assert "indices equal" in lines[3] and "end to end" in lines[7]
    assert "visual tokens 16 → 6" in done.stdout  # floor(16 * 0.4 + 1e-6)
    assert "16 of 16 greedy tokens equal torch's" in done.stdout
    assert all(PROGRESS.fullmatch(line) for line in done.stderr.splitlines()), done.stderr
    assert len(done.stderr.splitlines()) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bundle"]
    following = lines[-1]
    assert following.startswith(f"next: vtp-run {out} --image")
    words = shlex.split(following.removeprefix("next: ").replace("PICTURE", str(picture_file)))
    again = subprocess.run([str(BIN / words[0]), *words[1:]], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr


def test_optimum_cli_is_the_same_command(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    optimum = [str(BIN / "optimum-cli"), "export", "vtp"]
    shown = subprocess.run([*optimum, "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0 and "--prune-ratio" in shown.stdout and "--keep-tokens" in shown.stdout
    argv = [
        "--model",
        str(model_folder("mha")),
        "--method",
        "uniform",
        "--keep-tokens",
        "4",
        "--verify",
        "none",
    ]
    done = subprocess.run(
        [*optimum, *argv, "-o", str(tmp_path / "out"), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["visual_tokens"] == {"before": 16, "after": 4}
    open_bundle(tmp_path / "out", check_hashes=True)
    wrong = subprocess.run(
        [*optimum, *argv, "-o", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("vtp-export: error: output")
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        ("--list-methods", ["none", "random", "uniform", "fastv", "vispruner", "adaptprune"]),
        ("--list-families", ["llava"]),
    ],
)
def test_lists(flag: str, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([flag]) == 0
    text = capsys.readouterr().out
    assert {line.split()[0] for line in text.splitlines()[2:]} >= set(names)
    assert run([flag, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {next(iter(row.values())) for row in rows} >= set(names)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [str(BIN / "vtp-export"), "--method", "nope", "-o", str(tmp_path / "out"), "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr and "UsageError: unknown method 'nope'" in done.stderr


def test_without_torch_the_extra_is_named(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from vtp.export.cli import main; sys.exit(main(sys.argv[1:]))\n"
    )
    argv = ["--method", "none", "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "vtp-edge[export" in done.stderr


def test_a_current_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {shlex.quote(str(gone))} && rmdir ../gone && {BIN / 'vtp-export'} -o {tmp_path / 'out'}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "vtp-export: error: the current folder no longer exists" in done.stderr


# -- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "count", "keep"),
    [
        (0.0, 576, 576),
        (0.9, 576, 57),
        (0.5, 576, 288),
        (1.0, 576, 1),
        (0.999, 576, 1),
        (0.8, 10, 2),  # 10 * (1 - 0.8) is 1.9999999999999996
        (0.9, 10, 1),
        (0.1, 10, 9),
        (0.7, 10, 3),
        (0.6, 16, 6),
    ],
)
def test_prune_ratio_arithmetic(ratio: float, count: int, keep: int) -> None:
    assert keep_for_ratio(ratio, count) == keep


def test_exact_ratios_never_lose_a_token_to_rounding() -> None:
    for count in range(1, 700):
        for dropped in range(count):
            assert keep_for_ratio(dropped / count, count) == count - dropped


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("64", [64]),
        (" 64 , 32", [32, 64]),
        ("32:128:32", [32, 64, 96, 128]),
        ("32:100:32", [32, 64, 96]),
        ("8,8,4:8:2", [4, 6, 8]),
        ("+5", [5]),
    ],
)
def test_keep_counts(text: str, counts: list[int]) -> None:
    assert parse_keep(text) == counts


@pytest.mark.parametrize(
    "text", ["", " ", "a", "1.5", "1-3", "1:2", "1:2:3:4", ",", "١", "0x10", "1_0", "--5"]
)
def test_keep_counts_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_keep(text)


@pytest.mark.parametrize("counts", [[0], [-1], [577], [64, 577]])
def test_keep_counts_out_of_range(counts: list[int]) -> None:
    with pytest.raises(UsageError, match="choose 1 to 576"):
        check_keep(counts, 576)
