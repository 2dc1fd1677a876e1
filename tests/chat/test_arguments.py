"""Arguments: whatever the templates write of a value is read back as that value."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_gemma4_spec.chat.arguments import Arguments

MARK = "\ue000"  # stands for a quote token
KEYS = st.text(st.characters(categories=["L", "N"], include_characters="_-. "), min_size=1, max_size=6).map(str.strip)
STRINGS = st.text(st.characters(exclude_characters=MARK, exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ['"', "\\", "\\n", '{"a":1}', '<|"|>', "<tool_call|>", "]}", "a,b:c", "\n\t\x00", "é😀"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS.filter(bool), inner, max_size=3),
    max_leaves=12,
)


def written(value: Any, quoted_keys: bool) -> str:
    """As the templates' macro ``format_argument`` writes a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return MARK + value + MARK
    if isinstance(value, dict):
        mark = MARK if quoted_keys else ""
        return "{" + ",".join(f"{mark}{k}{mark}:{written(v, quoted_keys)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(v, quoted_keys) for v in value) + "]"
    return str(value)


def read(text: str, size: int) -> tuple[str, bool, str]:
    """JSON, whether it was complete, and what was given back."""
    arguments, out = Arguments(), ""
    for i, part in enumerate(text.split(MARK)):
        if i:
            json_ = arguments.quote()
            assert json_ is not None
            out += json_
        for at in range(0, len(part), size):
            more, rest = arguments.text(part[at : at + size])
            out += more
            assert rest == ""
    complete = arguments.complete
    end, rest = arguments.close()
    return out + end, complete, rest


@given(st.dictionaries(KEYS.filter(bool), VALUES, max_size=4), st.booleans(), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_round_trip(value: dict[str, Any], quoted_keys: bool, size: int) -> None:
    text, complete, rest = read(written(value, quoted_keys), size)
    assert json.loads(text) == value
    assert complete
    assert rest == ""


@given(st.dictionaries(KEYS.filter(bool), VALUES, max_size=4), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_plain_json(value: dict[str, Any], size: int) -> None:
    for ascii_ in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_).replace(MARK, "")
        assert json.loads(read(text, size)[0]) == json.loads(text)


@given(st.dictionaries(KEYS.filter(bool), VALUES, max_size=4), st.data())
@settings(max_examples=300, deadline=None)
def test_cut_anywhere_it_is_json(value: dict[str, Any], data: st.DataObject) -> None:
    """Cut: valid JSON all the same, and no scalar that is not in the whole."""
    whole = written(value, False)
    text, _, _ = read(whole[: data.draw(st.integers(0, len(whole)))], 3)
    part = json.loads(text)
    assert isinstance(part, dict)
    for key in part:
        assert key in value


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{n:1.50}", '{"n": 1.50}'),
        ("{n:123456789012345678901234567890}", '{"n": 123456789012345678901234567890}'),
        ("{n:-0}", '{"n": -0}'),
        ("{n:1e+16}", '{"n": 1e+16}'),
        ("{n:007}", '{"n": "007"}'),
        ("{n:+1}", '{"n": "+1"}'),
        ("{n:NaN}", '{"n": "NaN"}'),
        ("{n:True}", '{"n": "True"}'),
        ("{n:None,m:nil,o:NULL}", '{"n": null, "m": null, "o": null}'),
        ("{n:,m:}", '{"n": "", "m": ""}'),
        ("{t:12:30}", '{"t": "12:30"}'),
        ("{ a : 1 , b : [ 1 , 2 ] , }", '{"a": 1, "b": [1, 2]}'),
        ("{a:1,a:2}", '{"a": 1, "a": 2}'),
    ],
)
def test_values_without_quotes(text: str, wanted: str) -> None:
    assert read(text, 1) == (wanted, True, "")


@pytest.mark.parametrize(
    ("text", "wanted", "given_back"),
    [
        ("{n:12", "{}", "n:12"),
        ("{n:tru", "{}", "n:tru"),
        ("{n:1,cit", '{"n": 1}', "cit"),
        (f"{{n:1,city:{MARK}Par", '{"n": 1, "city": "Par"}', ""),
        (f"{{o:{{a:[1,{MARK}x", '{"o": {"a": [1, "x"]}}', ""),
        ('{s:"x\\u00e', '{"s": "x\\\\u00e"}', ""),
        ("", "{}", ""),
    ],
)
def test_cut(text: str, wanted: str, given_back: str) -> None:
    assert read(text, 1) == (wanted, False, given_back)


@pytest.mark.parametrize("text", ["x", "{]", "{a}", "{a:1]", "{a:[1}", "{a:x{y}}", "{:1}", "{a:1}}"])
def test_what_fits_nowhere_is_given_back(text: str) -> None:
    arguments = Arguments()
    out, rest = arguments.text(text)
    assert rest
    end, unsaid = arguments.close()
    json.loads(out + end)
    assert text.endswith(unsaid + rest)
