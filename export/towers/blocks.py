"""The blocks of transformers' vision towers in parts, so that some rows can be asked about all of them.

Served: blocks of the CLIP kind (CLIP, SigLIP, Idefics3, SmolVLM) and InternVL's (norms on queries and keys,
scaled residuals). Their modules are used as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vtp.export.graphs.attention.operators import attending


class Block:
    """One block: hidden + attention(norm(hidden)), then hidden + mlp(norm(hidden)).

    layer  transformers' module, whole
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.is_internvl = hasattr(layer, "layernorm_before")
        self.attention: Any = layer.attention if self.is_internvl else layer.self_attn

    def __call__(self, hidden: Tensor) -> Tensor:
        """The whole block on rows [B,S,C]."""
        return self.layer(hidden) if self.is_internvl else self.layer(hidden, None)

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return float(self.attention.scale)

    def norm(self, hidden: Tensor) -> Tensor:
        """What attention is given of rows [B,S,C]."""
        return self.layer.layernorm_before(hidden) if self.is_internvl else self.layer.layer_norm1(hidden)

    def query(self, normed: Tensor) -> Tensor:
        """Queries [B,H,S,d] of normed rows [B,S,C]."""
        return self.heads(self._normed("q_norm", self.attention.q_proj(normed)))

    def key(self, normed: Tensor) -> Tensor:
        """Keys [B,H,S,d]."""
        return self.heads(self._normed("k_norm", self.attention.k_proj(normed)))

    def value(self, normed: Tensor) -> Tensor:
        """Values [B,H,S,d]."""
        return self.heads(self.attention.v_proj(normed))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """What attention adds to the rows [B,S,C] of query [B,H,S,d].

        mask  float [B,1,S,T], added to the products of queries and keys
        """
        answer = self.merged(attending().tower(query, key, value, mask, self.scale))
        if self.is_internvl:
            return self.layer.lambda_1 * self.attention.projection_layer(answer)
        return self.attention.out_proj(answer)

    def finish(self, hidden: Tensor) -> Tensor:
        """The second half of the block, on rows [B,S,C]."""
        return hidden + self.more(hidden)

    def more(self, hidden: Tensor) -> Tensor:
        """What the MLP adds to rows [B,S,C]."""
        if self.is_internvl:
            return self.layer.lambda_2 * self.layer.mlp(self.layer.layernorm_after(hidden))
        return self.layer.mlp(self.layer.layer_norm2(hidden))

    @staticmethod
    def merged(heads: Tensor) -> Tensor:
        """[B,H,S,d] -> [B,S,H*d]."""
        return heads.transpose(1, 2).flatten(2)

    def heads(self, rows: Tensor) -> Tensor:
        """[B,S,H*d] -> [B,H,S,d]."""
        return rows.unflatten(2, (self.attention.num_heads, -1)).transpose(1, 2)

    def _normed(self, name: str, rows: Tensor) -> Tensor:
        norm: nn.Module | None = getattr(self.attention, name, None)
        return rows if norm is None else norm(rows)
