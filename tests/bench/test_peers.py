"""`vtp.bench.compare.peers`: its statistics, its report, and that a peer that fails stops nothing else."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vtp.bench.common import fewer_bits
from vtp.bench.common.agreement import agreement
from vtp.bench.common.figures import ratio, spread
from vtp.bench.common.kept_turns import KeptTurns, Turns, code, identity
from vtp.bench.common.pairs import BOTH, FLOAT, INT8
from vtp.bench.compare import peer, peers, worker
from vtp.bench.compare.peer import Spec, Stopwatch
from vtp.calib.quantize.layers import load_graph
from vtp.engines import UsageError, VtpError
from vtp.export.exporter import Request, export
from vtp.runtime.bundle.folder import open_bundle

from ..models.tiny import save_tiny
from .planted import RESULTS, contest


def test_spread_is_median_and_quartiles() -> None:
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == {"median": 3.0, "low": 2.0, "high": 4.0, "runs": 5}
    assert spread([]) == {"runs": 0}


def test_a_ratio_is_of_the_medians_that_are_shown() -> None:
    random = np.random.default_rng(1)
    theirs, ours = random.uniform(1, 9, 7), random.uniform(1, 9, 7)
    shown = spread(theirs)["median"] / spread(ours)["median"]
    assert ratio(theirs, ours)["ratio"] == pytest.approx(shown, rel=1e-12)


def test_a_slow_moment_of_the_machine_is_in_both() -> None:
    slow = np.array([1.0, 10.0, 1.0, 10.0, 1.0])  # of the machine: it meets both
    found = ratio(2 * slow, slow)
    assert found == {"ratio": 2.0, "low": 2.0, "high": 2.0}


def test_a_ratios_interval_holds_its_noise() -> None:
    random = np.random.default_rng(0)
    ours = random.uniform(0.9, 1.1, 200)
    found = ratio(1.5 * random.uniform(0.9, 1.1, 200), ours)
    assert found["low"] < found["ratio"] < found["high"]
    assert found["low"] == pytest.approx(1.5, rel=0.05) and found["high"] == pytest.approx(1.5, rel=0.05)
    with pytest.raises(ValueError, match="2 and 1 measurements"):
        ratio([1, 2], [1])


def test_agreement_counts_tokens_up_to_the_first_that_differs() -> None:
    logits = np.array([1.0, -4.0, 2.0], np.float32)
    same = agreement(([1, 2, 3], logits), ([1, 2, 4], logits + 1e-4))
    assert same["close"] and same["tokens"] == 2 and same["of"] == 3
    assert 1e-5 < same["difference"] < 2e-4
    assert not agreement(([1], logits), ([1], logits + 0.1))["close"]
    assert agreement(([1], logits), ([1], logits + 0.05), "int4")["close"]
    assert not agreement(([1], logits), ([2], logits), "int4")["close"]
    assert not agreement(([1], logits), ([2], logits))["close"]
    assert not agreement(([1], logits), ([1], logits[:2]))["close"]


def test_a_stopwatch_tells_first_and_further_tokens() -> None:
    watch = Stopwatch()
    for token in (7, 8, 9):
        watch.note(token)
    run = watch.run()
    assert run.tokens == [7, 8, 9] and run.tpot == pytest.approx((watch.times[2] - watch.times[0]) / 2)


def test_what_is_not_installed_is_named_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else object())
    assert peer.missing("openvino") == "pip install 'vtp-edge[peers]'"
    assert peer.missing("torch") == ""


@pytest.mark.parametrize(
    ("name", "bundle"), [("vtp", "vispruner"), ("vtp", "adaptprune"), ("vtp-decoder", "vispruner")]
)
def test_vtp_as_a_peer_makes_as_many_tokens_as_asked_for(
    exported: Any, picture_file: Path, tmp_path: Path, name: str, bundle: str
) -> None:
    made = exported(bundle)
    opened = peer.peer_class(name)(spec(made, picture_file, tmp_path))
    opened.open()
    logits, first, again = opened.first_logits(), opened.run(), opened.run()
    assert logits.dtype == np.float32 and logits.shape == (384,)
    assert first.tokens == again.tokens and len(first.tokens) == 5
    assert first.tokens[0] == int(logits.argmax())


def spec(made: Any, picture: Path, work: Path) -> Spec:
    return Spec(
        model=str(made.model),
        work=str(work),
        image=str(picture),
        prompt="what ?",
        tokens=5,
        threads=1,
        ids=[9, 8, 7, 6],
        keep=3,
        bundle=str(made.folder),
    )


def test_torch_answers_as_vtp_does(exported: Any, picture_file: Path, tmp_path: Path) -> None:
    """Unpruned, and with VisPruner put into transformers: equal tokens, and logits within 1e-4."""
    for name, bundle in (("torch", "none"), ("torch-vispruner", "vispruner")):
        told, answers = spec(exported(bundle), picture_file, tmp_path), []
        for kind in (name, "vtp"):
            if kind == "torch-vispruner":  # vtp takes the bundle's default keep-count
                told = Spec(**{**told.__dict__, "keep": 6})
            opened = peer.peer_class(kind)(told)
            opened.open()
            answers.append((opened.run().tokens, opened.first_logits()))
        found = agreement(*answers)
        assert found["close"] and found["tokens"] == 5 and found["difference"] < 1e-4, (name, found)


def test_a_worker_answers_over_pipes_and_tells_what_went_wrong(
    exported: Any, picture_file: Path, tmp_path: Path
) -> None:
    told = spec(exported("vispruner"), picture_file, tmp_path)
    with worker.Worker("vtp-decoder", told, tmp_path / "log") as one:
        assert len(one.run()["tokens"]) == 5 and one.logits().shape == (384,)
    broken = Spec(**{**told.__dict__, "bundle": str(tmp_path)})
    with pytest.raises(VtpError, match=r"peer vtp-decoder: VtpError: .* is not a bundle"):
        worker.Worker("vtp-decoder", broken, tmp_path / "log")


def test_a_worker_that_hangs_is_ended(
    exported: Any, picture_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LIMIT_S", 0.01)
    with pytest.raises(VtpError, match=r"peer vtp-decoder took longer than 0\.01 s"):
        worker.Worker("vtp-decoder", spec(exported("vispruner"), picture_file, tmp_path), tmp_path / "log")


def test_an_interrupt_waits_for_no_limit(
    exported: Any, picture_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker.Worker(
        "vtp-decoder", spec(exported("vispruner"), picture_file, tmp_path), tmp_path / "log"
    ) as one:

        class Interrupted:
            def readline(self) -> str:
                raise KeyboardInterrupt

        monkeypatch.setattr(one._process, "stdout", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            one._read()
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        for timer in timers:
            timer.join(timeout=30)  # of 900 seconds
        assert not any(timer.is_alive() for timer in timers)


class Planted:
    """A peer that answers in planted times; each call is one turn."""

    pid = "self"

    def __init__(self, *ms: float) -> None:
        self.ms = iter(ms)

    def run(self) -> dict[str, Any]:
        now = next(self.ms)
        return {"tokens": [1], "ttft": now, "tpot": now / 10}

    def logits(self) -> np.ndarray:
        return np.arange(4, dtype=np.float32)


def test_a_later_pair_does_not_change_what_an_earlier_one_found(tmp_path: Path) -> None:
    one = contest(tmp_path)
    one.bundles, one.kept = {}, KeptTurns(tmp_path / "turns.jsonl", {"time": "now"})
    one.results["peers"] = {name: {} for name in ("openvino", peers.BASE, "vtp adaptprune")}
    one._take_turns("openvino", Planted(100, 110), peers.BASE, Planted(50, 55))  # type: ignore[arg-type]
    one._take_turns("openvino", Planted(900, 900), "vtp adaptprune", Planted(300, 300))  # type: ignore[arg-type]
    first, second = one.results["pairs"]
    assert first["ms"]["openvino"]["ttft"]["median"] == 105 and first["ttft"]["ratio"] == 2
    assert second["ms"]["openvino"]["ttft"]["median"] == 900 and second["ttft"]["ratio"] == 3
    assert first["times"]["openvino"]["ttft"] == [100, 110]


def test_fewer_bits_are_asked_for_by_flags(tmp_path: Path) -> None:
    one = contest(tmp_path, int8=True, int4=True)
    assert one.precisions == (FLOAT, INT8, BOTH)
    assert one.fewer["vtp vispruner int8"] == ("vtp vispruner", INT8)
    assert one.fewer["vtp none int8 int4"] == ("vtp none", BOTH) and len(one.fewer) == 4
    assert one.extra["vtp vispruner int8"] == one.work / "vispruner-int8"
    assert one.chosen[-1] == "genai-int4" and one.results["flags"] == ["--int8", "--int4", "--rounds", "2"]
    assert {*INT8.peers, *BOTH.peers} <= {*one.chosen} and len({*one.chosen}) == len(one.chosen)
    alone = contest(tmp_path, int4=True, peers="torch")
    assert list(alone.fewer) == ["vtp vispruner int4", "vtp none int4"] and alone.chosen == ["torch"]
    few = contest(tmp_path, int4=True, peers="llamacpp")
    assert few.chosen == ["llamacpp", "llamacpp-f32-q4_0"]


def test_tower_reductions_take_part_in_float32_and_in_the_fewest_bits(tmp_path: Path) -> None:
    one = contest(tmp_path, int8=True, int4=True, towers="ipcv:0.35,tome:16")
    whole, few = "vtp vispruner, tower tome:16", "vtp vispruner int8 int4, tower tome:16"
    assert one.bundles[whole] == one.work / "vispruner-tome-16"
    assert one.extra[few] == one.work / "vispruner-int8-int4-tome-16"
    assert one.fewer[few] == (whole, BOTH) and whole not in one.fewer and len(one.towered) == 4
    assert one._export_flags(whole) == ["--method", "vispruner", "--keep-tokens", "3", "--tower", "tome:16"]
    assert one._export_flags("vtp none") == ["--method", "none"]
    assert one.results["towers"] == ["ipcv:0.35", "tome:16"]
    assert one.results["flags"][2:4] == ["--towers", "ipcv:0.35,tome:16"]
    assert [made.at for made in contest(tmp_path, towers="tome:16").towered] == [FLOAT]


def test_a_tower_reduction_is_held_against_the_bundle_without_it(tmp_path: Path) -> None:
    one = contest(tmp_path, int8=True, int4=True, towers="ipcv:0.35")
    assert [made.beside(RESULTS) for made in one.towered] == [
        ["transformers-onnx", "vtp vispruner"],
        ["openvino-int4", "llamacpp-q4_0", "vtp vispruner int8 int4"],
    ]


def test_another_bundle_is_held_against_peers_in_as_many_bits(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported("vispruner").folder
    one = contest(tmp_path, also=[f"mine={folder}"])
    assert one.also == {"vtp mine": (folder, FLOAT)}
    record = SimpleNamespace(manifest=SimpleNamespace(quantization={"vision": "int8", "decoder": "int4"}))
    monkeypatch.setattr(peers, "open_bundle", lambda _: record)
    assert contest(tmp_path, int8=True, int4=True, also=[f"mine={folder}"]).also["vtp mine"][1] is BOTH
    with pytest.raises(UsageError, match="no peers in as many bits: give --int8, --int4 or both"):
        contest(tmp_path, int8=True, also=[f"mine={folder}"])


def test_fewer_bits_are_alike_and_another_model_is_not(tmp_path: Path) -> None:
    one, random = contest(tmp_path, int8=True, int4=True), np.random.default_rng(0)
    logits = random.normal(size=2000).astype(np.float32)
    rounded = (
        logits + 0.3 * random.normal(size=2000).astype(np.float32) - 7
    )  # less a constant: log-probabilities

    class Told:
        def __init__(self, found: np.ndarray) -> None:
            self.found = found

        def run(self) -> dict[str, Any]:
            return {"tokens": [4, 5]}

        def logits(self) -> np.ndarray:
            return self.found

    one._note_answer("torch", Told(logits))  # type: ignore[arg-type]
    one._note_answer("openvino-int4", Told(rounded))  # type: ignore[arg-type]
    equal = one.results["peers"]["openvino-int4"]["equal"]
    assert equal["to"] == "torch" and 0.9 < equal["cosine"] < 0.99 and equal["tokens"] == 2
    with pytest.raises(peers.Aside, match="another rounding of one model"):
        one._note_answer("openvino-int8", Told(random.normal(size=2000)))  # type: ignore[arg-type]
    one._note_answer("vtp adaptprune", Told(-logits))  # type: ignore[arg-type]  # keeps other tokens
    assert "equal" not in one.results["peers"]["vtp adaptprune"]
    one.answers[peers.LLAMACPP_ORDER] = ([4, 5], logits)
    one._note_answer("llamacpp-q4_0", Told(rounded))  # type: ignore[arg-type]
    assert one.results["peers"]["llamacpp-q4_0"]["equal"]["to"] == peers.LLAMACPP_ORDER


def test_an_int4_bundle_of_a_tied_model_runs_with_its_head_in_int4(
    model_folder: Any, picture_file: Path, tmp_path: Path
) -> None:
    """What `--int4` makes: every layer of the decoder and the tied head, by the peer's own rounding."""
    source, made = tmp_path / "vispruner", tmp_path / "int4"
    export(Request(source, str(model_folder("tied")), "vispruner", "6", max_length=128, verify="none"))
    arguments = [str(source), str(made), "--vision", "none", "--decoder", "int4", "--threads", "1"]
    assert fewer_bits.main(arguments) == 0
    record = open_bundle(made).manifest.quantization
    nodes = load_graph(made / "decoder.onnx").graph.node
    layers = [node.op_type for node in nodes]
    columns = [item.i for node in nodes for item in node.attribute if item.name == "N"]
    wanted = [int(label.rpartition("x")[2].rstrip("]")) for label in record["layers"]]
    assert not record["left_in_float"] and sum(columns) == sum(wanted)
    assert "MatMul" not in layers and "Gemm" not in layers
    told = spec(SimpleNamespace(model=source, folder=made), picture_file, tmp_path)
    decoder = peer.peer_class("vtp-decoder")(told)
    decoder.open()
    assert len(decoder.run().tokens) == 5
    assert fewer_bits.main([str(source), str(made), "--vision", "int2"]) == 2


