#!/usr/bin/env bash
# One would guess: where a JSON schema lists the whole numbers that are allowed (const, enum), llguidance accepts these, or
# says that it cannot.
# What happens: beyond 2**53 they go through a double. The number of the schema is refused and its neighbour is accepted in
# its place: only ...992 for 9007199254740993, only ...768 for an id like 1234567890123456789; of two such ids in a row one
# and the same number is left. Bounds move the same way. There is no error and no warning, and each answer has an id that the
# schema does not allow. Strings of digits, and numbers without bounds, are left as they are.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet llguidance==1.9.1 numpy==2.2.6 jsonschema==4.26.0
env/bin/python - <<'PY'
import json
from importlib.metadata import version
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

class Bytes:  # token 0 ends the sequence, token 1 + n is byte n
    bos_token_id = unk_token_id = None
    eos_token_id, special_token_ids = 0, [0]
    tokens = [b"</s>", *(bytes([n]) for n in range(256))]
    def __call__(self, text):
        return [1 + n for n in (text.encode() if isinstance(text, str) else text)]

tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))

def accepted(schema, text):
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)
    assert not matcher.get_error() and not matcher.get_grammar_warnings()
    tokens = [1 + n for n in text.encode()]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

print("llguidance", version("llguidance"), "jsonschema", version("jsonschema"))
exact, user = 2**53, 1234567890123456789
for schema, allowed, taken in (
    ({"const": exact - 1}, [exact - 1], [exact - 1]),
    ({"const": exact + 1}, [exact + 1], [exact]),
    ({"enum": [-user]}, [-user], [-user + 21]),
    ({"enum": [user, user + 1]}, [user, user + 1], [user - 21]),
    ({"type": "integer", "minimum": exact + 1, "maximum": exact + 1}, [exact + 1], [exact]),
    ({"type": "integer"}, [exact + 1, user], [exact + 1, user]),
    ({"const": str(exact + 1)}, [str(exact + 1)], [str(exact + 1)]),
):
    values = list(dict.fromkeys([*allowed, *taken]))
    seen = [value for value in values if accepted(schema, json.dumps(value))]
    print(f"{json.dumps(schema)}: of {values} accepted {seen}")
    assert [value for value in values if Draft202012Validator(schema).is_valid(value)] == allowed
    assert seen == taken
PY
