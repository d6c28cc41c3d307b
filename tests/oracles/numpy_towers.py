"""Tower reductions in loops over numpy rows, float64: what METHODS' formulae say, one picture at a time.

Of a CLIP or SigLIP tower as transformers has it, whose weights are read off its modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Reused:
    """A later picture: hidden [N,C], per block the rows recomputed and the cosines of keys [N], and the last
    block's attention [H,N,N]."""

    hidden: Array
    rows: list[list[int]]
    cosines: list[Array]
    weights: Array


class Tower:
    """The blocks of a tower that run, and whether row 0 is CLS."""

    def __init__(self, layers: list[Any], has_cls: bool) -> None:
        self.layers = layers
        self.has_cls = has_cls

    def ipcv(self, x: Array, keep: float, cut: int, stable: int, reads: bool) -> tuple[Array, Array]:
        """(hidden [N,C] behind the last block, attention [H,N,N] or [H,n,n] of the last block)."""
        before = x
        for layer in self.layers[:cut]:
            before, (x, weights) = x, attended_block(layer, x)
        first = int(self.has_cls)
        moved = [math.dist(x[row], before[row]) for row in range(first, len(x))]
        order = sorted(range(len(moved)), key=lambda row: (-moved[row], row))
        kept = sorted([*range(first), *(first + row for row in order[: int(keep * len(moved) + 1e-6)])])
        near = {
            row: sorted(range(len(kept)), key=lambda k: (math.dist(x[row], x[kept[k]]), k))[:10]
            for row in range(len(x))
            if row not in kept
        }
        start, h = x, x[kept]

        def whole() -> Array:
            moved_by = h - start[kept]
            rows = start.copy()
            for row in range(len(rows)):
                rows[row] += moved_by[kept.index(row)] if row in kept else moved_by[near[row]].mean(axis=0)
            return rows

        for number, layer in enumerate(self.layers[cut:], cut):
            if number < cut + stable or (reads and number == len(self.layers) - 1):
                out, weights = attended_block(layer, whole())
                h = out[kept]
            else:
                h, weights = attended_block(layer, h)
        return whole(), weights

    def tome(self, x: Array, pairs: int) -> tuple[Array, Array]:
        """(hidden [N,C], attention [H,N,N] of the last block, each row's share split among its patches)."""
        members = [[row] for row in range(len(x))]
        for layer in self.layers:
            sizes = np.array([len(group) for group in members], np.float64)
            added, weights, keys = attention(layer, x, np.log(sizes))
            spread = np.zeros((len(weights), sum(map(len, members)), sum(map(len, members))))
            for one, asking in enumerate(members):
                for two, group in enumerate(members):
                    spread[:, np.ix_(asking, group)[0], np.ix_(asking, group)[1]] = (
                        weights[:, one, two] / len(group)
                    )[:, None, None]
            x, members = self._merge(x + added, members, keys, pairs)
            x = x + mlp(layer, x)
        rows = np.zeros((sum(map(len, members)), x.shape[1]))
        for row, group in zip(x, members, strict=True):
            rows[group] = row
        return rows, spread

    def stc(self, first: Array, later: Array, count: int) -> Reused:
        """The later picture: `count` rows of every block are recomputed, the rest is the first one's."""
        x, y, chosen, cosines = first, later, list[list[int]](), list[Array]()
        weights = np.zeros(0)
        for layer in self.layers:
            module = layer.self_attn
            old, new = norm(layer.layer_norm1, x), norm(layer.layer_norm1, y)
            old_key, new_key = linear(module.k_proj, old), linear(module.k_proj, new)
            alike = [
                a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(new_key, old_key, strict=True)
            ]
            steps = [round(cosine * min(2**14, 2**23 // len(y))) for cosine in alike]
            rows = sorted(sorted(range(len(y)), key=lambda row: (steps[row], row))[:count])
            value, old_value = linear(module.v_proj, new), linear(module.v_proj, old)
            for row in range(len(y)):
                value[row] = value[row] if row in rows else old_value[row]
            own, weights = attend(module, linear(module.q_proj, new), new_key, value)
            reused, _, _ = attention(layer, x, np.zeros(len(x)))
            y = y + np.stack([own[row] if row in rows else reused[row] for row in range(len(y))])
            x = x + reused
            own, reused = mlp(layer, y), mlp(layer, x)
            y = y + np.stack([own[row] if row in rows else reused[row] for row in range(len(y))])
            x = x + reused
            chosen.append(rows)
            cosines.append(np.array(alike))
        return Reused(y, chosen, cosines, weights)

    def _merge(
        self, x: Array, members: list[list[int]], keys: Array, pairs: int
    ) -> tuple[Array, list[list[int]]]:
        keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        evens, odds = list(range(0, len(x), 2)), list(range(1, len(x), 2))
        asking = evens[1:] if self.has_cls else evens
        partner = {a: max(odds, key=lambda b: (keys[a] @ keys[b], -b)) for a in asking}
        going = sorted(asking, key=lambda a: (-(keys[a] @ keys[partner[a]]), a))[:pairs]
        total = {b: x[b] * len(members[b]) for b in odds}
        groups = {b: list(members[b]) for b in odds}
        for a in going:
            total[partner[a]] = total[partner[a]] + x[a] * len(members[a])
            groups[partner[a]] += members[a]
        staying = [a for a in evens if a not in going]
        rows = [x[a] for a in staying] + [total[b] / len(groups[b]) for b in odds]
        return np.stack(rows), [members[a] for a in staying] + [groups[b] for b in odds]


def attended_block(layer: Any, x: Array) -> tuple[Array, Array]:
    """(hidden behind the block, attention [H,S,S])."""
    added, weights, _ = attention(layer, x, np.zeros(len(x)))
    x = x + added
    return x + mlp(layer, x), weights


def attention(layer: Any, x: Array, bias: Array) -> tuple[Array, Array, Array]:
    """(what attention adds [S,C], its weights [H,S,S], keys [S,d] averaged over heads)."""
    module, normed = layer.self_attn, norm(layer.layer_norm1, x)
    heads, width = module.num_heads, x.shape[1] // module.num_heads
    query, key, value = (
        linear(part, normed).reshape(len(x), heads, width)
        for part in (module.q_proj, module.k_proj, module.v_proj)
    )
    weights = np.zeros((heads, len(x), len(x)))
    answer = np.zeros((len(x), heads, width))
    for head in range(heads):
        logits = query[:, head] @ key[:, head].T / math.sqrt(width) + bias
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights[head] = powers / powers.sum(axis=1, keepdims=True)
        answer[:, head] = weights[head] @ value[:, head]
    return linear(module.out_proj, answer.reshape(x.shape)), weights, key.mean(axis=1)


def attend(module: Any, query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """(what attention adds to every row of query [S,C], its weights [H,S,S])."""
    heads, width = module.num_heads, query.shape[1] // module.num_heads
    weights, answer = np.zeros((heads, len(query), len(key))), np.zeros(query.shape)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for row in range(len(query)):
            powers = np.exp(key[:, part] @ query[row, part] / math.sqrt(width))
            weights[head, row] = powers / powers.sum()
            answer[row, part] = weights[head, row] @ value[:, part]
    return linear(module.out_proj, answer), weights


def linear(module: Any, x: Array) -> Array:
    """x W' + b."""
    weight, bias = (part.detach().numpy().astype(np.float64) for part in (module.weight, module.bias))
    return np.asarray(x @ weight.T + bias)


def norm(module: Any, x: Array) -> Array:
    """Layer norm over the last axis."""
    scale, shift = (part.detach().numpy().astype(np.float64) for part in (module.weight, module.bias))
    spread = np.sqrt(x.var(axis=-1, keepdims=True) + module.eps)
    return np.asarray((x - x.mean(axis=-1, keepdims=True)) / spread * scale + shift)


def mlp(layer: Any, x: Array) -> Array:
    """The block's second half, without its residual."""
    import torch

    hidden = linear(layer.mlp.fc1, norm(layer.layer_norm2, x))
    hidden = layer.mlp.activation_fn(torch.from_numpy(hidden)).numpy()
    return linear(layer.mlp.fc2, hidden)
