"""Methods by name: options, keep-counts, sites, and methods of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vtp.engines.errors import UsageError
from vtp.export import pruners
from vtp.export.pruners.base import Pruner

from .compared import METHODS


@pytest.mark.parametrize("keep", [0, -1, 17])
def test_keep_count_out_of_range_is_refused(keep):
    with pytest.raises(UsageError, match=r"keep-tokens .* choose 1 to 16"):
        pruners.find_method("fastv")((4, 4), keep)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vispruner", {"r": 1.5}, "outside 0 to 1"),
        ("vispruner", {"share": 1}, "no option 'share'; its options: r"),
        ("fastv", {"r": 1}, "no option 'r'; its options: none"),
        ("random", {"seed": -1}, "negative"),
        ("adaptprune", {"sigma_space": 0.0}, "sigma_space 0.0 is outside"),
        ("adaptprune", {"sigma_space": 1e9}, "sigma_space"),
        ("adaptprune", {"keys": "rotated"}, "choose plain or normed"),
    ],
)
def test_unfit_options_are_refused(name, options, words):
    with pytest.raises(UsageError, match=words) as refused:
        pruners.find_method(name)((4, 4), 2, **options)
    assert "\n" not in str(refused.value)


def test_option_strings_take_the_type_of_the_default():
    adaptprune = pruners.find_method("adaptprune")
    texts = ["radius=3", "keys = normed", "sigma_space=2.5"]
    assert pruners.parse_options(adaptprune, texts) == {"radius": 3.0, "keys": "normed", "sigma_space": 2.5}
    assert pruners.parse_options(pruners.find_method("random"), ["seed=12"]) == {"seed": 12}
    flag = type("Flag", (Pruner,), {"name": "flag", "options": {"on": False}})
    assert pruners.parse_options(flag, ["on=Yes"]) == {"on": True}


@pytest.mark.parametrize(
    ("name", "texts", "words"),
    [
        ("random", ["seed"], "not of the form name=value"),
        ("random", ["seed=1.5"], "method random: seed is '1.5'; give a whole number, such as 0"),
        ("random", ["seed=1_0"], "seed is '1_0'; give a whole number"),
        ("random", ["=1"], "method-option '=1' is not of the form name=value"),
        ("random", ["seed=1", "seed=2"], "method random: seed is given twice; give it once"),
        ("adaptprune", ["radius=nan"], "radius is 'nan'; give a finite number, such as"),
        ("adaptprune", ["radios=3"], "did you mean 'radius'"),
        ("fastv", ["r=1"], "its options: none"),
    ],
)
def test_bad_option_strings_are_refused_in_one_line(name, texts, words):
    with pytest.raises(UsageError, match=words) as refused:
        pruners.parse_options(pruners.find_method(name), texts)
    assert "\n" not in str(refused.value)


# -- the registry --------------------------------------------------------------------------------------------


def test_registry_lists_files_and_none():
    folder = Path(pruners.__file__).parent
    files = {file.stem for file in folder.glob("*.py")} - {
        "__init__",
        "base",
        "greedy",
        "merge",
        "ops",
        "registry",
        "site",
    }
    assert pruners.method_names() == ["none", *sorted(files)]
    assert {"random", "uniform", "fastv", "vispruner", "adaptprune"} <= files


@pytest.mark.parametrize("name", METHODS)
def test_every_method_declares_itself(name):
    method = pruners.find_method(name)
    assert method.name == name and pruners.check_method(method, name) is method
    assert method.__doc__ and pruners.resolve_method(name) is method
    pruners.parse_site(method.site)


def test_listing_imports_no_method():
    import subprocess
    import sys

    code = "import sys; from vtp.export import pruners; pruners.method_names(); " + (
        "sys.exit(any(f'vtp.export.pruners.{name}' in sys.modules for name in pruners.method_names()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_none_is_a_name_without_a_class():
    assert pruners.resolve_method("none") is None
    with pytest.raises(UsageError, match="no pruner"):
        pruners.find_method("none")


def test_unknown_method_suggests_the_nearest_and_lists_all():
    with pytest.raises(
        UsageError, match=r"unknown method 'visprunner'; did you mean 'vispruner'\?.*adaptprune"
    ):
        pruners.resolve_method("visprunner")
    with pytest.raises(UsageError, match="methods: none, adaptprune"):
        pruners.find_method("base")


@pytest.mark.parametrize("site", ["vision", "projector", "decoder", "decoder:1", "decoder:12"])
def test_sites_parse(site):
    kind, layer = pruners.parse_site(site)
    assert site == (kind if layer is None else f"{kind}:{layer}") == str(pruners.Site.parse(site))


@pytest.mark.parametrize(
    "site", ["", "tower", "decoder:", "decoder:0", "decoder:-1", "decoder:²", "vision:1"]
)
def test_other_sites_are_refused(site):
    with pytest.raises(UsageError, match="is not vision, projector, decoder:L with"):
        pruners.parse_site(site)


def test_a_site_of_several_layers_is_no_declaration():
    assert pruners.Site.parse("decoder:1,3") == pruners.Site("decoder", (1, 3))
    with pytest.raises(UsageError, match="is not vision"):
        pruners.Site.parse("decoder:3,1")
    with pytest.raises(UsageError, match=r"names several layers; declare site decoder .* sites\(\)"):
        pruners.parse_site("decoder:1,3")


MINE = """
from vtp.export.pruners.base import Pruner
from vtp.export.pruners import ops

