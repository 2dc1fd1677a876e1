#!/usr/bin/env bash
# One would guess: openai's stream helper (chat.completions.stream) sends content.done and arguments.done when a text or the
# arguments of a tool call are complete, with what the final completion has.
# What happens: it sends them as soon as another part of the message comes, and not again. Text that goes on after a tool
# call, as Gemma 4 may write it, has a content.done without what follows the call. Of two calls whose pieces alternate, which
# is what their index is for, both have an arguments.done with JSON that ends in the middle; get_final_completion() has all
# of it. With a tool from pydantic_function_tool the helper parses that piece and raises, in a stream that is valid.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet openai==3.57.0
cat >done.py <<'PY'
import json, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
import openai, pydantic

sent = []

class Server(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in sent).encode() + b"data: [DONE]\n\n"
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

def chunks(*deltas):
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "tool_calls"})
    return [{"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]} for choice in choices]

def call(index, arguments, name=None):
    start = {"id": f"call{index}", "type": "function"} if name else {}
    return {"tool_calls": [{"index": index, **start, "function": {**({"name": name} if name else {}), "arguments": arguments}}]}

server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{server.server_port}/v1", max_retries=0)

def run(*deltas, tools=openai.omit):
    sent[:] = chunks(*deltas)
    with client.chat.completions.stream(model="m", messages=[{"role": "user", "content": "?"}], tools=tools) as stream:
        done = [getattr(event, "content", None) or event.arguments for event in stream if event.type.endswith("done")]
        message = stream.get_final_completion().choices[0].message
    return done, message.content, [tool_call.function.arguments for tool_call in message.tool_calls]

print("openai", openai.__version__)
seen = run({"content": "Let me see. "}, call(0, '{"city": "Rome"}', "weather"), {"content": "One moment."})
print("text around a call:", seen)
assert seen == (["Let me see. ", '{"city": "Rome"}'], "Let me see. One moment.", ['{"city": "Rome"}'])

alternating = call(0, '{"city": ', "weather"), call(1, '{"city": ', "weather"), call(0, '"Rome"}'), call(1, '"Oslo"}')
seen = run(*alternating)
print("pieces of two calls:", seen)
assert seen == (['{"city": ', '{"city": '], None, ['{"city": "Rome"}', '{"city": "Oslo"}'])

class weather(pydantic.BaseModel):
    city: str

tools = [openai.pydantic_function_tool(weather)]
in_order = [alternating[n] for n in (0, 2, 1, 3)]
assert run(*in_order, tools=tools)[0] == ['{"city": "Rome"}', '{"city": "Oslo"}']
try:
    run(*alternating, tools=tools)
    raise SystemExit("the helper takes the pieces of two calls in turn")
except pydantic.ValidationError as error:
    print("the same with a model of the arguments: ValidationError:", error.errors()[0]["msg"])
PY
env/bin/python done.py
