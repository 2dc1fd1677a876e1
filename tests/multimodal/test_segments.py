"""A step with images in pieces: in the kernel's eyes every token sees what it should, and little is walked."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata

from vllm_gemma4_spec.multimodal import segments
from vllm_gemma4_spec.multimodal.segments import Layout, Row, lay_out, within


def test_ranges_hold_every_pair_nearer_than_the_window() -> None:
    at = torch.arange(20)
    inside = (at >= 5) & (at <= 14)
    for window in (1, 5, 9, 10, 30):
        found = torch.zeros(20, 20, dtype=torch.bool)
        for first, last in within(window, (5, 14)):
            found[first : last + 1, first : last + 1] = True
        assert torch.equal(found, inside[:, None] & inside & ((at[:, None] - at).abs() < window))


@st.composite
def rows(draw: st.DrawFn) -> Row:
    start, length = draw(st.integers(0, 90)), draw(st.integers(1, 120))
    end, at, images = start + length, max(0, start - draw(st.integers(0, 8))), []
    for text, size in draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), max_size=4)):
        first, last = at + text, at + text + size - 1
        if first < end and start <= last < end:  # what the scheduler sees to: the end of an image is in the step
            images.append((first, last))
        at = last + 1
    return Row(start, end, images)


def seen_by_the_kernel(layout: Layout, length: int, window: int, at: int, piece: int, base: int) -> set[int]:
    """Positions of the keys that token ``at`` of a piece attends to, by the masks of ``triton_unified_attention``."""
    query = length - (layout.query_start_loc[piece + 1] - layout.query_start_loc[piece]) + at
    return {
        base + key
        for key in range(length)
        if (key <= query and query - key < window)
        or any(a < b and a <= query <= b and a <= key <= b for a, b in layout.ranges[piece])
    }


@given(
    batch=st.lists(rows(), min_size=1, max_size=4),
    window=st.sampled_from([1, 7, 16, 40, 300]),
    block_size=st.sampled_from([4, 16]),
    slack=st.sampled_from([0, 3]),
    late=st.integers(0, 3),
)
def test_every_token_sees_what_it_should(batch: list[Row], window: int, block_size: int, slack: int, late: int) -> None:
    """``late``: a row without images may begin earlier than the host believes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(segments, "TEXT", 16)
        layout = Layout.of(batch, window, block_size, slack)
    late = min(late, slack)
    starts = [row.start if row.images else max(0, row.start - late) for row in batch]
    lengths = torch.tensor([s + row.end - row.start for s, row in zip(starts, batch, strict=True)], dtype=torch.int32)
    columns = int(lengths.max()) // block_size + 1
    table = torch.arange(len(batch) * columns, dtype=torch.int32).view(len(batch), columns)
    values: dict[str, Any] = dict.fromkeys(field.name for field in fields(TritonAttentionMetadata))
    metadata = TritonAttentionMetadata(**values | {"seq_lens": lengths, "block_table": table})
    laid_out = lay_out(metadata, layout.on(torch.device("cpu")))
    # Triton would compile the kernel again for other alignments.
    for tensor in (laid_out.query_start_loc, laid_out.mm_prefix_range_tensor, laid_out.block_table):
        assert tensor.data_ptr() % 16 == 0
    assert laid_out.block_table.stride(0) % 16 == 0
    assert laid_out.mm_prefix_range_tensor.tolist() == [[list(r) for r in found] for found in layout.ranges]

    tokens = [(row, number) for row, entry in enumerate(batch) for number in range(entry.end - entry.start)]
    assert layout.query_start_loc[-1] == len(tokens)
    assert laid_out.query_start_loc.tolist() == layout.query_start_loc
    for piece, row in enumerate(layout.row):
        base, length = layout.first_block[piece] * block_size, int(laid_out.seq_lens[piece])
        count = layout.query_start_loc[piece + 1] - layout.query_start_loc[piece]
        assert 0 < count <= layout.max_query_len
        assert count <= length <= layout.max_seq_len
        needed = -(-length // block_size)
        assert laid_out.block_table[piece, :needed].tolist() == table[row, base // block_size :][:needed].tolist()
        for at in range(count):
            owner, number = tokens[layout.query_start_loc[piece] + at]
            position = starts[owner] + number
            assert owner == row
            image = next((i for i in batch[row].images if i[0] <= position <= i[1]), (position, position))
            wanted = set(range(max(0, position - window + 1), position + 1))
            wanted |= {key for key in range(image[0], image[1] + 1) if abs(key - position) < window}
            assert seen_by_the_kernel(layout, length, window, at, piece, base) == wanted
        # A piece walks itself, the window in front of it, and the block that the window begins in.
        assert length <= count + window - 1 + slack + block_size


def test_a_range_takes_few_kernels() -> None:
    """The number of ranges is compiled into the kernel: images no wider than the window have one each."""
    one, wide = Row(0, 700, [(10, 289), (300, 579)]), Row(0, 1200, [(10, 1109)])
    assert {len(found) for found in Layout.of([one], 1024, 16, 0).ranges} == {1}
    assert {len(found) for found in Layout.of([one, wide], 1024, 16, 0).ranges} == {128}  # 77 of the wide one