@pytest.mark.slow
def test_int8_and_int4_take_part_beside_the_peers(tmp_path: Path) -> None:
    """One command from a tiny model to the page: bundles in fewer bits, both decoders, equal answers."""
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    save_tiny(tmp_path / "tiny", tied=True, head_dim=16, vision_layers=2)
    arguments = ["--model", str(tmp_path / "tiny"), "--int8", "--int4", "--peers", "torch,genai"]
    arguments += ["--towers", "tome:1"]
    arguments += ["--keep", "6", "--rounds", "1", "--tokens", "5", "--threads", "1"]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert peers.main(arguments) == 0
    results = json.loads((tmp_path / "docs/bench.json").read_text())
    assert results["failed"] == {}
    pairs = {(pair["theirs"], pair["ours"]) for pair in results["pairs"]}
    wanted = {(f"vtp none {bits}", f"vtp vispruner {bits}") for bits in ("int8", "int8 int4")}
    wanted |= {(name, f"{name}, tower tome:1") for name in ("vtp vispruner", "vtp vispruner int8 int4")}
    assert wanted | {("genai", "vtp decoder"), ("genai-int4", "vtp decoder int4")} <= pairs
    text = (tmp_path / "docs/bench.md").read_text()
    assert f"| {BOTH.name}: vtp, all tokens, int8 encoder, int4 decoder |" in text
    assert "| vtp, vispruner, tower tome:1, beside vtp, vispruner |" in text
    assert "int4, the same weights" in text and "range of the turns" in text
    assert f"first token, vtp with all tokens, {BOTH.name} | at least 4.2 times" in text
    assert "The run was made in parts" not in text
    held = len(results["pairs"])
    assert peers.main(arguments) == 0  # nothing is measured again
    again = json.loads((tmp_path / "docs/bench.json").read_text())
    assert again["kept"]["pairs"] == held and again["pairs"] == results["pairs"]
    assert f"found {held} pairs done" in (tmp_path / "docs/bench.md").read_text()


