#!/usr/bin/env bash
# One would guess: an end-of-sequence token that a matcher takes is one token, whatever the grammar, so that
# rollback(n) undoes the last n tokens that consume_token said yes to.
# What happens: where the text could go on (a+), the end is counted. Where the grammar is complete (ab), the matcher
# has stopped by itself: consume_token(EOS) still says True, as often as one asks, and counts nothing.
# validate_tokens counts that end and try_consume_tokens does not; rollback(1) after it undoes the token before;
# rolling back as many as were accepted one by one leaves the matcher in an error for good.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet llguidance==1.9.1 numpy==2.2.6
env/bin/python - <<'PY'
from importlib.metadata import version
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

class Bytes:  # token 0 ends the sequence, token 1 + n is byte n
    bos_token_id = unk_token_id = None
    eos_token_id, special_token_ids = 0, [0]
    tokens = [b"</s>", *(bytes([n]) for n in range(256))]
    def __call__(self, text):
        return [1 + n for n in (text.encode() if isinstance(text, str) else text)]

tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))
END, A, B = 0, 1 + ord("a"), 1 + ord("b")

def matcher(regex):
    return LLMatcher(tokenizer, LLMatcher.grammar_from_regex(regex), log_level=0)

def allowed(m):
    mask = m.compute_bitmask()
    names = {END: "END", A: "a", B: "b"}
    return [names[n] for n in names if mask[n // 8] >> n % 8 & 1]

print("llguidance", version("llguidance"))
seen = {}
for regex, text in (("a+", [A, A]), ("ab", [A, B])):
    tokens = [*text, END]
    counts = matcher(regex).validate_tokens(tokens), matcher(regex).try_consume_tokens(tokens)
    one, every = matcher(regex), matcher(regex)
    accepted = [all([m.consume_token(t) for t in tokens]) for m in (one, every)]
    one.rollback(1)
    rolled = every.rollback(3)
    seen[regex] = (*counts, all(accepted), allowed(one), rolled, every.is_error())
    print(f"{regex}: valid {counts[0]}, consumed {counts[1]}; one by one all accepted: {all(accepted)}; allowed after "
          f"rollback(1): {allowed(one)}; rollback(3): {rolled}, error: {every.is_error()}")
m = matcher("ab")
repeated = [m.consume_token(t) for t in (A, B, END, END, END)]
print("ab, then the end three times:", repeated)
assert seen["a+"] == (3, 3, True, ["END", "a"], True, False), seen
assert seen["ab"] == (3, 2, True, ["b"], False, True), seen
assert all(repeated)
PY
