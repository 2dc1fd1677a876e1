"""What a running server says over HTTP: its version and its Prometheus metrics."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from vllm_gemma4_spec.errors import Gemma4SpecError


class ServerError(Gemma4SpecError):
    """No server, or one that does not answer as expected."""


class SilentError(ServerError):
    """The server was reached and did not answer in time."""


@dataclass(frozen=True)
class Sample:
    """One line of the Prometheus text format."""

    name: str
    labels: Mapping[str, str]
    value: float


def base_url(url: str) -> str:
    """``http://host:port`` without a trailing slash or ``/v1``.

    Raises:
        ServerError: not an http or https address.
    """
    parts = urlsplit(url)
    try:
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is not a number
        sound = False
    if not sound:
        raise ServerError(f"--url {url}: not an address; write it like http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def get(url: str, api_key: str | None = None, timeout: float = 10) -> str:
    """The body of a GET.

    Raises:
        ServerError: one line that says whether nothing listens, the key is wrong or the path is unknown.
    """
    return _ask(urllib.request.Request(url), api_key, timeout)


def post(url: str, body: dict[str, Any], api_key: str | None = None, timeout: float = 120) -> dict[str, Any]:
    """The JSON that a POST of ``body`` answers.

    Raises:
        ServerError: as :func:`get`, with what the server said; or no JSON object.
    """
    headers = {"Content-Type": "application/json"}
    text = _ask(urllib.request.Request(url, json.dumps(body).encode(), headers), api_key, timeout)
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise ServerError(f"{url}: no JSON object in the answer") from None


def _ask(request: urllib.request.Request, api_key: str | None, timeout: float) -> str:
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    url = request.full_url
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        hint = {401: "give the key with --api-key or VLLM_API_KEY", 404: "is this a vLLM server?"}.get(error.code)
        hint = _message(error) if request.data else hint
        raise ServerError(f"{url}: HTTP {error.code}" + (f"; {hint}" if hint else "")) from None
    except (urllib.error.URLError, OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise SilentError(
                f"{url}: no answer within {timeout:g} s; are host and port right, or does it hang?"
            ) from None
        raise ServerError(f"{url}: no answer ({reason}); is the server up, and host and port right?") from None


def _message(error: urllib.error.HTTPError) -> str:
    """What an OpenAI-compatible server says about a request that it refuses, as one line."""
    try:
        body = json.loads(error.read())
        found = body.get("error", body)
        text = found.get("message", "") if isinstance(found, dict) else found
    except (ValueError, OSError, AttributeError):
        return ""
    return " ".join(str(text).split())[:300]


def version(url: str, api_key: str | None = None) -> str:
    """The vLLM version behind ``url``.

    Raises:
        ServerError: no answer, or not a vLLM server.
    """
    try:
        answer: dict[str, Any] = json.loads(get(f"{base_url(url)}/version", api_key))
        return str(answer["version"])
    except (ValueError, KeyError, TypeError):
        raise ServerError(f"{url}/version: no version in the answer; is this a vLLM server?") from None


def samples(url: str, api_key: str | None = None) -> list[Sample]:
    """All samples of ``/metrics``.

    Raises:
        ServerError: no answer, or a text that is not Prometheus's.
    """
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        raise ServerError("prometheus-client is missing; run `pip install prometheus-client`") from None
    text = get(f"{base_url(url)}/metrics", api_key)
    try:
        families = list(text_string_to_metric_families(text))
    except ValueError:
        raise ServerError(f"{url}/metrics: not Prometheus's text format; is this a vLLM server?") from None
    return [Sample(s.name, s.labels, s.value) for family in families for s in family.samples]


def vllm_samples(url: str, api_key: str | None = None) -> list[Sample]:
    """:func:`samples` of a vLLM server.

    Raises:
        ServerError: as there, or none of the metrics is vLLM's.
    """
    found = samples(url, api_key)
    if not any(s.name.startswith("vllm:") for s in found):
        raise ServerError(f"{url}/metrics: not vLLM; none of its {len(found)} metrics is. Is this a vLLM server?")
    return found
