"""A judge model behind an OpenAI-compatible endpoint that the user names. Nothing else is ever called."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException

from peft_mllm.errors import DataError

KEY_VARIABLE = "PEFT_MLLM_JUDGE_KEY"
"""The environment variable with the endpoint's key, if it wants one."""

_TRIES = 3
_TRY_AGAIN = frozenset({429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Judge:
    """Where to ask, and whom.

    Attributes:
        url: the endpoint, `http://host/v1`; `/chat/completions` is added where it is not there.
        model: the model's name there.
        key: sent as a bearer token, and never shown.
        timeout: seconds to wait for an answer.
        pause: seconds before asking again, doubled each time.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    pause: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no web address."""
        if not self.url.startswith(("http://", "https://")):
            raise DataError(f"The judge's address {self.url!r} must begin with http:// or https://.")

    def ask(self, prompt: str) -> str:
        """The judge's answer, at temperature 0.

        Raises:
            DataError: the endpoint cannot be reached, refuses, or answers in another form.
        """
        base = self.url.rstrip("/")
        address = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        message = {"role": "user", "content": prompt}
        body = json.dumps({"model": self.model, "temperature": 0, "messages": [message]}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        reply = self._send(urllib.request.Request(address, data=body, headers=headers), address)
        try:
            return str(json.loads(reply)["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f"The judge at {address} gave no chat completion: {reply[:200]!r}.") from error

    def _send(self, request: urllib.request.Request, address: str) -> bytes:
        for attempt in range(_TRIES):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                if error.code not in _TRY_AGAIN or attempt + 1 == _TRIES:
                    raise DataError(f"The judge at {address} answers {error.code} ({error.reason}).") from error
            except (OSError, HTTPException) as error:
                if attempt + 1 == _TRIES:
                    raise DataError(f"The judge at {address} cannot be reached ({error}).") from error
            time.sleep(self.pause * 2**attempt)
        raise AssertionError("the last try returns or raises")
