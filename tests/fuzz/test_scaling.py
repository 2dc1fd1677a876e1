"""A token costs the same however long the output is, whatever its shape."""

from __future__ import annotations

import time

import pytest

from tests.fuzz.chat import words
from tests.fuzz.shapes import parse, shapes

SHORT, LONG = 4_000, 64_000


def cost(shape: str, length: int) -> float:
    """Processor seconds a token, the least of three."""
    made = shapes(words())[shape](length)
    times = []
    for _ in range(3):
        began = time.process_time()
        parse(made, 3)
        times.append(time.process_time() - began)
    return min(times) / length


@pytest.mark.slow
@pytest.mark.parametrize("shape", shapes(words()))
def test_time_is_linear_in_the_length(shape: str) -> None:
    """Sixteen times as many tokens; quadratic time would make each of them sixteen times as dear."""
    assert cost(shape, LONG) < 5 * cost(shape, SHORT)
