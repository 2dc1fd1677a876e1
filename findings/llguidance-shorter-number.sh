#!/usr/bin/env bash
# One would guess: with "maximum": 0.95 in a JSON schema llguidance accepts the number 0.9.
# What happens: it does not, unless it is written 0.90. A number is refused if the maximum goes on after its last decimal:
# 0.9 of 0.95, 9.9 of 9.99, and both 0.1 and 0.12 of 0.123. So is the maximum itself with a zero behind it: 0.50 of 0.5.
# The same holds below zero for a negative minimum; and with a maximum of 0 or more and no minimum, no number between -1 and 0
# may end in a zero (-0.50). A model that wants to say 0.9 has written it when it finds that it has to go on.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet llguidance==1.9.1 numpy==2.2.6
env/bin/python - <<'PY'
import itertools, json
from decimal import Decimal
from importlib.metadata import version
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

class Bytes:  # token 0 ends the sequence, token 1 + n is byte n
    bos_token_id = unk_token_id = None
    eos_token_id, special_token_ids = 0, [0]
    tokens = [b"</s>", *(bytes([n]) for n in range(256))]
    def __call__(self, text):
        return [1 + n for n in (text.encode() if isinstance(text, str) else text)]

tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))
digits = "0123456789"
whole = ["", *(f".{digit}" for digit in digits), *(f".{one}{two}" for one, two in itertools.product(digits, digits))]
texts = [sign + start + rest for sign in ("", "-") for start in ("0", "1", "9") for rest in whole]
texts = [text for text in texts if not (text.startswith("-") and Decimal(text) == 0)]  # zero has no sign here

def accepted(bounds, text):
    grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "number", **bounds}))
    matcher, tokens = LLMatcher(tokenizer, grammar, log_level=0), [1 + n for n in text.encode()]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

tenths = [f"-0.{digit}0" for digit in digits[1:]]
print("llguidance", version("llguidance"), "of", len(texts), "numbers with up to two decimals")
for bounds, refused in (
    ({"minimum": 0, "maximum": 0.95}, ["0.9"]),
    ({"minimum": 0, "maximum": 0.5}, ["0.50"]),
    ({"minimum": 0, "maximum": 9.99}, ["9.9"]),
    ({"minimum": -0.25, "maximum": 0.25}, ["0.2", "-0.2"]),
    ({"maximum": 1.75}, ["1.7", *tenths]),
    ({"minimum": 0.95}, []),
    ({"minimum": 0, "maximum": 1}, []),
):
    inside = {text for text in texts if bounds.get("minimum", -99) <= float(text) <= bounds.get("maximum", 99)}
    seen = {text for text in texts if accepted(bounds, text)}
    missing = [text for text in texts if text in inside - seen]
    print(f"{json.dumps(bounds)}: {len(inside)} lie between the bounds, {len(seen)} are accepted, not {missing}")
    assert seen <= inside and missing == refused, missing
assert not any(accepted({"minimum": 0, "maximum": 0.123}, text) for text in ("0.1", "0.12"))
assert all(accepted({"minimum": 0, "maximum": 0.95}, text) for text in ("0.90", "0.900", "0.94", "0.95"))
PY
