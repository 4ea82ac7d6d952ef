"""What can go wrong between the page and a contender, in words for the person in front of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

from settings import Contender

MAX_DETAIL_CHARS = 600


class ContenderError(Exception):
    """A contender could not be reached, refused, or broke off. The message is shown in its pane as it is."""


@contextmanager
def explained(contender: Contender, timeout_s: float) -> Iterator[None]:
    """Turns what the HTTP client raises, and replies of an unexpected shape, into `ContenderError`."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ContenderError(
            f"Nothing answers at {contender.url}. Is the server running, or still starting? "
            f"./run-server.sh status and ./run-server.sh logs {contender.service or contender.name} say more."
        ) from error
    except httpx.TimeoutException as error:
        raise ContenderError(
            f"{contender.title} said nothing for {timeout_s:g} s; the request was given up."
        ) from error
    except httpx.HTTPError as error:
        raise ContenderError(
            f"The connection to {contender.url} broke off ({type(error).__name__}). The server may have stopped."
        ) from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ContenderError(f"{contender.title} answered in a form that is not the OpenAI API: {error!r}") from error


def http_error(contender: Contender, response: httpx.Response, body: Mapping[str, Any] | None = None) -> ContenderError:
    """The error object of a response, or of an event within its stream (`body`)."""
    status = f"HTTP {response.status_code}" if body is None else "an error in the stream"
    return ContenderError(f"{contender.title}: {status}: {_detail(response, body)}")


def stream_error(contender: Contender, num_texts: int) -> ContenderError:
    after = f"after {num_texts} pieces of text" if num_texts else "before its first token"
    return ContenderError(f"{contender.title}: the stream ended {after}, without a finish.")


def _detail(response: httpx.Response, body: Mapping[str, Any] | None) -> str:
    """The message in OpenAI's, vLLM's older and FastAPI's error objects; else the text itself."""
    if body is None:
        try:
            body = response.json()
        except ValueError:
            return response.text.strip()[:MAX_DETAIL_CHARS] or response.reason_phrase
    found: Any = body
    if isinstance(body, Mapping):
        error = body.get("error")
        found = error.get("message") if isinstance(error, Mapping) else error
        found = found or body.get("message") or body.get("detail") or body
    return str(found)[:MAX_DETAIL_CHARS]
