"""Full-size models with random weights: the shapes that people deploy, made locally, without a download.

For measuring speed and memory; what such a model says means nothing. A folder is in Hugging Face layout, as
if it came from the hub: config.json, safetensors in shards under the names that checkpoints have, tokenizer,
chat template, image processor. Weights are drawn and written piece by piece, so that a model larger than
the memory can be made.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vtp.bench.shapes.tokenizer import byte_level_tokenizer
from vtp.bench.shapes.weight_map import draw_small, is_small
from vtp.engines import UsageError, VtpError
from vtp.engines.disk.whole import whole_folder
from vtp.export.onnx.grouping import grouped

BYTES = {"float16": 2, "float32": 4}
SHARD_BYTES = 4 * 10**9
_SCALE = 0.02  # as transformers draws its own; wide enough for float16, narrow enough not to overflow it
_PIECE = 1 << 22  # numbers drawn at a time
_HEADER = {"float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Shape:
    """One full-size configuration.

    what          in words
    parameters    numbers in the checkpoint (a tied weight counts once)
    architecture  class of transformers
    """

    name: str
    what: str
    parameters: int
    architecture: str
    parts: Callable[[], _Parts]

    def bytes(self, dtype: str = "float16") -> int:
        """Size of the weights in bytes, which is also the size of a bundle's within a percent."""
        if dtype not in BYTES:
            raise UsageError(f"unknown dtype '{dtype}'; choose one of {', '.join(BYTES)}")
        return self.parameters * BYTES[dtype]


@dataclass(frozen=True)
class _Parts:
    """What a folder holds beside the weights: transformers' config, special tokens by id, two JSON files."""

    config: Any
    special: Mapping[str, int]
    tokenizer: Mapping[str, str]  # bos_token, eos_token, ...
    template: str
    processor: Mapping[str, Any]