def test_an_ended_run_goes_on_with_the_pairs_that_it_lacks(tmp_path: Path) -> None:
    """By the file alone: a pair counts where names, bundles, settings and code are the same."""
    file, settings = tmp_path / "turns.jsonl", {"rounds": 2, "code": "a", "time": "now"}
    first = KeptTurns(file, settings)
    turns = Turns({"torch": {"ttft": [3.0, 4.0]}, "vtp": {"ttft": [1.0, 2.0]}}, {"torch": 7, "vtp": 5})
    first.add({"torch": "", "vtp": "one"}, turns)
    first.add({"openvino": "", "vtp": "one"}, turns)
    with file.open("a") as out:
        out.write('{"pair": [["genai"')  # killed while it wrote
    again = KeptTurns(file, {**settings, "time": "later"})
    assert again.begun == "now" and again.get({"torch": "", "vtp": "one"}) == turns and again.used == 1
    assert again.get({"torch": "", "vtp": "another"}) is None and again.get({"vtp": "one"}) is None
    again.add({"genai": "", "vtp": "one"}, turns)
    assert KeptTurns(file, settings).get({"genai": "", "vtp": "one"}) == turns
    other = KeptTurns(file, {**settings, "code": "b"})
    assert other.get({"torch": "", "vtp": "one"}) is None and other.begun == "now"
    assert KeptTurns(file, {**settings, "code": "b"}).get({"torch": "", "vtp": "one"}) is None


