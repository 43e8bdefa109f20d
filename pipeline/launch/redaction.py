"""Text without the secrets that it may hold, before it is shown, kept or sent."""

from __future__ import annotations

import os
import re

_SECRET = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL")  # in the name of a variable whose value is never shown
_USER, _QUERY = re.compile(r"(://)[^/\s@]+@"), re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]+")


def without_secrets(text: str) -> str:
    """The text without values of secret variables of the environment, and without what a URL may hold of them."""
    for name, value in os.environ.items():
        if len(value) >= 8 and any(word in name.upper() for word in _SECRET):
            text = text.replace(value, "***")
    return _QUERY.sub(r"\1?***", _USER.sub(r"\1***@", text))
