"""A retriever that asks a server: Search-R1's HTTP protocol, with the patience that a long run needs.

A server that restarts, or is busy, costs a run time and nothing else. What is tried again, and for how long:

    no connection, no answer in time, 408, 429, 502, 503, 504    up to `patience` seconds, then it is unavailable
    500                                                          a few times: it may be the query that fails
    any other status, an answer of another shape                 never: the same request would fail again

Waits grow exponentially with full jitter, so that many clients do not come back at the same moment, and are at least
what `Retry-After` asks for. The jitter has its own source: a retry must not change what a seeded run samples.
"""

from __future__ import annotations

import ipaddress
import json
import os
import random
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from sdsearch_lightning.errors import ConfigError, RetrievalError, RetrieverUnavailableError
from sdsearch_lightning.retrieval.base import Retriever
from sdsearch_lightning.retrieval.remote_answers import read_answer
from sdsearch_lightning.trust.secrets import read_secret, without_secrets
from sdsearch_lightning.types import Passage

_PROBE = "What is the capital of France?"
_UNAVAILABLE = frozenset({408, 429, 502, 503, 504})
_MAX_SERVER_ERRORS = 3  # answers of 500 to one request before it counts as failed
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0  # seconds; upper ends of the jitter
_KEEP_ALIVE = 30.0  # seconds; shorter than servers do, so that none closes a connection as it is used again
_JITTER = random.SystemRandom()  # has no state: nothing to seed, to pickle, or to share between forked processes


class RemoteRetriever(Retriever):
    """Searches through a server that speaks Search-R1's protocol: `sdsearch serve`, or a stock one.

    Redirects are not followed. A server on this machine is never asked through a proxy; for others the usual variables
    (HTTP_PROXY, NO_PROXY) count.

    Args:
        url: of the server, up to and with its path; without a path, /retrieve is meant.
        timeout: seconds to wait for a connection, and for the answer to begin, in one try.
        patience: seconds to keep trying while the server cannot be reached or is overloaded. A try that has begun is
            not cut short, so a search may take up to `patience + timeout`.
        token: sent as `Authorization: Bearer <token>`; `env:NAME` and `file:PATH` say where it is to be found.
        max_queries_per_request: more queries are sent as several requests, one after the other.

    Raises:
        ConfigError: an option that cannot work.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000/retrieve",
        timeout: float = 30.0,
        patience: float = 120.0,
        token: str | None = None,
        max_queries_per_request: int = 256,
    ) -> None:
        self.url = _parse_url(url)
        if not timeout > 0 or not patience >= 0 or max_queries_per_request < 1:
            raise ConfigError(
                "expected timeout > 0 s, patience >= 0 s and max_queries_per_request >= 1, found "
                f"{timeout}, {patience} and {max_queries_per_request}."
            )
        check_token(token)
        self._timeout, self._patience, self._token = timeout, patience, token
        self._max_queries = max_queries_per_request
        self._client: httpx.Client | None = None
        self._client_process = 0

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The best passages for each query, from the server.

        Raises:
            RetrieverUnavailableError: the server could not be reached, or was overloaded, for longer than `patience`.
            RetrievalError: the server refused the queries, failed on them, or answered something else than passages.
        """
        found: list[list[Passage]] = []
        for start in range(0, len(queries), self._max_queries):
            found += self._ask(queries[start : start + self._max_queries], k)
        return found

    def prepare(self) -> None:
        """Waits up to `patience` for the server to come up, and tries one search.

        Raises:
            ConfigError: it did not come up, or the search failed; the message says how to start one.
        """
        try:
            self._ask([_PROBE], 1)
        except RetrievalError as error:
            raise ConfigError(
                f"A first search failed: {error} RemoteRetriever needs a server that speaks Search-R1's protocol at "
                "its url; one is started with: sdsearch serve --corpus_path <corpus.jsonl> --host 127.0.0.1 --port 8000"
            ) from error

    def close(self) -> None:
        """Closes the connections; the next search opens new ones."""
        client, self._client = self._client, None
        if client is not None and self._client_process == os.getpid():
            client.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None}  # connections stay in the process that opened them

    def _ask(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        asked = {"queries": list(queries), "topk": k, "return_scores": True}
        body = self._post(json.dumps(asked).encode())  # ASCII: a lone surrogate is the server's to refuse
        try:
            return read_answer(body, len(queries), k)
        except RetrievalError as error:
            raise RetrievalError(f"{self.url}: {error}") from error

    def _post(self, body: bytes) -> bytes:
        """The body of the 200, after as many tries as it takes and patience allows."""
        deadline, num_server_errors, num_tries = time.monotonic() + self._patience, 0, 0
        while True:
            num_tries += 1
            wait = 0.0
            try:
                response = self._opened().post(self.url, content=body)
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
            except httpx.HTTPError as error:  # such as a body that cannot be decompressed
                raise RetrievalError(f"{self.url}: {type(error).__name__}: {error}") from error
            else:
                if response.status_code == 200:
                    return response.content
                trouble = _describe(response)
                num_server_errors += response.status_code == 500
                if response.status_code not in _UNAVAILABLE | {500} or num_server_errors >= _MAX_SERVER_ERRORS:
                    raise RetrievalError(f"{self.url}: expected 200, found {trouble} ({num_tries} tries).")
                wait = _retry_after(response)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise RetrieverUnavailableError(
                    f"{self.url}: no answer in {self._patience:g} s and {num_tries} tries, at last {trouble}. "
                    "Is the server running there?"
                )
            # Jitter comes on top of what the server asked for, or all that it turned away come back together.
            longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** min(num_tries - 1, 20))
            time.sleep(min(wait + _JITTER.uniform(0.0, longest), remaining))

    def _opened(self) -> httpx.Client:
        """The client of this process: a forked child must not write into its parent's connections."""
        if self._client is None or self._client_process != os.getpid():
            headers = {"Content-Type": "application/json"}
            if (token := read_secret(self._token, "token")) is not None:
                check_token(token)
                headers["Authorization"] = f"Bearer {token}"
            self._client = httpx.Client(
                headers=headers,
                timeout=self._timeout,
                follow_redirects=False,
                trust_env=not is_loopback(httpx.URL(self.url).host),
                limits=httpx.Limits(keepalive_expiry=_KEEP_ALIVE),
            )
            self._client_process = os.getpid()
        return self._client


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def check_token(token: str | None) -> None:
    """Refuses a token that cannot stand in a header; an empty one is more likely a variable that is not set.

    Raises:
        ConfigError: it is not None and no such token; its value is not told.
    """
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ConfigError("token: expected one or more printable ASCII characters, no spaces. Leave it out for none.")


def _parse_url(text: str) -> str:
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(
            f"url is {without_secrets(text)!r} ({error}): expected one such as http://127.0.0.1:8000/retrieve."
        ) from error
    if url.scheme not in ("http", "https") or not url.host or url.userinfo:
        raise ConfigError(
            f"url has the scheme {url.scheme!r}, the host {url.host!r} and {'a' if url.userinfo else 'no'} password: "
            "expected one such as http://127.0.0.1:8000/retrieve. A secret goes into token."
        )
    return str(url.copy_with(path="/retrieve") if url.path in ("", "/") else url)


def _describe(response: httpx.Response) -> str:
    if response.is_redirect:
        target = response.headers.get("location")
        return f"{response.status_code} to {target!r}; redirects are not followed, set url to it"
    text = response.text[:300]
    return f"{response.status_code} {response.reason_phrase}{f': {text}' if text else ''}"


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait, which it may write as a number or as a date; 0 where it does not say."""
    text = response.headers.get("retry-after", "")
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