def test_what_a_bundle_and_the_code_are_known_by(exported: Any) -> None:
    folders = [exported(name).folder for name in ("vispruner", "none")]
    assert identity(None) == "" and len({identity(folder) for folder in folders}) == 2
    assert code(peer) == code(peer) and len(code(peer)) == 64


def test_bad_flags_are_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"peers": "torch,excel"}, "unknown peer 'excel'; peers: torch"),
        ({"also": ["int8"]}, "'int8' is not NAME=DIR"),
        ({"rounds": "0"}, "rounds '0' is not a whole number"),
        ({"towers": "ipvc:0.35"}, "unknown tower reduction 'ipvc'; did you mean 'ipcv'"),
        ({"towers": "tome:16,none"}, "'none' reduces nothing"),
    ):
        with pytest.raises(UsageError, match=message):
            contest(tmp_path, **changes)


def test_a_peer_that_fails_stops_nothing_else(tmp_path: Path) -> None:
    one = contest(tmp_path)

    def fail() -> None:
        raise VtpError("it fell over")

    one._aside("openvino", fail)
    assert one.results["failed"] == {"openvino": "it fell over"}
    assert one._able(("torch", "openvino")) == ["torch"]


def test_a_peer_with_other_answers_is_not_timed(tmp_path: Path) -> None:
    one = contest(tmp_path)

    class Odd:
        def __init__(self, shift: float) -> None:
            self.shift = shift

        def run(self) -> dict[str, Any]:
            return {"tokens": [1, 2], "ttft": 1.0, "tpot": 1.0}

        def logits(self) -> np.ndarray:
            return np.arange(4, dtype=np.float32) + self.shift

    one._note_answer("torch", Odd(0.0))  # type: ignore[arg-type]
    one._note_answer("openvino", Odd(1e-6))  # type: ignore[arg-type]
    assert one.results["peers"]["openvino"]["equal"]["to"] == "torch"
    with pytest.raises(peers.Aside, match=r"its answer is not torch's, logits: row 0 differs"):
        one._note_answer("transformers-onnx", Odd(1.0))  # type: ignore[arg-type]
