"""What a pruner is: a small torch module that turns cues about N visual tokens into K kept indices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from vtp.engines.errors import UsageError


class Pruner(nn.Module):
    """Selects K of N visual tokens; one subclass per file, named as the command line names the method.

    Class attributes declare the method; the exporter reads them and never looks inside:

    name       the CLI name, equal to the file name.
    site       "vision", "projector", "decoder:L" (between decoder layers L-1 and L), or "decoder" for a
               method that says in `sites` at which layers it prunes.
    needs      names of the cues that `forward` takes by keyword, in order; see below.
    options    option name -> default value; the command line's `--method-option k=v` sets them.
    merges     False: kept rows are what they were. True (vision and projector sites): `forward` also returns
               the rows, into which others may have been merged; also as a second cut.
    reads_grid False: `grid` only tells how many tokens there are. True: neighbours in it are neighbours in
               the picture, so the method is refused where the tokens form no grid.
    reads_frames  True: a method for videos alone; `grid` is then (frames, patches of a frame).
    inside     () or the cues that `forward` takes in place of `needs` where the method is the second cut
               (`--then`) inside the decoder; a decoder-site method's are its `needs`.
    positions  default of the exporter's option of that name at vision and projector sites: "compact"
               (pruned tokens never existed) or "original" (kept tokens keep their places).
    paper      "arXiv NNNN.NNNNN", or "" for a baseline.

    A method that computes in float64 sets `self.exact = True` and reads it in `forward`; for an engine
    without float64 the exporter makes it False.

    Cues at site vision:
        image_features    [B,N,C]  before the projector
        attention_scores  float32 [B,N]  mean over heads of the CLS query's row, or of the attention received
        received_scores   float32 [B,N]  mean over heads and rows of the attention received, with CLS as well
        middle_received   float32 [B,N]  the same of a block at three eighths of the tower's depth
        early_scores      float32 [B,N]  attention_scores of a block at a quarter of the depth
        vision_keys       [B,N,C]  k_proj of the layer that makes the features, heads side by side
        picture, reference_picture  [B,3,H,W]  pixel_values of the picture, and of the one it is compared with
    at site projector (a method that takes text runs once a prompt, the others once a picture):
        image_embeds      [B,N,D]
        attention_scores, received_scores, middle_received, early_scores  as above
        text_embeds       [B,R,D]  the prompt's R text tokens, placeholders left out
        text_mask         float32 [B,R]  1 for text that follows the (first) picture, 0 for what precedes it
                          and for padding
    at a decoder site:
        attention_scores  float32 [B,N]  mean over heads of the last prompt token's row in layer L-1
        next_scores       float32 [B,N]  the same row of layer L, which has not run yet
        keys              [B,N,kv_heads*head_dim]  layer L's k_proj, without the rotary embedding
        hidden_states     [B,N,D]  what enters layer L
        image_embeds      [B,N,D]  what entered layer 0, of all the picture's tokens at every site
        text_attention    float32 [B,H,R,N]  rows of the text tokens in layer L-1
        text_gravity      float32 [B,R,N]  what the rotary embedding alone makes of those rows: all-ones
                          queries and keys, turned; products / sqrt(head_dim)
        text_embeds, text_mask  as above
    """

    name: ClassVar[str]
    site: str
    needs: ClassVar[tuple[str, ...]]
    options: ClassVar[dict[str, Any]] = {}
    merges: ClassVar[bool] = False
    reads_grid: ClassVar[bool] = False
    reads_frames: ClassVar[bool] = False
    inside: ClassVar[tuple[str, ...]] = ()
    positions: ClassVar[str] = "compact"
    paper: ClassVar[str] = ""

    def __init__(self, grid: tuple[int, int], keep: int, **options: Any) -> None:
        """`grid` is (rows, columns) of the visual tokens, N their product; `keep` is K, 1 to N.

        At a later one of several sites the tokens that are left form no grid: `grid` is then (1, N).
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

    @classmethod
    def sites(
        cls, layers: int, count: int, keep: int, settings: Mapping[str, Any]
    ) -> tuple[tuple[int, int], ...]:
        """For site "decoder": pairs (L, tokens kept before layer L) in a decoder of `layers` layers.

        L ascends within 1 to layers - 1 and does not depend on `keep`; the counts never rise, and the last
        one is `keep`. The exporter makes one instance per pair. Raises UsageError, in one line, for a
        decoder that is too shallow.
        """
        raise NotImplementedError

    def forward(self, **cues: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Take the cues of `needs` by name; return keep_indices int64 [B,K], ascending and unique.

        A method that merges returns (keep_indices, rows [B,K,C]): the tokens that the rows stand for, and the
        rows in the dtype of the features it was given.
        """
        raise NotImplementedError