def find_shape(name: str) -> Shape:
    """The shape of that name. Raises UsageError with the known ones."""
    if name not in SHAPES:
        raise UsageError(f"unknown shape '{name}'; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def write_shape(name: str, folder: str | Path, dtype: str = "float16", seed: int = 0) -> Path:
    """Write a model of the shape `name` into `folder`, which must not exist; returns it.

    Raises UsageError for an unknown shape or dtype and for a folder that exists, VtpError where the disk has
    no room for it. A folder that could not be written whole is removed.
    """
    shape, folder = find_shape(name), Path(folder)
    need = shape.bytes(dtype)

    def check() -> None:
        if folder.exists():
            raise UsageError(f"{folder} exists already; remove it or choose another folder")

    with whole_folder(folder, check) as aside:
        free = shutil.disk_usage(aside).free
        if free < 1.02 * need:
            raise VtpError(
                f"shape {name} in {dtype} takes {need / 1e9:.1f} GB; {folder.parent} has "
                f"{free / 1e9:.1f} GB free"
            )
        parts = shape.parts()
        _write_words(parts, aside)
        write_weights(parts.config, shape.architecture, aside, dtype, seed)
    return folder


# -- weights -------------------------------------------------------------------------------------------------


def write_weights(config: Any, architecture: str, folder: Path, dtype: str, seed: int = 0) -> None:
    """Write config.json and random safetensors for a transformers config, with little memory.

    Names are those that transformers saves under. Matrices are drawn with standard deviation 0.02, norms
    near 1; tied weights are left out, as save_pretrained does.
    """
    sizes = tensor_shapes(config, architecture)
    config.architectures, config.dtype = [architecture], dtype
    config.save_pretrained(folder)
    shards = grouped({name: math.prod(size) * BYTES[dtype] for name, size in sizes.items()}, SHARD_BYTES)
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        files = [f"model-{at + 1:05}-of-{len(shards):05}.safetensors" for at in range(len(shards))]
    for number, (file, names) in enumerate(zip(files, shards, strict=True)):
        with (folder / file).open("wb") as out:
            _write_shard(out, {name: sizes[name] for name in names}, dtype, seed + 1000 * number)
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def tensor_shapes(config: Any, architecture: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, under the name that transformers saves it, without its values."""
    from transformers.core_model_loading import revert_weight_conversion

    model, state = _without_values(config, architecture)
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def write_weightless(name: str, folder: Path, dtype: str = "float16") -> Path:
    """Write the folder of a shape with the numbers of small tensors alone: the rest of the file is a hole.

    For exports that write no weights (`vtp.bench.shapes.weightless`). Exporters look at small tensors, to
    fold equal ones into one: these are what they will be when the bundle is filled
    (`vtp.bench.shapes.weight_map`). Weights have the names of the model's own state_dict. Raises
    UsageError for an unknown shape or dtype.
    """
    shape = find_shape(name)
    shape.bytes(dtype)
    parts = shape.parts()
    folder.mkdir(parents=True)
    _write_words(parts, folder)
    _, state = _without_values(parts.config, shape.architecture)
    parts.config.architectures, parts.config.dtype = [shape.architecture], dtype
    parts.config.save_pretrained(folder)
    with (folder / "model.safetensors").open("wb") as out:
        end = _write_header(out, {key: tuple(tensor.shape) for key, tensor in state.items()}, dtype)
        place = out.tell()
        out.truncate(place + end)
        for key, tensor in state.items():
            if is_small(tensor.shape):
                out.seek(place)
                out.write(draw_small(key, tensor.shape).astype(dtype).tobytes())
            place += tensor.numel() * BYTES[dtype]
    return folder


def _without_values(config: Any, architecture: str) -> tuple[Any, dict[str, Any]]:
    """A model of no memory, and what of its state a checkpoint holds: a tied weight once."""
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    model.tie_weights()
    own = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    return model, {name: tensor for name, tensor in model.state_dict().items() if name in own}


def _write_header(out: BinaryIO, sizes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """How a safetensors file begins: the header's length, then the header; returns the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        start, end = end, end + math.prod(size) * BYTES[dtype]
        header[name] = {"dtype": _HEADER[dtype], "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    return end


def _write_shard(out: BinaryIO, sizes: Mapping[str, tuple[int, ...]], dtype: str, seed: int) -> None:
    """The safetensors format: a header, then the tensors one after the other."""
    import torch

    _write_header(out, sizes, dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, size in sizes.items():
        for piece in _draw(generator, name, size):
            out.write(piece.to(getattr(torch, dtype)).numpy())


def _draw(generator: Any, name: str, size: tuple[int, ...]) -> Iterator[Any]:
    """The numbers of one tensor, float32, in pieces: scales of norms lie around 1, all else around 0."""
    import torch

    middle = 1.0 if len(size) == 1 and name.endswith("weight") else 0.0
    left = math.prod(size)
    while left:
        count = min(left, _PIECE)
        yield torch.empty(count).normal_(middle, _SCALE, generator=generator)
        left -= count


# -- words and pictures --------------------------------------------------------------------------------------


def _write_words(parts: _Parts, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(parts.special, parts.config.get_text_config().vocab_size),
        clean_up_tokenization_spaces=False,
        **parts.tokenizer,
    )
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(parts.template, encoding="utf-8")
    processor = json.dumps(dict(parts.processor), indent=1)
    (folder / "preprocessor_config.json").write_text(processor, encoding="utf-8")
    end = parts.special[parts.tokenizer["eos_token"]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}), encoding="utf-8")


_PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}"
    "{{ message['role'] | upper }}: {% endif %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>\n"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif item['type'] == 'text' %}{{ item['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}<image>"
    "{% elif item['type'] == 'text' %} {{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


# -- the shapes ----------------------------------------------------------------------------------------------


def _clip_large(**changes: Any) -> Any:
    """The tower of LLaVA-1.5: openai/clip-vit-large-patch14-336."""
    from transformers import CLIPVisionConfig

    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 768}
    depth: dict[str, Any] = {
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    return CLIPVisionConfig(**{**sizes, **depth, **changes})


_CLIP_336 = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
}


def _llava_7b() -> _Parts:
    """llava-hf/llava-1.5-7b-hf: CLIP ViT-L/14-336 and Vicuna 7B."""
    from transformers import LlamaConfig, LlavaConfig

    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
    config = LlavaConfig(
        vision_config=_clip_large(), text_config=text, image_token_index=32000, image_seq_length=576
    )
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _Parts(config, special, named, _PLAIN_TEMPLATE, _CLIP_336)


_QWEN_WORDS = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
_QWEN_NAMED = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def _llava_half() -> _Parts:
    """LLaVA-1.5's form with the decoder of Qwen2-0.5B: small enough for two CPU cores, GQA 14/2."""
    from transformers import LlavaConfig, Qwen2Config

    text = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    config = LlavaConfig(
        vision_config=_clip_large(),
        text_config=text,
        image_token_index=151646,
        image_seq_length=576,
        tie_word_embeddings=True,
    )
    return _Parts(config, {**_QWEN_WORDS, "<image>": 151646}, _QWEN_NAMED, _PLAIN_TEMPLATE, _CLIP_336)


def _qwen_3b() -> _Parts:
    """Qwen/Qwen2.5-VL-3B-Instruct."""
    from transformers import Qwen2_5_VLConfig

    text: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision: dict[str, Any] = {
        "hidden_size": 1280,
        "out_hidden_size": 2048,
        "intermediate_size": 3420,
        "depth": 32,
    }
    marks: dict[str, Any] = {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
    pads: dict[str, Any] = {"image_token_id": 151655, "video_token_id": 151656}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **marks, **pads
    )
    special = {"<|vision_start|>": 151652, "<|vision_end|>": 151653}
    special |= {"<|image_pad|>": 151655, "<|video_pad|>": 151656}
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    return _Parts(config, {**_QWEN_WORDS, **special}, _QWEN_NAMED, _QWEN_TEMPLATE, processor)


def _smolvlm_256m() -> _Parts:
    """HuggingFaceTB/SmolVLM-256M-Instruct: SigLIP-B/16-512 and SmolLM2-135M."""
    from transformers import SmolVLMConfig

    text: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    }
    vision: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    vision |= {"num_attention_heads": 12, "image_size": 512, "patch_size": 16}
    config = SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=4, image_token_id=49190)
    tiles = {f"<row_{at // 6 + 1}_col_{at % 6 + 1}>": 49153 + at for at in range(36)}
    special = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<global-img>": 49152, **tiles}
    special |= {"<fake_token_around_image>": 49189, "<image>": 49190, "<end_of_utterance>": 49279}
    named = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    processor = {
        "image_processor_type": "SmolVLMImageProcessor",
        "processor_class": "SmolVLMProcessor",
        "size": {"longest_edge": 2048},
        "max_image_size": {"longest_edge": 512},
        "do_image_splitting": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return _Parts(config, special, named, _SMOL_TEMPLATE, processor)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "llava-1.5-7b",
            "LLaVA-1.5-7B: CLIP ViT-L/14-336, 32 layers of 4096",
            7_063_427_072,
            "LlavaForConditionalGeneration",
            _llava_7b,
        ),
        Shape(
            "llava-ov-0.5b",
            "CLIP ViT-L/14-336 and Qwen2-0.5B's decoder in LLaVA-1.5's form: 24 layers of 896, GQA 14/2",
            799_262_336,
            "LlavaForConditionalGeneration",
            _llava_half,
        ),
        Shape(
            "qwen2.5-vl-3b",
            "Qwen2.5-VL-3B: window attention, mRoPE, 36 layers of 2048",
            3_754_622_976,
            "Qwen2_5_VLForConditionalGeneration",
            _qwen_3b,
        ),
        Shape(
            "smolvlm-256m",
            "SmolVLM-256M: SigLIP-B/16-512, 30 layers of 576",
            256_484_928,
            "SmolVLMForConditionalGeneration",
            _smolvlm_256m,
        ),
    )
}
