"""What TRITON_ATTN reads of a step with images, in sliding layers: pieces of requests, each from its window on.

With ranges in which tokens attend both ways the kernel of 0.19.1 does without the window's lower end and walks the
whole context: at 8,192 tokens 11.2 ms a layer of 31B in place of 1.7, on an H200. So each image, and every
:data:`TEXT` tokens between, become a request of their own in the metadata, whose context begins with the first block
that its window reaches into. The kernel counts positions from there; whatever a token may see is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from vllm.utils.math_utils import cdiv, next_power_of_2, round_up
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata

Range = tuple[int, int]  # first and last position
TEXT = 128  # tokens; a piece walks its window and itself
_ALIGNED = 16


@dataclass(frozen=True)
class Row:
    """Tokens ``start`` to ``end - 1`` of a request, which a step computes, and the images among them."""

    start: int
    end: int
    images: Sequence[Range] = ()


@dataclass(frozen=True)
class Piece:
    row: int
    start: int
    end: int
    image: Range | None = None


def within(window: int, image: Range) -> list[Range]:
    """``image`` as ranges of ``window`` positions at most, which together hold every pair nearer than ``window``."""
    first, last = image
    return [(at, min(at + window - 1, last)) for at in range(first, max(first, last - window + 1) + 1)]


def cut_up(rows: Iterable[Row]) -> Iterator[Piece]:
    """Images whole, text in between cut up; in the order of the rows and their tokens."""
    for number, row in enumerate(rows):
        at = row.start
        for image in [*sorted(row.images), None]:
            stop = row.end if image is None else max(at, image[0])
            for start in range(at, stop, TEXT):
                yield Piece(number, start, min(start + TEXT, stop))
            if image is not None:
                at = min(image[1] + 1, row.end)
                yield Piece(number, stop, at, image)


@dataclass(frozen=True)
class Layout:
    """Pieces as the kernel takes requests; lists have one entry per piece.

    Attributes:
        row: of the batch.
        first_block: of the row's block table, with which the piece's context begins.
        cut: tokens of the row's length that the piece's context is without, before and behind.
        query_start_loc: one entry more; tokens of the step.
        ranges: ``[pieces, n, 2]``, positions in the piece's context, n a power of two: each n compiles a kernel.
        max_query_len, max_seq_len, block_size: tokens.
    """

    row: list[int]
    first_block: list[int]
    cut: list[int]
    query_start_loc: list[int]
    ranges: list[list[Range]]
    max_query_len: int
    max_seq_len: int
    block_size: int

    @classmethod
    def of(cls, rows: Sequence[Row], window: int, block_size: int, slack: int) -> Layout:
        """
        Args:
            slack: tokens by which a row without images may start earlier or later than its ``start`` says. (With async
                scheduling the host does not know yet how many drafts were accepted.)
        """
        parts = list(cut_up(rows))
        first_block = [max(0, part.start - slack - window + 1) // block_size for part in parts]
        bases = [block * block_size for block in first_block]
        ranges = [
            []
            if part.image is None
            else [(max(0, first - base), last - base) for first, last in within(window, part.image) if last > base]
            for part, base in zip(parts, bases, strict=True)
        ]
        most = next_power_of_2(max(1, *map(len, ranges)))
        return cls(
            row=[part.row for part in parts],
            first_block=first_block,
            cut=[rows[part.row].end - part.end + base for part, base in zip(parts, bases, strict=True)],
            query_start_loc=[0, *accumulate(part.end - part.start for part in parts)],
            ranges=[found + [(0, 0)] * (most - len(found)) for found in ranges],
            max_query_len=max(part.end - part.start for part in parts),
            max_seq_len=max(part.end - base for part, base in zip(parts, bases, strict=True)) + slack,
            block_size=block_size,
        )

    def on(self, device: torch.device) -> DeviceLayout:
        """One copy to the device, no synchronization.

        Triton compiles a kernel anew where a pointer or the table's width is no multiple of 16, so all of them are.
        """
        positions = [position for found in self.ranges for part in found for position in part]
        lists = [self.row, self.first_block, self.cut, self.query_start_loc, positions]
        padded = [values + [0] * (-len(values) % _ALIGNED) for values in lists]
        sent = async_tensor_h2d([*chain.from_iterable(padded)], torch.int32, device, pin_memory=device.type == "cuda")
        parts = zip(sent.split([len(values) for values in padded]), lists, strict=True)
        row, first_block, cut, query_start_loc, ranges = (part[: len(values)] for part, values in parts)
        width = round_up(cdiv(self.max_seq_len, self.block_size), _ALIGNED)
        columns = torch.arange(width, device=device) + first_block[:, None]
        return DeviceLayout(self, row, columns, cut, query_start_loc, ranges.view(len(self.row), -1, 2))


@dataclass(frozen=True)
class DeviceLayout:
    """:class:`Layout` as tensors; ``columns`` is ``[pieces, blocks]``, of the row's block table."""

    layout: Layout
    row: Tensor
    columns: Tensor
    cut: Tensor
    query_start_loc: Tensor
    ranges: Tensor


@dataclass
class PieceMetadata(TritonAttentionMetadata):
    """Of :class:`Layout`'s pieces; ``ranges`` is made once per step, where the original makes it in every layer."""

    ranges: Tensor | None = None

    @property
    def mm_prefix_range_tensor(self) -> Tensor | None:
        return self.ranges


def lay_out(metadata: TritonAttentionMetadata, pieces: DeviceLayout) -> PieceMetadata:
    """``metadata`` of a step's rows as that of their pieces."""
    table = metadata.block_table
    columns = pieces.columns.clamp(max=table.shape[1] - 1)  # rounded up, or longer than the row is
    values: dict[str, Any] = {field.name: getattr(metadata, field.name) for field in fields(metadata)}
    values |= {
        "query_start_loc": pieces.query_start_loc,
        "seq_lens": metadata.seq_lens[pieces.row] - pieces.cut,
        "block_table": table[pieces.row[:, None], columns],
        "max_query_len": pieces.layout.max_query_len,
        "max_seq_len": pieces.layout.max_seq_len,
        "ranges": pieces.ranges,
    }
    return PieceMetadata(**values)