class Mine(Pruner):
    name = "mine"
    site = "vision"
    needs = ("attention_scores",)

    def forward(self, attention_scores):
        return ops.raster(ops.top_k(attention_scores, self.keep))

class Text: pass
"""


def test_outside_method_loads(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    method = pruners.resolve_method(f"{file}:Mine")
    assert method is not None
    kept = method((2, 2), 2)(attention_scores=torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    assert kept.tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (("", ""), "Other", "has no class 'Other'; its pruners: Mine"),
        (("", ""), "Text", "not a subclass"),
        (('name = "mine"', 'name = "My Method"'), "Mine", "lower-case word"),
        (('name = "mine"', 'name = "none"'), "Mine", "lower-case word"),
        (('name = "mine"', ""), "Mine", "name is None"),
        (('site = "vision"', 'site = "decoder:0"'), "Mine", "L = 1 or more"),
        (('site = "vision"', ""), "Mine", "site ''"),
        (('("attention_scores",)', '("keys",)'), "Mine", "image_features, attention_scores"),
        (('("attention_scores",)', '"attention_scores"'), "Mine", "give a tuple"),
        (('("attention_scores",)', '("attention_scores", "attention_scores")'), "Mine", "twice"),
        (("def forward", "def forwards"), "Mine", "forward is missing"),
        (
            ('site = "vision"', 'site = "vision"; options = {"a": None}'),
            "Mine",
            "option a has",
        ),
        (('name = "mine"', "name ="), "Mine", "fails when run: SyntaxError"),
        (("class Text", "1 / 0\nclass Text"), "Mine", "fails when run: ZeroDivisionError"),
    ],
)
def test_outside_method_that_cannot_work_is_refused_in_one_line(tmp_path, change, name, words):
    file = tmp_path / "mine.py"
    file.write_text(MINE.replace(*change) if change[0] else MINE)
    with pytest.raises(UsageError, match=words) as refused:
        pruners.load_outside(f"{file}:{name}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("spec", ["mine.py", "mine.py:", "mine:Mine", "mine.py:Mi ne"])
def test_outside_spec_of_another_form_is_refused(spec):
    with pytest.raises(UsageError, match=r"not of the form FILE\.py:CLASS"):
        pruners.load_outside(spec)


def test_outside_file_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="does not exist"):
        pruners.resolve_method("./nowhere.py:Mine")
