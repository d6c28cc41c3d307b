"""`VtpForImageTextToText` beside unmodified transformers: the same tensors in, the same ids out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtp import Pipeline, VtpForImageTextToText
from vtp.engines import UsageError, VtpError

from ...models.tiny_families import save_anyres
from ...models.tiny_gemma import save_gemma, tiny_gemma3, tiny_paligemma
from ...models.tiny_qwen import processed, save_qwen
from ...models.tiny_split import save_idefics3
from ...once import Once

QUESTION, SECOND = "what shape is the red ?", "what color ?"
NEW = 10


@dataclass(frozen=True)
class Side:
    """A family's model in torch, its processor and its unpruned bundle."""

    model: Any
    processor: Any
    own: VtpForImageTextToText
    size: tuple[int, int]  # of pictures: height, width

    def pictures(self, count: int) -> list[Image.Image]:
        noise = np.random.default_rng(7).integers(0, 256, (count, *self.size, 3), dtype=np.uint8)
        return [Image.fromarray(one) for one in noise]

    def text(self, question: str, pictures: int = 1) -> str:
        """A prompt before the processor expands it, from the model's own chat template, or LLaVA's form."""
        if self.processor.chat_template is None:
            return f"USER: {'<image>' * pictures}\n{question} ASSISTANT:"
        parts = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        turns = [{"role": "user", "content": parts}]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True)

    def tensors(self, pictures: list[Any], *texts: str) -> Any:
        return self.processor(images=pictures or None, text=list(texts), return_tensors="pt", padding=True)

    def both(self, tensors: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """transformers' ids, and the bundle's."""
        asked = {"do_sample": False, "max_new_tokens": NEW, **more}
        pad = self.model.generation_config.pad_token_id
        return self.model.generate(**tensors, **asked), self.own.generate(
            **tensors, **asked, pad_token_id=pad
        )


def llava_next(processor: Any) -> None:
    """What published folders say, and the tiny one does not."""
    processor.patch_size, processor.num_additional_image_tokens = 7, 1
    processor.vision_feature_select_strategy = "default"


# Family -> how its folder is made, what its bundle is made with (as the families' own tests make it), and the
# size of its pictures.
FAMILIES: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[int, int]]] = {
    "llava_next": (
        lambda saved: saved(save_anyres, "llava_next")[0],
        {"image_size": (40, 56), "verify": "full"},
        (40, 56),
    ),
    "gemma3": (
        lambda saved: saved(save_gemma, model=tiny_gemma3(seed=3))[0],
        {},
        (70, 60),
    ),
    "paligemma": (lambda saved: saved(save_gemma, model=tiny_paligemma())[0], {}, (70, 60)),
    "idefics3": (
        lambda saved: saved(save_idefics3)[0],
        {"image_size": (56, 56)},
        (56, 56),
    ),
    "smolvlm": (lambda saved: saved(save_idefics3, kind="smolvlm")[0], {"image_size": (56, 56)}, (56, 56)),
}
SLOW = ("gemma3", "paligemma", "smolvlm")  # the others share their bundles, or stand for several runs
NAMES = ["llava", *(pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in FAMILIES)]


@pytest.fixture(scope="module")
def sides(saved: Any, once: Once, exported: Any) -> Callable[[str], Side]:
    made: dict[str, Side] = {}

    def make(name: str) -> Side:
        if name == "llava":
            folder, bundle, size = exported("none").model, exported("none").folder, (90, 120)
        else:
            save, wishes, size = FAMILIES[name]
            folder = save(saved)
            bundle = once.bundle(folder, **{"method": "none", "max_length": 256, "verify": "none", **wishes})
        processor = AutoProcessor.from_pretrained(folder)
        if name == "llava_next":
            llava_next(processor)
        processor.tokenizer.padding_side = "left"
        processor.tokenizer.pad_token = processor.tokenizer.pad_token or processor.tokenizer.eos_token
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        return Side(model, processor, VtpForImageTextToText.from_pretrained(bundle), size)

    def get(name: str) -> Side:
        if name not in made:
            made[name] = make(name)
        return made[name]

    return get


