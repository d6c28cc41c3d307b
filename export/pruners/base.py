"""What a pruner is: a small torch module that turns cues about N visual tokens into K kept indices."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vtp.engines.errors import UsageError


class Pruner(nn.Module):
    """Selects K of N visual tokens; one subclass per file, named as the command line names the method.

    Class attributes declare the method; the exporter reads them and never looks inside:

    name     the CLI name, equal to the file name.
    site     "vision", "projector" or "decoder:L" (between decoder layers L-1 and L).
    needs    names of the cues that `forward` takes by keyword, in order. By site:
             vision      image_features [B,N,C] (before the projector), attention_scores float32 [B,N]
             projector   image_embeds [B,N,D], attention_scores float32 [B,N]
             decoder:L   attention_scores float32 [B,N] (mean over heads of the last prompt token's row of
                         layer L-1, cut to the image), keys [B,N,kv_heads*head_dim] (layer L's k_proj),
                         hidden_states [B,N,D]
    options  option name -> default value; the command line's `--method-option k=v` sets them.
    paper    "arXiv NNNN.NNNNN", or "" for a baseline.
    """

    name: ClassVar[str]
    site: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    options: ClassVar[dict[str, Any]] = {}
    paper: ClassVar[str] = ""

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        """`grid` is (rows, columns) of the visual tokens, N their product; `keep` is K, 1 to N.

        Raises UsageError for an option the method does not have or a value it cannot take.
        """
        super().__init__()
        self.grid = grid
        self.count = grid[0] * grid[1]
        self.keep = keep
        if not 1 <= keep <= self.count:
            raise UsageError(
                f"keep-tokens {keep} is outside the {self.count} visual tokens of this model; "
                f"choose 1 to {self.count}"
            )
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            known = ", ".join(sorted(self.options)) or "none"
            raise UsageError(f"method {self.name} has no option '{unknown[0]}'; its options: {known}")
        self.settings = {**self.options, **options}

    @classmethod
    def default_keep(cls, count: int) -> int:
        """The paper's keep-count for N = `count` visual tokens (64 of LLaVA's 576 unless said otherwise)."""
        return max(1, count * 64 // 576)

    def forward(self, **cues: Tensor) -> Tensor:
        """Take the cues of `needs` by name; return keep_indices int64 [B,K], ascending and unique."""
        raise NotImplementedError
