"""Masks database passwords in text that is shown or written."""

import re

__all__ = ["without_password", "without_passwords"]

_IN_TEXT = re.compile(r"([A-Za-z][\w+.-]*://[^\s:/@'\"]*:)[^\s'\"]*@")
_OPTION = re.compile(r"([?&](?:password|sslpassword)=)[^&\s'\"]*", re.IGNORECASE)


def without_password(url: str) -> str:
    """Return ``url`` with stars for user and password, and for a password among its options."""
    scheme, separator, rest = url.partition("://")
    if separator and "@" in rest:
        url = f"{scheme}://***@{rest.rpartition('@')[2]}"
    return _OPTION.sub(r"\1***", url)


def without_passwords(text: str) -> str:
    """Return ``text``, such as a command or a message, with stars for the passwords of URLs in it."""
    return _OPTION.sub(r"\1***", _IN_TEXT.sub(r"\1***@", text))
