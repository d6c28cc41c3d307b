"""What tests share: tiny random models on disk and the bundles exported from them, each made once."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vtp.engines  # noqa: F401  (turns ONNX Runtime's telemetry off before any test imports it)

from .once import Once

if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):
    # A shell has what it starts in the background ignore Ctrl-C, and the commands under test inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(getattr(signal, "SIGHUP", signal.SIGINT)) is signal.SIG_IGN
):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored

MAX_LENGTH = 128

# Tiny models by name: options of tests/models/tiny.py's `save_tiny`. Every one has 16 visual tokens.
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {"layers": 3},
    "mha": {"layers": 2, "heads": 2, "kv_heads": 2, "vision_layers": 2, "seed": 1},
    "qwen2": {"layers": 2, "decoder": "qwen2", "vision_layers": 2, "seed": 2},
    "mistral": {"layers": 2, "decoder": "mistral", "vision_layers": 2, "seed": 3},
    "tied": {"layers": 3, "tied": True, "vision_layers": 2, "seed": 4},
    "siglip": {"layers": 2, "vision": "siglip", "seed": 5},
    "four": {"layers": 4, "vision_layers": 2, "seed": 6},
}

# Bundles by name: the model, and fields of vtp.export.exporter's Request.
BUNDLES: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("gqa", {"method": "none"}),
    "vispruner": ("gqa", {"method": "vispruner", "keep_tokens": "3,6"}),
    "original": (
        "gqa",
        {"method": "vispruner", "keep_tokens": "3,6", "method_options": ["positions=original"]},
    ),
    "adaptprune": ("gqa", {"method": "adaptprune", "keep_tokens": "4,7"}),
    "fastv": ("gqa", {"method": "fastv", "keep_tokens": "5"}),
    "float16": ("gqa", {"method": "vispruner", "keep_tokens": "6", "dtype": "float16"}),
    "change": ("gqa", {"method": "change", "keep_tokens": "3"}),
    "stc": (
        "gqa",
        {
            "method": "vispruner",
            "keep_tokens": "6",
            "tower": "stc:0.25",
            "tower_options": ["every=4", "alike=0.8"],
            "verify": "full",
        },
    ),
    "jetpack6": ("gqa", {"method": "adaptprune", "keep_tokens": "5", "target": "jetpack6", "verify": "full"}),
    "mha": ("mha", {"method": "none"}),
    "qwen2": ("qwen2", {"method": "none"}),
    "mistral": ("mistral", {"method": "none"}),
    "tied": ("tied", {"method": "adaptprune", "keep_tokens": "16"}),
    "siglip": ("siglip", {"method": "vispruner", "keep_tokens": "5"}),
}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache of this run: tests leave nothing in the real one."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


# The long tail: cases of seconds to minutes whose kind another case of the default tier holds as well. They
# are marked slow here, in one place, for `make test-all`; each group says which case holds its kind.
LONG_TAIL = re.compile(
    "|".join(
        (
            # Families: one unpruned bundle, one pruned in the tower or at the projector and, where positions
            # or attention are its own, one pruned in the decoder stay.
            r"test_anyres.*test_pruned_equals_the_torch_reference\[(next-fastv|onevision-vispruner)\]",
            r"test_anyres.*\[next-none\]",  # next-vispruner, onevision-none
            r"test_split.*\[internvl-vispruner\]",  # internvl-none, idefics3-vispruner
            r"test_onevision_videos.*test_a_pruned_video_equals_the_torch_reference",  # test_video_llava's
            r"test_split.*test_pruned_equals_the_torch_reference\[idefics3-fastv\]",  # qwen, gemma
            r"test_video_llava.*test_a_picture_equals_transformers",  # its videos; pictures are llava's
            r"test_qwen.*test_pruned_equals_the_torch_reference\[(2|3)-fastv\]",
            r"test_qwen.*test_the_reference_chooses_alike\[2-fastv\]",  # 3-fastv
            r"test_absent_ids.*test_answers_equal_transformers\[gemma3\]",  # pali
            r"test_settings.*test_answers_of_a_folder_that_contradicts_itself.*\[(idefics3|qwen)",  # llava
            r"test_settings.*contradicts_itself_is_read.*\[(gemma4|llava_next_video)\]",  # gemma3, llava_next
            # Reductions in the tower: llava-ipcv and llava_next-tome stay, and every formula.
            r"test_reductions.*test_a_family_answers_as_its_reduced_torch_model\[(idefics3|internvl|.*gemma)",
            r"test_reductions.*test_a_family_answers_as_its_reduced_torch_model\[(llava_one|video_l|smolvlm)",
            r"towers.test_commands.*test_tensorrt_rtx_builds_it\[(tome|down)",
            r"test_reductions.*test_a_family_answers_about_smaller_pictures\[paligemma\]",  # llava
            r"test_text_only.*\[gemma3-fastv\]",  # qwen3_vl-fastv
            r"test_sites.*test_generation_is_verified_at_every_keep_count\[CuriousDecoder\]",  # its cues
            # Sites: CuriousDecoder has three, CuriousProjector reads the prompt, Blurring merges rows in
            # float32 and BlurringLate in float16. A wrong head: test_fidelity.
            r"test_sites.*test_generation_is_verified_at_every_keep_count\[CuriousProjector\]",
            r"test_sites.*test_(generation|cues).*\[(BlurringLate|CuriousVision)",
            r"test_sites.*test_merged_rows_of_float16_bundles_are_verified\[Blurring\]",
            r"test_streamed.*test_a_wrong_weight_is_found_and_its_layer_named\[(decoder-lm_head|vision_encoder)",
            r"test_streamed.*test_a_check_by_layers_that_compares_none_fails",  # test_parity
            # Folders for transformers.js: llava, gemma3 and half stay. A GPU's shape: test_gpu runs it whole.
            r"test_transformers_js.*test_answers_are_the_pipelines\[(pali2|smolvlm|tied|plain)",
            r"layouts/test_command.*test_a_float64_pruner_is_told",
            r"test_gpu_shape.*test_(weights_lie_where|equal_files_lie|both_ways|what_cannot_be_filled)",
            r"scenes/test_reader.*test_a_bundle_of_it_answers",  # its torch model is asked
            r"test_video_llava.*test_a_video_is_refused_where_pictures",  # test_onevision_videos
            r"test_plugins.*test_the_graph_with_the_plugin_keeps_the_same_tokens\[adaptprune",  # focal
            r"test_batches.*test_a_batch_says_what_single_prompts_say\[cdpruner\]",
            # The same on another bundle of the same tiny model.
            r"test_pipeline.*test_an_answer_that_fills_the_bundle_ends_with_length\[fastv\]",
            r"test_pipeline.*test_repeats_itself_whatever_ran_before\[(fastv|original)\]",
            r"test_graph_check.*test_what_the_exporter_writes_is_taken\[(float16|jetpack6)\]",
            r"test_fidelity.*test_pruned_equals_the_reference_for_64_steps\[siglip-5\]",
            r"test_(fidelity|graphs_on_disk).*mistral",  # gqa: the same decoder under another name
            r"test_builtin.*\[vispruner-64\]",  # adaptprune-57
            # Graphs of pruners; modules are held against the loops in every case. Of methods of one top-k
            # vispruner's float16 stays. At the edges (one token, every token) vispruner's graph, focal's
            # (greedy), prumerge's and sparsevlm's stay; with options one or two of each method that has some.
            r"test_pruners\.py.*_graph_.*\[(random|uniform|fastv|fastervlm)-4x6-9-float",
            # One graph of each method of 2026; vispruner's and prumerge's stay for continuous cues.
            r"test_pruners\.py.*_graph_.*\[(hiprune|otprune|vscan|apet|prunesid)-(?!6x5-12|5x6-12|6x7-|6x6-20)",
            r"test_pruners\.py.*_graph_.*_continuous_cues\[(hiprune|otprune|vscan|apet|prunesid)-",
            r"test_pruners\.py.*_graph_.*\[(evs-(?!3x5-11)|change-)",  # test_change runs change's graph
            r"test_onevision_videos.*test_evs_equals_the_published_rule",  # evs' graph, test_pruners_more
            r"test_change.*test_a_bundle_holds_against_torch",  # its other tests say what it keeps
            r"test_pruners\.py.*_graph_.*\[(?!vispruner|focal|prumerge|sparsevlm)\w+-(4x4-1|3x5-15|1x9-4)-f",
            r"test_pruners\.py.*_graph_.*\[adaptprune-12x13",  # focal's has two bands as well, and 24x24
            r"test_pruners\.py.*_graph_.*\[vispruner-(5x5-4|3x4-5|3x3-2)",  # 7x7-10-r=0.3, 6x6-16
            r"test_pruners\.py.*_graph_.*\[visionzip-(5x5|4x5)",  # 6x7-20, 4x6-9 in float16
            r"test_pruners\.py.*_graph_.*\[prumerge-(3x5-6|5x3-6)",  # 6x7-12, 5x5-8 in float16
            # OpenVINO, which compiles for every new size: of bundles that differ in method or decoder alone
            # the plainest, one pruned in the tower and one in the decoder stay, of families two.
            r"test_scheduler.*request_alone\[openvino-cpu-(original|fastv|siglip|qwen2|jetpack6)\]",
            r"runtime/test_engines\.py.*token_for_token\[(original|fastv|mha|qwen2|mistral|tied|siglip)\]",
            r"runtime/test_engines\.py.*as_on_one\[vispruner-",  # adaptprune: more stages
            # Targets and builds: adaptprune's bundle stays for both targets; of pruners' graphs those
            # with operators of their own. `make test-trtrtx` builds every one.
            r"test_target.*test_a_right_padded_batch_equals_target_ort\[jetpack6\]",
            r"test_target.*test_jetpack6_writes_what_tensorrt_10_3_takes\[none\]",
            r"test_target.*test_only_standard_operators_and_no_float64\[vispruner\]",  # adaptprune
            r"test_target.*test_jetpack6_writes_what_tensorrt_10_3_takes\[vispruner\]",  # adaptprune
            r"test_target.*test_every_graph_of_a_bundle_builds\[(none-tensorrt|vispruner-)",
            r"pruners/test_trtrtx.*test_pruner_and_splice_graphs_build"
            r"\[(none|random|uniform|fastv|fastervlm|divprune|scope|dart|visionzip|holov|vispruner|pyramiddrop"
            r"|hiprune|otprune|vscan|apet|prunesid)-f",
            r"test_gpu\.py.*test_tensorrt_engines_are_built_compared_and_then_measured",  # test_target
            # Scripts and commands that run whole in a process of their own.
            r"test_gpu_shape.*test_the_whole_run_on_the_cpu",  # its parts, beside it
            r"test_cli_outside.*test_an_outside_method_exports_as_json_and_runs",  # test_outside's example
            r"export/test_cli.*test_an_export_that_is_stopped_half_way\[9\]",  # tests/kill kills writers
        )
    )
)


# Files of ten seconds and more, the longest first: what starts last ends soon, on every worker.
LONGEST = (
    "export/pruners/test_pruners.py",
    "export/test_target.py",
    "export/verify/test_sites.py",
    "export/test_cli.py",
    "runtime/test_pipeline.py",
    "export/families/test_qwen.py",
    "export/families/test_gemma.py",
    "test_readme.py",
    "export/verify/test_fidelity.py",
    "export/towers/test_reductions.py",
    "export/test_builtin.py",
    "export/families/test_split.py",
    "export/pruners/test_trtrtx.py",
    "export/verify/test_streamed.py",
    "export/towers/test_commands.py",
    "export/families/test_anyres.py",
    "export/checkpoint/test_settings.py",
    "export/checkpoint/test_hub.py",
    "export/families/test_text_only.py",
    "export/families/test_video_llava.py",
    "export/checkpoint/test_hostile_folders.py",
    "bench/test_gpu_shape.py",
    "fuzz/test_fuzz.py",
    "bench/test_gpu.py",
    "calib/test_trtrtx.py",
    "calib/test_families.py",
    "test_house.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the long tail, before pytest picks tests by their marks, and bring the longest files forward."""
    for item in items:
        if LONG_TAIL.search(item.nodeid):
            item.add_marker(pytest.mark.slow)
    rank = {f"tests/{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """End a run whose test process died, and name the test: with `--dist loadfile` xdist waits for ever."""
    if error:
        session = node.config.pluginmanager.getplugin("dsession")
        session.shouldstop = f"test process {node.gateway.id} died: {error}"


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Leave what the imports made out of every later garbage collection: torch's tracer causes thousands."""
    gc.freeze()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Folders that are made once a run, whichever worker of xdist asks first."""
    base = tmp_path_factory.getbasetemp()
    return Once((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once")


@pytest.fixture(scope="module")
def saved(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """Folder and torch model by one of tests/models' `save_…` and its options. The folder is read only."""
    root, made = tmp_path_factory.mktemp("saved"), dict[str, tuple[Path, Any]]()

    def get(save: Callable[..., Any], *kind: str, **options: Any) -> tuple[Path, Any]:
        name = once.name(save.__name__, *kind, **options)
        if name not in made:
            model = save(root / name, *kind, **options)
            made[name] = once.folder(name, lambda part: shutil.copytree(root / name, part)), model
        return made[name]

    return get


@dataclass(frozen=True)
class Made:
    """A bundle on disk and the model folder that it was exported from."""

    folder: Path
    model: Path


@pytest.fixture(scope="session")
def model_folder(once: Once) -> Callable[[str], Path]:
    """Folder of a tiny model by name; written at the first call. Read only: copy it before changing it."""
    from .models.tiny import save_tiny

    def get(name: str) -> Path:
        return once.folder(name, lambda part: save_tiny(part, **MODELS[name]))

    return get


@pytest.fixture(scope="session")
def exported(once: Once, model_folder: Callable[[str], Path]) -> Callable[[str], Made]:
    """A bundle by name; exported at the first call. Read only: copy it before changing it."""

    def get(name: str) -> Made:
        model, wishes = BUNDLES[name]
        source = model_folder(model)
        made = once.bundle(source, **{"max_length": MAX_LENGTH, "verify": "none", **wishes})
        # Under its own name, which commands print.
        return Made(once.folder(f"named/{name}", lambda part: shutil.copytree(made, part)), source)

    return get


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """A picture of noise, larger than the models' input and not square."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory: pytest.TempPathFactory, picture: Image.Image) -> Path:
    """The same picture as a PNG file."""
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    picture.save(path)
    return path


@pytest.fixture(params=["ort-cpu", "openvino-cpu"])
def cpu_engine(request: pytest.FixtureRequest) -> str:
    """Every engine whose values lie in the host's memory."""
    if request.param == "openvino-cpu":
        pytest.importorskip("openvino", reason="openvino is not installed")
    return str(request.param)
