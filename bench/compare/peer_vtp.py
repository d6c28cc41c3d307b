"""vtp itself, as one of those compared: the whole pipeline, and its decoder alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vtp.bench.compare.peer import Peer, Run, Stopwatch
from vtp.bench.measure import endless
from vtp.engines import Choice, open_graph
from vtp.runtime import Pipeline
from vtp.runtime.bundle.folder import open_bundle
from vtp.runtime.media.images import load_image
from vtp.runtime.preprocess import preprocess
from vtp.runtime.prompt.prompter import Prompter
from vtp.runtime.result import Timings
from vtp.runtime.stages.kv_cache import KvCache

CPU = "ort-cpu"
_PARTS = {"encoder": ("vision_encoder", "projector"), "prompt": ("decoder",)}


class Whole(Peer):
    """A bundle, from the picture's file to the tokens, by `Pipeline`."""

    def open(self) -> None:
        """Open the bundle on ONNX Runtime's CPU provider, without end-of-sequence ids."""
        self._pipe = Pipeline(endless(open_bundle(self.spec.bundle)), Choice(CPU), self.spec.threads)

    def run(self) -> Run:
        """Answer at the bundle's default keep-count."""
        result = self._pipe.generate(self.spec.image, self.spec.prompt, max_new_tokens=self.spec.tokens)
        times = result.timings
        return Run(result.token_ids, times.ttft, times.tpot, parts_of(times.stages))

    def first_logits(self) -> np.ndarray:
        """See `Peer`; the stages below the pipeline, which hands out no logits."""
        manifest, runner = self._pipe.manifest, self._pipe._runner
        assert runner is not None  # open
        prompter = Prompter(manifest.text, self._pipe.bundle.path("tokenizer.json"))
        prompt = prompter.encode(prompter.messages_for(self.spec.prompt))
        pixels = preprocess(load_image(self.spec.image), manifest.image)
        keep = manifest.visual.default_keep
        values = runner.prefill(keep, pixels, prompt.ids, prompt.image_start, Timings())
        return values["logits"].numpy()[0, 0].astype(np.float32)


def parts_of(stages: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of the encoder, its projector included, and of the decoder over the prompt."""
    return {
        part: sum(ms for stage, ms in stages.items() if stage.startswith(names))
        for part, names in _PARTS.items()
    }


class DecoderOnly(Peer):
    """The bundle's embed_tokens and decoder graphs on given tokens: no picture, no text."""

    def open(self) -> None:
        """Open two graphs, and bind a single step."""
        bundle = open_bundle(self.spec.bundle)
        stages = {stage.role: stage for stage in bundle.manifest.stages if stage.when == "step"}
        graph = bundle.manifest.graphs[stages["decoder"].file]
        assert graph.kv is not None  # every decoder has a cache
        self._decoder = open_graph(bundle.path(stages["decoder"].file), CPU, self.spec.threads)
        self._embed = open_graph(bundle.path(stages["embed"].file), CPU, self.spec.threads)
        self._cache = KvCache(self._decoder, graph.kv)
        engine = self._decoder
        self._token, self._place = engine.zeros((1, 1), "int64"), engine.zeros((1, 1), "int64")
        width = graph.inputs["inputs_embeds"].shape[-1]
        assert isinstance(width, int)  # of the model
        row = engine.zeros((1, 1, width), graph.inputs["inputs_embeds"].dtype)
        vocabulary = graph.outputs["logits"].shape[-1]
        assert isinstance(vocabulary, int)  # of the model
        logits = engine.zeros((1, 1, vocabulary), graph.outputs["logits"].dtype)
        self._embedding = self._embed.bind({"input_ids": self._token}, {"inputs_embeds": row})
        self._step = engine.bind(
            {"inputs_embeds": row, "position_ids": self._place, **self._cache.feeds},
            {"logits": logits, **self._cache.into},
        )

    def run(self) -> Run:
        """Prefill, then single steps."""
        watch = Stopwatch()
        watch.note(int(self.first_logits().argmax()))
        while len(watch.tokens) < self.spec.tokens:
            self._token.update(np.array([[watch.tokens[-1]]], np.int64))
            self._place.update(np.array([[self._cache.length]], np.int64))
            self._cache.advance(1)
            self._embedding.run()
            self._step.run()
            watch.note(int(self._step.outputs["logits"].numpy().argmax()))
        return watch.run()

    def first_logits(self) -> np.ndarray:
        """See `Peer`."""
        ids = np.array([self.spec.ids], np.int64)
        self._cache.reset()
        embeds = self._embed.run({"input_ids": self._embed.put(ids)})["inputs_embeds"]
        self._cache.advance(ids.shape[1])
        places = self._decoder.put(np.arange(ids.shape[1])[None])
        feeds = {"inputs_embeds": embeds, "position_ids": places, **self._cache.feeds}
        return self._decoder.run(feeds, self._cache.into)["logits"].numpy()[0, 0].astype(np.float32)