@pytest.fixture(scope="module")
def llava(sides: Callable[[str], Side]) -> Side:
    return sides("llava")


@pytest.fixture(scope="module")
def tensors(llava: Side) -> Any:
    return llava.tensors(llava.pictures(1), llava.text(QUESTION))


# -- equal to transformers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NAMES)
def test_ids_are_those_of_transformers(family: str, sides: Callable[[str], Side]) -> None:
    """One picture, two in one prompt, and a batch of two prompts of unequal length."""
    side = sides(family)
    first, second = side.pictures(2)
    theirs, ours = side.both(side.tensors([first], side.text(QUESTION)))
    assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    theirs, ours = side.both(side.tensors([[first, second]], side.text(QUESTION, pictures=2)))
    assert torch.equal(ours, theirs)
    batch = side.tensors([[first], [second]], side.text(QUESTION), side.text(SECOND))
    assert not batch["attention_mask"].all()
    theirs, ours = side.both(batch)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["qwen2_vl", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_qwens_tensors_give_transformers_ids(kind: str, saved: Any, once: Once) -> None:
    """Its processor as a whole needs torchvision: these are what its parts give."""
    folder, model = saved(save_qwen, kind)
    bundle = once.bundle(folder, max_length=256, image_size=(32, 48), verify="full", method="none")
    own = VtpForImageTextToText.from_pretrained(bundle)
    side = Side(model, None, own, (32, 48))
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    tensors = processed(side.pictures(1), talk)
    theirs, ours = side.both(tensors)
    assert torch.equal(ours, theirs)
    turned = processed([side.pictures(1)[0].transpose(Image.Transpose.ROTATE_90)], talk)
    with pytest.raises(
        UsageError, match=r"image_grid_thw has \[\[1, 12, 8\]\], and this bundle is for \[1, 8, 12\]"
    ):
        own.generate(**turned)


def test_text_alone(llava: Side) -> None:
    theirs, ours = llava.both(llava.tensors([], "USER: what ? ASSISTANT:"))
    assert torch.equal(ours, theirs)


def test_max_length_counts_the_prompt(llava: Side, tensors: Any) -> None:
    longest = tensors["input_ids"].shape[1] + 3
    theirs, ours = llava.both(tensors, max_new_tokens=None, max_length=longest)
    assert torch.equal(ours, theirs) and ours.shape[1] == longest


def test_a_row_that_ends_early_is_padded_as_in_transformers(llava: Side) -> None:
    """The end token is one that the first row says soon, and the second later or not at all."""
    first, second = llava.pictures(2)
    batch = llava.tensors([[first], [second]], llava.text(QUESTION), llava.text(SECOND))
    answers = llava.both(batch)[0][:, batch["input_ids"].shape[1] :].tolist()
    end = next(token for place, token in enumerate(answers[0]) if token not in answers[1][: place + 2])
    pipe = llava.own.pipeline
    before = pipe.manifest.text.eos_token_ids
    object.__setattr__(pipe.manifest.text, "eos_token_ids", (end,))
    try:
        own = llava.own.generate(**batch, max_new_tokens=NEW, pad_token_id=2)
    finally:
        object.__setattr__(pipe.manifest.text, "eos_token_ids", before)
    theirs = llava.model.generate(
        **batch, do_sample=False, max_new_tokens=NEW, eos_token_id=end, pad_token_id=2
    )
    assert torch.equal(own, theirs) and own[0, -1] == 2


# -- pruned --------------------------------------------------------------------------------------------------


def test_a_pruned_bundle_gives_the_pipelines_answer(exported: Any, llava: Side) -> None:
    """Also sampled, at another keep-count, and from numpy's arrays; ids keep a place for every token."""
    own = VtpForImageTextToText.from_pretrained(exported("vispruner").folder)
    (picture,) = llava.pictures(1)
    tensors = llava.tensors([picture], "USER: <image>\nwhat shape is the red ? ASSISTANT:")
    sampling = {"temperature": 1.5, "top_p": 0.9, "seed": 5}
    for asked, same in (
        ({"do_sample": False}, {}),
        ({"do_sample": False, "keep_tokens": 3}, {"keep_tokens": 3}),
        ({"do_sample": True, **sampling}, sampling),
        ({"do_sample": True, "seed": 5}, {"temperature": 1.0, "seed": 5}),
    ):
        wanted = own.pipeline.generate(picture, QUESTION, max_new_tokens=NEW, **same)
        ids = own.generate(**tensors, max_new_tokens=NEW, **asked)
        assert ids.tolist() == [[*tensors["input_ids"][0].tolist(), *wanted.token_ids]]
        assert own.results[0].visual_tokens == wanted.visual_tokens == (16, same.get("keep_tokens", 6))
        assert own.results[0].kept == wanted.kept
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    ids = own.generate(arrays.pop("input_ids"), **arrays, do_sample=False, max_new_tokens=NEW)
    assert type(ids) is np.ndarray and ids.dtype == np.int64
    text = llava.processor.batch_decode(ids[:, tensors["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == [own.pipeline.generate(picture, QUESTION, max_new_tokens=NEW).text]


# -- what is refused -----------------------------------------------------------------------------------------

IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"num_beams": 4}, r"num_beams=4 is not served, 1 is: a bundle decodes one sequence a row"),
        ({"top_k": 50}, r"top_k=50 is not served, 0 is: sampling takes temperature and top_p"),
        ({"temperature": 0.7}, r"temperature 0.7 is for sampling; give do_sample=True as well"),
        ({"do_sample": "yes"}, r"do_sample 'yes' must be True or False"),
        (
            {"max_new_token": 5},
            r"max_new_token is not served; did you mean 'max_new_tokens'\?; generate takes",
        ),
        ({"streamer": object()}, r"streamer is not served: vtp.Pipeline.stream gives text piece by piece"),
        ({"eos_token_id": 9}, r"eos_token_id 9 is not the bundle's \[2, 5\]; leave it out"),
        ({"max_length": 3, "max_new_tokens": None}, r"max_length 3 leaves no room behind the prompt's"),
        ({"pad_token_id": -1}, r"pad_token_id -1 is not an id"),
        ({"keep_tokens": 5}, r"keep_tokens 5 is not in this bundle, which holds 16"),
        ({"pixel_values_videos": IDS}, r"pixel_values_videos is not served: videos go through vtp.Pipeline"),
        ({"input_ids": None}, r"input_ids are missing; give what the model's processor returns"),
        ({"input_ids": IDS[0]}, r"input_ids is int64\[3\]; give integers \[batch,sequence\]"),
        ({"input_ids": IDS.float()}, r"input_ids is float32\[1, 3\]; give integers"),
        ({"input_ids": IDS - 6}, r"input_ids holds -1; every id and mark is 0 or more"),
        (
            {"input_ids": IDS << 40},
            r"input_ids holds 7696581394432; every id and mark is 0 or more, and below 2",
        ),
        ({"input_ids": IDS.byte()}, r"input_ids are of fewer than 32 bits, too few for every id; give int32"),
        ({"input_ids": IDS.bool()}, r"input_ids are of fewer than 32 bits"),
        (
            {"input_ids": IDS, "attention_mask": IDS * 0},
            r"attention_mask leaves no token of row 0; every row",
        ),
        ({"eos_token_id": [[2]]}, r"eos_token_id \[\[2\]\] is not the bundle's"),
        ({"temperature": IDS}, r"temperature tensor.* is for sampling"),
        (
            {"pixel_values": torch.full((1, 3, 56, 56), torch.nan)},
            r"pixel_values hold values that are not fin",
        ),
        (
            {"pixel_values": torch.full((1, 3, 56, 56), 1e300, dtype=torch.double)},
            r"pixel_values hold values that are no",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 56, 56, device="meta")},
            r"pixel_values must be an array of numb",
        ),
        ({"input_ids": "text"}, r"input_ids must be an array of numbers, not 'text'"),
        ({"attention_mask": IDS}, r"attention_mask has the shape \[1, 3\], and input_ids \[1, "),
        ({"pixel_values": None}, r"pixel_values are missing, and input_ids have places for 1 pictures"),
        ({"pixel_values": torch.zeros(1, 3, 55, 56)}, r"have the shape \[1, 3, 55, 56\]; this bundle takes"),
        ({"pixel_values": torch.zeros(2, 3, 56, 56)}, r"for each of 1 pictures"),
        ({"pixel_values": torch.zeros(1, 3, 56, 56).long()}, r"pixel_values are int64"),
        ({"image_grid_thw": torch.ones(1, 3)}, r"image_grid_thw belongs to Qwen-VL's processors"),
        ({"pixel_attention_mask": torch.zeros(1, 56, 56)}, r"pixel_attention_mask leaves pixels out"),
    ],
)
def test_what_is_not_served_is_one_line(llava: Side, tensors: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        llava.own.generate(**{**tensors, "max_new_tokens": 2, **more})
    assert "\n" not in str(refused.value)


def test_what_asks_for_what_happens_anyway_is_taken(llava: Side, tensors: Any) -> None:
    harmless = {
        "num_beams": 1,
        "use_cache": True,
        "temperature": None,
        "top_p": 1.0,
        "generation_config": None,
    }
    theirs, ours = llava.both(tensors)
    assert torch.equal(llava.own.generate(**tensors, max_new_tokens=NEW, do_sample=False, **harmless), ours)
    assert torch.equal(ours, theirs)


def test_pixels_for_a_prompt_without_a_place_are_refused(llava: Side, tensors: Any) -> None:
    with pytest.raises(UsageError, match="pixel_values are given, and input_ids have places for 0 pictures"):
        llava.own.generate(IDS, pixel_values=tensors["pixel_values"])


def test_another_number_of_image_tokens_is_refused(llava: Side, tensors: Any) -> None:
    """As a processor of another model, or a pruned export's, would write."""
    ids = tensors["input_ids"]
    place = ids[0].tolist().index(llava.own.pipeline.manifest.text.image_token_id)
    short = torch.cat([ids[:, :place], ids[:, place + 1 :]], dim=1)
    with pytest.raises(
        UsageError, match=r"input_ids have 15 image tokens, 15 in a row from .* on; this bundle has 16"
    ):
        llava.own.generate(short, pixel_values=tensors["pixel_values"])


def test_a_picture_of_another_size_is_refused(sides: Callable[[str], Side]) -> None:
    """A family whose tokens depend on it: the line says which size the bundle is for."""
    side = sides("llava_next")
    picture = side.pictures(1)[0].resize((40, 40))
    with pytest.raises(UsageError, match=r"made for pictures of 56x40; resize them so before the processor"):
        side.own.generate(**side.tensors([picture], side.text(QUESTION)))
    tensors = {**side.tensors(side.pictures(1), side.text(QUESTION)), "image_sizes": np.ones(3, int)}
    with pytest.raises(UsageError, match=r"image_sizes has the shape \[3\]; give \[pictures, 2\]"):
        side.own.generate(**tensors)


def test_a_model_that_is_not_exported_is_one_line(exported: Any, tmp_path: Path) -> None:
    model = exported("none").model
    with pytest.raises(VtpError, match=f"is a model, not a bundle; export it: vtp-export --model {model}"):
        VtpForImageTextToText.from_pretrained(model)
    with pytest.raises(VtpError, match="no such folder"):
        VtpForImageTextToText.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"device_map is not served: .*; leave it out"):
        VtpForImageTextToText.from_pretrained(exported("none").folder, device_map="auto")


def test_a_pipeline_can_be_given(exported: Any, llava: Side, tensors: Any) -> None:
    with Pipeline.load(exported("none").folder) as pipe:
        model = VtpForImageTextToText(pipe).eval()
        ids = model.generate(**tensors.to(model.device), max_new_tokens=2)
    assert torch.equal(ids, llava.own.generate(**tensors, max_new_tokens=2))
