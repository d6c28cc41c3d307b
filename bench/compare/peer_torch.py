"""PyTorch transformers: the model as it is, and with VisPruner put in as its authors' code does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vtp.bench.compare.peer import Peer, Run, Stopwatch

_TORCH = ("torch", "pip install 'vtp-edge[export]'")


class Torch(Peer):
    """`generate` of an unmodified model: scaled dot product attention, logits of the last position only."""

    needs = (_TORCH, ("transformers", "pip install 'vtp-edge[export]'"))

    def open(self) -> None:
        """Load model and processor in float32."""
        import torch
        from transformers import LlavaForConditionalGeneration

        torch.set_num_threads(self.spec.threads)
        self._torch = torch
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(
            self.spec.model, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        # As many tokens as asked for, whatever they are.
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = None
        self.processor = processor(self.spec.model, self.model.config)

    def run(self) -> Run:
        """Answer, noting every token as it comes."""
        clock = _Clock()
        self._generate(self.spec.tokens, streamer=clock)
        return clock.watch.run()

    def first_logits(self) -> np.ndarray:
        """See `Peer`."""
        answer = self._generate(1, return_dict_in_generate=True, output_logits=True)
        return answer.logits[0][0].float().numpy()

    def _generate(self, tokens: int, **more: Any) -> Any:
        with self._torch.inference_mode():
            given = self.given()
            return self.model.generate(**given, max_new_tokens=tokens, do_sample=False, **more)

    def given(self) -> dict[str, Any]:
        """What `generate` is called with: the processor's output."""
        return dict(prompt(self.processor, self.spec.image, self.spec.prompt))


class TorchPruned(Torch):
    """VisPruner in front of the projector: tower, choice, K rows into the prompt, `generate`.

    The CLS row of the features' layer is computed beside scaled dot product attention, for the authors' eager
    attention in all layers would be slower.
    """

    def open(self) -> None:
        """Load, and make the pruner."""
        from vtp.export.pruners import find_method

        super().open()
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        self._pruner = find_method("vispruner")((side, side), self.spec.keep)

    def given(self) -> dict[str, Any]:
        """The shortened prompt as embeddings, numbered without gaps."""
        inputs = super().given()
        features, scores = self._tower(inputs["pixel_values"])
        keep = self._pruner(image_features=features, attention_scores=scores)[0]
        rows = self.model.model.multi_modal_projector(features[:, keep])
        image = inputs["input_ids"][0] == self.model.config.image_token_id
        embed = self.model.get_input_embeddings()
        start, end = int(image.nonzero()[0]), int(image.nonzero()[-1]) + 1
        ids = inputs["input_ids"]
        parts = [embed(ids[:, :start]), rows.to(self.model.dtype), embed(ids[:, end:])]
        embeds = self._torch.cat(parts, dim=1)
        return {
            "inputs_embeds": embeds,
            "attention_mask": self._torch.ones(embeds.shape[:2], dtype=self._torch.int64),
        }

    def _tower(self, pixels: Any) -> tuple[Any, Any]:
        """Features [1,N,C] and CLS' attention [1,N], mean over heads, in the layer that makes them."""
        tower, layer = self.model.model.vision_tower, self.model.config.vision_feature_layer
        layers = tower.encoder.layers
        attention = layers[range(len(layers) + 1)[layer] - 1].self_attn
        seen: dict[str, Any] = {}
        hooks = [
            part.register_forward_hook(lambda _part, _given, output, name=name: seen.update({name: output}))
            for name, part in (("query", attention.q_proj), ("key", attention.k_proj))
        ]
        try:
            states = tower(pixels, output_hidden_states=True).hidden_states[layer]
        finally:
            for hook in hooks:
                hook.remove()
        heads, scale = attention.num_heads, attention.head_dim**-0.5
        query = seen["query"][:, :1].unflatten(2, (heads, -1)).transpose(1, 2)
        key = seen["key"].unflatten(2, (heads, -1)).transpose(1, 2)
        rows = (query @ key.transpose(2, 3) * scale).softmax(dim=-1)
        return states[:, 1:], rows[:, :, 0, 1:].mean(dim=1)


class _Clock:
    """A transformers streamer: it is handed the prompt first, then every token."""

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self._prompt_came = False

    def put(self, value: Any) -> None:
        if self._prompt_came:
            self.watch.note(int(value[0]))
        self._prompt_came = True

    def end(self) -> None:
        """Nothing is held back."""


def processor(folder: str, config: Any) -> Any:
    """The model's LlavaProcessor, put together from the folder's parts."""
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaProcessor

    template = Path(folder) / "chat_template.jinja"
    return LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1 if config.vision_feature_select_strategy == "default" else 0,
        chat_template=template.read_text(encoding="utf-8"),
        image_token=_image_token(folder, config.image_token_id),
    )


def _image_token(folder: str, number: int) -> str | None:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).id_to_token(number)


def prompt(processor: Any, image: str, text: str) -> Any:
    """The processor's tensors for one picture and one question."""
    from PIL import Image

    words = prompt_words(processor, text)
    begins = processor.tokenizer.bos_token
    return processor(
        images=Image.open(image).convert("RGB"),
        text=words,
        return_tensors="pt",
        add_special_tokens=not (begins and words.startswith(begins)),
    )


def prompt_words(processor: Any, text: str) -> str:
    """The chat template's words for one picture and one question, the picture's placeholder among them."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    words: str = processor.apply_chat_template([turn], add_generation_prompt=True)
    return words
