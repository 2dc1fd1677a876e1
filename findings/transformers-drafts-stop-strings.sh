#!/usr/bin/env bash
# One would guess: generate() with drafts (prompt lookup, an assistant) ends where it ends without them. Its greedy tokens
# are the same, and the end-of-sequence token and max_new_tokens are kept among the drafts too.
# What happens: stop_strings are looked for at the end of each pass only. A stop string inside the accepted drafts is run
# over, and the text goes on to max_new_tokens. With assistant_model, stop_strings raise and ask for the tokenizer that was
# given. The model here is one layer of zeros whose head says the next letter of the alphabet.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 numpy==2.2.6 transformers==5.24.0
cat >stop.py <<'PY'
import string, torch, transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
words = ["<s>", "</s>", *string.ascii_lowercase]
raw = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")

def alphabet():
    size = len(words)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(torch.eye(size).roll(1, 0))
    return model

model, assistant = alphabet(), alphabet()
prompt = tokenizer("abcdefghijklab", return_tensors="pt").input_ids

def text(**options):
    out = model.generate(prompt, do_sample=False, max_new_tokens=9, tokenizer=tokenizer, **options)
    return tokenizer.decode(out[0, prompt.shape[1]:])

print("transformers", transformers.__version__)
drafts = {"no drafts": {}, "prompt lookup": {"prompt_lookup_num_tokens": 6}, "assistant": {"assistant_model": assistant}}
for name, options in drafts.items():
    assert text(**options) == "cdefghijk"
    try:
        ended = text(stop_strings=["ef"], **options)
    except ValueError as error:
        ended = f"ValueError: {error}"
    print(f"{name}: without stop strings 'cdefghijk'; with 'ef': {ended!r}")
    if name == "no drafts":
        assert ended == "cdef"
    elif name == "prompt lookup":
        assert ended == "cdefghijk"
    else:
        assert ended.startswith("ValueError") and "tokenizer" in ended
PY
env/bin/python -W ignore stop.py
