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
    """JSON, whether it was complete, and what was read that is not in it."""
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
    end, rest = arguments.close(cut=True)
    return out + end, complete, rest


@given(st.dictionaries(KEYS.filter(bool), VALUES, max_size=4), st.booleans(), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_round_trip(value: dict[str, Any], quoted_keys: bool, size: int) -> None:
    text, complete, rest = read(written(value, quoted_keys), size)
    assert json.loads(text) == value
    assert complete
    assert rest == ""


@given(st.dictionaries(KEYS.filter(bool), VALUES, max_size=4), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_plain_json(value: dict[str, Any], size: int) -> None:
    for ascii_ in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_).replace(MARK, "")
        assert json.loads(read(text, size)[0]) == json.loads(text)


@given(st.dictionaries(KEYS.filter(bool), VALUES, max_size=4), st.data())
@settings(max_examples=100, deadline=None)
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
        ("{:1}", '{"": 1}'),
        ("{a:{:1,b:2},:3}", '{"a": {"": 1, "b": 2}, "": 3}'),
        ("{n:1e400,m:-1E+999}", '{"n": "1e400", "m": "-1E+999"}'),
        ("{n:1e-400,m:0e-400,o:0.0}", '{"n": "1e-400", "m": 0e-400, "o": 0.0}'),
        ("{n:" + "7" * 4300 + "}", '{"n": ' + "7" * 4300 + "}"),
        ("{n:" + "7" * 5000 + "}", '{"n": "' + "7" * 5000 + '"}'),
        ("{n:1\u0661}", '{"n": "1\u0661"}'),
        ('{q:"a" or "b",n:1}', '{"q": "\\"a\\" or \\"b\\"", "n": 1}'),
        ('{q:"a, b" or "c}]",n:1}', '{"q": "\\"a, b\\" or \\"c}]\\"", "n": 1}'),
        ('{q:site:"x, y" z,n:1}', '{"q": "site:\\"x, y\\" z", "n": 1}'),
        ('{d:5" pipe,n:1}', '{"d": "5\\" pipe", "n": 1}'),
        ('{q:["a" or "b","c" ]}', '{"q": ["\\"a\\" or \\"b\\"", "c"]}'),
        ('{q:"a \\"b\\" c" or d}', '{"q": "\\"a \\\\\\"b\\\\\\" c\\" or d"}'),
        ('{q:"\\ud83d\\ude00 \\ud83d x"}', '{"q": "😀 \\\\ud83d x"}'),
        ('{"\\ud83d":1}', '{"\\\\ud83d": 1}'),
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
        ('{s:"x\\u00e', '{"s": "x"}', 's:"x\\u00e'),
        ('{s:"x\\', '{"s": "x"}', 's:"x\\'),
        ('{s:"x\\\\', '{"s": "x\\\\"}', 's:"x\\\\'),
        ('{s:"\\ud83d\\ude', '{"s": ""}', 's:"\\ud83d\\ude'),
        ('{s:"x" ', '{"s": "x"}', 's:"x" '),
        ('{s:"x" o', "{}", 's:"x" o'),
        ("", "{}", ""),
    ],
)
def test_cut(text: str, wanted: str, given_back: str) -> None:
    assert read(text, 1) == (wanted, False, given_back)


@pytest.mark.parametrize("text", ["x", "{]", "{a}", "{a:1]", "{a:[1}", "{a:x{y}}", "{a:1}}"])
def test_what_fits_nowhere_is_given_back(text: str) -> None:
    arguments = Arguments()
    out, rest = arguments.text(text)
    assert rest
    end, unsaid = arguments.close(cut=False)
    json.loads(out + end)
    assert text.endswith(unsaid + rest)


@pytest.mark.parametrize("form", ["native", "json"])
@given(st.text(st.sampled_from('ab,}]"\\\\ud83e0 :é'), max_size=24))
@settings(max_examples=100, deadline=None)
def test_a_string_in_quotes_is_read_whole_or_cut(form: str, inside: str) -> None:
    """Any text between ordinary quotes, in two parts: always JSON that UTF-8 can carry."""
    for at in range(len(inside) + 1):
        arguments = Arguments(native=form == "native")
        out, rest = arguments.text('{"q":"' + inside[:at])
        if not rest and not arguments.complete:
            out += arguments.text(inside[at:])[0]
        text = out + arguments.close(cut=True)[0]
        assert isinstance(json.loads(text), dict)
        json.dumps(json.loads(text), ensure_ascii=False).encode()
