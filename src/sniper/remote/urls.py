"""URLs without their credentials, which stay in the memory of this process.

What a program prints, records or compares is the clean URL: no user, no password and, for http, no query, which may be
a signature. The credentials are added again when a request is sent.
"""

import posixpath
import re
from urllib.parse import quote, unquote, urlsplit

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_ANY_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>[^\s\"'<>]*)")
_WEB = ("http", "https")

_logins: dict[str, str] = {}
"""User and password by scheme and host, such as `https://host`."""
_queries: dict[str, str] = {}
"""Query by the clean URL that it was given with; it is that of all files below, too."""


def is_url(text: str) -> bool:
    """Check whether a path is a URL.

    Example:
        >>> [is_url(text) for text in ("s3://bucket/a.jpg", "photos/a.jpg", "C:/a.jpg")]
        [True, False, False]
    """
    return _URL.match(text) is not None


def clean_url(text: str) -> str:
    """Return a URL without credentials, and keep these for requests.

    Example:
        >>> clean_url("https://me:secret@example.org/a%20b/?token=1")
        'https://example.org/a b'
    """
    scheme, host, login, path, query = _split(text)
    clean = f"{scheme}://{host}{path}".rstrip("/") if host or path.strip("/") else f"{scheme}://"
    if login:
        _logins[f"{scheme}://{host}"] = login
    if query:
        _queries[clean] = query
    return clean


def request_url(clean: str) -> str:
    """Return the URL to send a request to: quoted for http, with the credentials that were given."""
    scheme, _, rest = clean.partition("://")
    host, slash, path = rest.partition("/")
    if "/../" in f"{slash}{path}/":
        path = posixpath.normpath(f"/{path}").lstrip("/")
    login = _logins.get(f"{scheme}://{host}")
    if login is not None:
        host = f"{login}@{host}"
    if scheme not in _WEB:
        return f"{scheme}://{host}{slash}{path}"
    above = clean
    while above not in _queries and "/" in above.partition("://")[2]:
        above = above.rpartition("/")[0]
    query = _queries.get(above)
    return f"{scheme}://{host}{slash}{quote(path)}" + (f"?{query}" if query else "")


def redact(text: str) -> str:
    """Return text without the credentials of the URLs in it.

    Example:
        >>> redact("GET https://me:secret@example.org/a.json?sig=abc: 403")
        'GET https://example.org/a.json?...: 403'
    """
    return _ANY_URL.sub(_redact_match, text) if "://" in text else text


def secrets() -> tuple[dict[str, str], dict[str, str]]:
    """Return the credentials, for `keep_secrets` in another process."""
    return dict(_logins), dict(_queries)


def keep_secrets(secrets: tuple[dict[str, str], dict[str, str]]) -> None:
    """Keep credentials that another process was given."""
    logins, queries = secrets
    _logins.update(logins)
    _queries.update(queries)


def _redact_match(match: re.Match[str]) -> str:
    scheme, rest = match["scheme"], match["rest"]
    _, host, login, _, _ = _split(match[0])
    if login:
        rest = host + rest[len(login) + 1 + len(host) :]
    if scheme.lower() in _WEB and "?" in rest:
        rest, _, query = rest.partition("?")
        rest += f"?...{query[len(query.rstrip(',;:.')) :]}"  # and what ends a sentence
    return f"{scheme}://{rest}"


def _split(text: str) -> tuple[str, str, str, str, str]:
    """Split a URL into scheme, host, login, path with its first slash, and query; path and query as they are for http.

    In names of objects in a bucket, `?`, `#` and `%` are characters like others.
    """
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    query = ""
    if scheme in _WEB:
        parts = urlsplit(f"{scheme}://{rest}")
        host, path, query = parts.netloc, unquote(parts.path), parts.query
    else:
        host, slash, path = rest.partition("/")
        path = slash + path
    before, at, after = host.rpartition("@")
    # abfs://container@account has no password there.
    has_login = bool(at) and (scheme in _WEB or ":" in before)
    return scheme, after if has_login else host, before if has_login else "", path, query
