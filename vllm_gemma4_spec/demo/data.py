"""Synthetic dialogues: the questions the demo pair learns to answer, made from word lists and seeds.

Every question has exactly one right answer, so that an answer can be marked right or wrong. A question belongs
to the training or to the held-out part by a hash of its text: what is held out is never trained on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

NAMES = ["Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jonas"]
THINGS = ["apples", "books", "coins", "eggs", "pens", "stamps", "stones", "tickets"]
NUMBER_WORDS = ["two", "three", "four", "five"]
LISTS = {
    "planets": ["Mercury", "Venus", "Earth", "Mars", "Jupiter"],
    "colours": ["red", "green", "blue", "yellow", "black"],
    "fruits": ["apple", "banana", "cherry", "grape", "lemon"],
    "animals": ["cat", "dog", "horse", "lion", "mouse"],
    "months": ["January", "February", "March", "April", "May"],
    "days": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"],
}
CAPITALS = {
    "Austria": "Vienna",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "France": "Paris",
    "Germany": "Berlin",
    "Greece": "Athens",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Spain": "Madrid",
}
CITIES = list(CAPITALS.values())
SKIES = ["sunny", "cloudy", "rainy", "windy", "foggy"]
SYSTEM = "You are a helpful assistant."


def _function(name: str, description: str, parameter: str, kind: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {parameter: {"type": kind}}, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


GET_WEATHER = _function("get_weather", "The weather in a city.", "city", "string")
SET_TIMER = _function("set_timer", "Start a timer.", "minutes", "integer")


@dataclass(frozen=True)
class Dialogue:
    """A prompt and the one right answer to it.

    ``calls`` are (function name, arguments); an answer has either content or calls. ``reasoning`` is what the
    model is to think when ``thinking`` is on.
    """

    kind: str
    messages: list[dict[str, Any]]
    reasoning: str
    content: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = False

    @property
    def in_reasoning(self) -> bool:
        """Whether the prompt itself opens the reasoning channel, as it does after a tool's result."""
        return self.thinking and self.messages[-1]["role"] == "tool"

    @property
    def answer(self) -> str:
        """What the model is to write after the prompt, with its control tokens, up to the one that ends it."""
        thought = f"{self.reasoning}\n<channel|>" if self.thinking else ""
        if self.thinking and not self.in_reasoning:
            thought = f"<|channel>thought\n{thought}"
        if not self.calls:
            return f"{thought}{self.content}<turn|>"
        calls = "".join(f"<|tool_call>call:{name}{{{_arguments(a)}}}<tool_call|>" for name, a in self.calls)
        return f"{thought}{calls}<|tool_response>"

    @property
    def held_out(self) -> bool:
        """One question in ten, whatever stands around it."""
        text = "\n".join(str(m["content"]) for m in self.messages if m["role"] != "system")
        return hashlib.sha256(text.encode()).digest()[0] % 10 == 0


def _arguments(arguments: dict[str, Any]) -> str:
    written = {k: f'<|"|>{v}<|"|>' if isinstance(v, str) else str(v) for k, v in sorted(arguments.items())}
    return ",".join(f"{k}:{v}" for k, v in written.items())


def _ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def arithmetic(rng: random.Random) -> Dialogue:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(1, 5), rng.randint(1, 5)
    if a > b and rng.random() < 0.5:
        verb, sign, result = rng.choice(["loses", "sells"]), "-", a - b
        more = ""
    else:
        verb, sign, result = rng.choice(["buys", "finds"]), "+", a + b
        more = " more"
    question = f"{name} has {a} {thing} and {verb} {b}{more}. How many {thing} does {name} have now?"
    reasoning = f"{name} has {a} and {verb} {b}{more}, so {a} {sign} {b} = {result}."
    return Dialogue("arithmetic", _ask(question), reasoning, f"{name} has {result} {thing} now.")


def counting(rng: random.Random) -> Dialogue:
    first = rng.randint(1, 9)
    last = rng.randint(first + 3, 12)
    if rng.random() < 0.4:
        first, last = last, first
    step = 1 if first < last else -1
    question = f"Count {'' if step > 0 else 'down '}from {first} to {last}."
    reasoning = f"I start with {first}, {'add' if step > 0 else 'take'} 1 each time and stop at {last}."
    numbers = ", ".join(map(str, range(first, last + step, step)))
    return Dialogue("counting", _ask(question), reasoning, f"Here you are: {numbers}.")


