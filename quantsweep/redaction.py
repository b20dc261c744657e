"""What looks like a secret, and the same text without it."""

from __future__ import annotations

import re

TOKENS = (
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16}"
    r"|xox[bpars]-[\w-]{10,})"
)
"""Tokens by their makers' own beginnings."""
_NAMED = (
    r"(?<![A-Za-z0-9])[A-Za-z0-9_]*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY)[A-Za-z0-9_]*"
    r"[\"']?\s*[=:]\s*[\"']?(?P<value>[A-Za-z0-9+/_-]{16,})(?=[\"'\s;]|$)"
)
_KEY = r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
_PATTERN = re.compile(f"{TOKENS}|(?i:{_NAMED})|{_KEY}", re.DOTALL)
REDACTED = "<looks like a secret: left out>"


def redacted(text: str) -> str:
    """The text with REDACTED in place of what looks like a token, a password that is given by name, or a private key."""
    return _PATTERN.sub(_without, text)


def _without(match: re.Match[str]) -> str:
    value = match["value"]
    return REDACTED if value is None else match[0].replace(value, REDACTED)
