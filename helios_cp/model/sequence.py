"""Where the tokens of a forward lie: all here, or spread over ranks.

The transformer calls a `TokenSequence` and knows nothing of ranks. `pipeline.parallelize` has one that does.
"""

from __future__ import annotations

from torch import Tensor

from helios_cp.model.layers import FeedForward, TokenOperations, attend


class TokenSequence:
    """The segments of a sequence (history parts, then noisy tokens), all of them here.

    A subclass may spread them. `before` is the number of tokens in the segments before this one. It decides which
    tokens of the segment are here.
    """

    def shard(self, tokens: Tensor, dim: int, before: int) -> Tensor:
        """The tokens of one whole segment that lie here."""
        return tokens

    def gather(self, tokens: Tensor, dim: int, length: int, before: int) -> Tensor:
        """The whole segment of `length` tokens, from the tokens that lie here."""
        return tokens

    def operations(self, lengths: tuple[int, ...]) -> tuple[TokenOperations, TokenOperations]:
        """For a sequence of segments of `lengths`: the operations of all blocks but the last, and of the last.

        The last block's queries and feed-forward are those of the last segment only.
        """
        operations = TokenOperations(attend, FeedForward.__call__)
        return operations, operations