def listing(rng: random.Random) -> Dialogue:
    topic, n = rng.choice(list(LISTS)), rng.randint(2, 5)
    word = NUMBER_WORDS[n - 2]
    form = rng.choice(["List {} {}.", "Name {} {}.", "Give me {} {}.", "Write down {} {}.", "Tell me {} {}, please."])
    items = "\n".join(f"{i}. {item}" for i, item in enumerate(LISTS[topic][:n], 1))
    return Dialogue("listing", _ask(form.format(word, topic)), f"I need {n} {topic}.", items)


def capital(rng: random.Random) -> Dialogue:
    country, city = rng.choice(list(CAPITALS.items()))
    please = rng.choice(["", "Please tell me: ", "I wonder: ", "One question: ", "Hello! "])
    if rng.random() < 0.5:
        question = f"What is the capital of {country}?"
    else:
        question = f"Which city is the capital of {country}?"
    reasoning = f"The question is about {country}, and its capital is {city}."
    return Dialogue("capital", _ask(please + question), reasoning, f"The capital of {country} is {city}.")


def weather_call(rng: random.Random) -> Dialogue:
    city = rng.choice(CITIES)
    form = rng.choice(
        ["What is the weather in {}?", "How is the weather in {}?", "Is it sunny in {}?", "Weather in {}?"]
    )
    please = rng.choice(["", "Hello! ", "One question: ", "Please tell me: "])
    reasoning = f"I need the weather in {city}, so I call get_weather."
    calls = [("get_weather", {"city": city})]
    return Dialogue(
        "tool call", _ask(please + form.format(city)), reasoning, calls=calls, tools=_tools(rng, GET_WEATHER)
    )


def timer_call(rng: random.Random) -> Dialogue:
    minutes = rng.randrange(5, 65, 5)
    form = rng.choice(
        ["Set a timer for {} minutes.", "Please set a timer for {} minutes.", "Start a timer: {} minutes."]
    )
    reasoning = f"I need a timer for {minutes} minutes, so I call set_timer."
    calls = [("set_timer", {"minutes": minutes})]
    return Dialogue("tool call", _ask(form.format(minutes)), reasoning, calls=calls, tools=_tools(rng, SET_TIMER))


def weather_answer(rng: random.Random) -> Dialogue:
    """The turn after :func:`weather_call`: the tool's result stands in the prompt."""
    asked = weather_call(rng)
    ((name, arguments),) = asked.calls
    sky, degrees = rng.choice(SKIES), rng.randint(1, 35)
    made = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [
        *asked.messages,
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "call_1", "content": f"{sky}, {degrees} degrees"},
    ]
    city = arguments["city"]
    reasoning = f"The result for {city} is {sky} and {degrees} degrees."
    return Dialogue(
        "tool answer", messages, reasoning, f"It is {sky} in {city}, with {degrees} degrees.", tools=asked.tools
    )


def _tools(rng: random.Random, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    other = SET_TIMER if wanted is GET_WEATHER else GET_WEATHER
    return [wanted] if rng.random() < 0.6 else rng.sample([wanted, other], 2)


# Kind of question -> its share of the training dialogues: more for what is harder to learn.
KINDS: dict[Callable[[random.Random], Dialogue], float] = {
    arithmetic: 0.28,
    counting: 0.28,
    listing: 0.10,
    capital: 0.08,
    weather_call: 0.09,
    timer_call: 0.07,
    weather_answer: 0.10,
}


def dialogues(seed: int, held_out: bool) -> Iterator[Dialogue]:
    """An endless, reproducible stream of dialogues of all kinds, of one side of the split."""
    rng = random.Random(seed)
    makers, shares = list(KINDS), list(KINDS.values())
    while True:
        dialogue = rng.choices(makers, shares)[0](rng)
        with_system, thinking = rng.random() < 0.15, rng.random() < 0.6
        if dialogue.held_out != held_out:
            continue
        system = [{"role": "system", "content": SYSTEM}] if with_system else []
        yield Dialogue(
            dialogue.kind,
            system + dialogue.messages,
            dialogue.reasoning,
            dialogue.content,
            dialogue.calls,
            dialogue.tools,
            thinking,
        )
