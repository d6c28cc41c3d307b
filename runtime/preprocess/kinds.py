"""The kinds of preprocessing, by name; a new kind is one module and one row."""

from __future__ import annotations

from vtp.runtime.preprocess import anyres, clip, idefics3, internvl, qwen
from vtp.runtime.preprocess.spec import KINDS, Kind

KINDS.update(
    {
        name: Kind(module.check, module.FIELDS, module.size, module.shape, module.pixels, module.boxes)
        for name, module in (
            ("clip", clip),
            ("qwen", qwen),
            ("anyres", anyres),
            ("internvl", internvl),
            ("idefics3", idefics3),
        )
    }
)
