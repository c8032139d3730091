"""Read remote files through fsspec: retried, ahead of their use, and kept in a cache on the local disk.

All requests run on the thread of fsspec's event loop, whatever thread asks for them, so that a stalled server does not
keep a process from ending. A forked process starts its own.
"""

import asyncio
import errno
import io
import mmap
import os
import random
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from sniper.errors import CacheError, describe_os_error
from sniper.remote.cache import FileCache
from sniper.remote.urls import keep_secrets, redact, request_url, secrets

_T = TypeVar("_T")

_CHUNK = 4_194_304  # bytes of a request; one that takes longer than the timeout has stalled
_MAX_HELD = 4  # files without room in the cache that stay in memory for another reader of them
_SECONDS_KNOWN = 60.0  # for which listings and what is known of a file are not asked for again
_SECONDS_AHEAD = 120.0  # after which a file that was read ahead is not wanted any more
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before another try
_RETRIED_STATUS = (408, 425, 429)  # of the 4xx; and all 5xx
_PERMANENT = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ImportError, ValueError, TypeError, NotImplementedError),
)
_NO_CREDENTIALS = ("NoCredentialsError", "DefaultCredentialsError", "PartialCredentialsError")
_PACKAGES = {
    **dict.fromkeys(("http", "https"), "sniper-det[remote]"),
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
}


MAX_AHEAD = 16
"""Files that are read ahead at a time."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How remote files are read in this process.

    Attributes:
        folder: of the cache; None is the user's cache folder.
        limit: bytes that the cache may take; None is half of what its disk has free.
        timeout: seconds for each request of up to 4 MB; one that takes longer is tried again.
        tries: how often a request is sent before the file counts as one that cannot be read.
    """

    folder: Path | None = None
    limit: int | None = None
    timeout: float = 30.0
    tries: int = 5


Shared = tuple[Settings, tuple[dict[str, str], dict[str, str]]]
"""Settings and credentials of a process, for its children."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """What a server tells about a file or a folder.

    Attributes:
        is_folder: whether it is one.
        size: bytes; None if the server does not tell.
        version: changes with the content, as far as the server tells.
        is_page: whether it is an HTML page, which a web server sends for a folder.
    """

    is_folder: bool
    size: int | None
    version: str
    is_page: bool = False


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A file: in the cache at `path`, or its first bytes; `problem` is what a failed request before met."""

    key: str
    path: Path | None = None
    content: bytes = b""
    problem: str | None = None


class _State:
    """What this process knows and does."""

    def __init__(self) -> None:
        self.settings = Settings()
        self.forget()

    def forget(self) -> None:
        """Keep the settings alone, as in a fork, which does not have the threads of its parent."""
        self.lock = threading.RLock()
        self.caches: dict[tuple[Path, int | None], FileCache] = {}
        self.infos: dict[str, tuple[float, Info]] = {}
        self.listings: dict[str, tuple[float, dict[str, Info]]] = {}
        self.ahead: OrderedDict[tuple[str, bool], Future[_Loaded]] = OrderedDict()
        self.ahead_since: dict[tuple[str, bool], float] = {}
        self.held: OrderedDict[str, bytes] = OrderedDict()


_state = _State()
_warned = mmap.mmap(-1, 2)
"""Whether a failed request, and a full cache, were reported; in memory that processes share with their forks."""
_FAILED, _FULL = range(2)


os.register_at_fork(after_in_child=_state.forget)


def configure(settings: Settings) -> None:
    """Set how remote files are read from now on in this process."""
    _state.settings = settings


def share() -> Shared:
    """Return settings and credentials, for `use_shared` in a child process."""
    return _state.settings, secrets()


def use_shared(shared: Shared) -> None:
    """Use settings and credentials of the parent process."""
    settings, credentials = shared
    configure(settings)
    keep_secrets(credentials)


def cache() -> FileCache:
    """Return the cache of this process.

    Raises:
        CacheError: if its folder cannot be written.
    """
    folder = _state.settings.folder or default_folder()
    with _state.lock:
        key = folder, _state.settings.limit
        if key not in _state.caches:
            try:
                _state.caches[key] = FileCache(folder / "files", limit=_state.settings.limit)
            except OSError as error:
                raise CacheError(
                    f"{folder}: cannot be used as the cache of remote files ({describe_os_error(error)}); "
                    "data.cache.folder names another"
                ) from error
        return _state.caches[key]


def default_folder() -> Path:
    """Return the cache folder of the user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sniper"


def open_file(url: str, *, is_fixed: bool = False) -> io.BufferedReader:
    """Open a remote file for reading.

    Args:
        url: clean.
        is_fixed: whether the file never changes, as images do not, so that one in the cache needs no request.

    Raises:
        OSError: if it cannot be read; `strerror` is the reason, `filename` the URL.
    """
    for _ in range(2):
        content = fetch(url, is_fixed=is_fixed)
        if isinstance(content, bytes):
            return io.BufferedReader(io.BytesIO(content))
        try:
            return content.open("rb")
        except FileNotFoundError:  # removed from the cache meanwhile
            continue
    raise OSError(errno.EAGAIN, "was removed from the cache twice while it was opened", url)


def fetch(url: str, *, is_fixed: bool = False) -> Path | bytes:
    """Return where a remote file is in the cache, or its content if the cache has no room for it; see `open_file`."""
    with _state.lock:
        held = _state.held.get(url)
        future = _state.ahead.pop((url, is_fixed), None)
        _state.ahead_since.pop((url, is_fixed), None)
    if held is not None:
        return held
    if future is None:
        future = _submit(_load(url, is_fixed, cache()))
    loaded = _wait(future, url)
    _warn_of(url, loaded.problem)
    if loaded.path is not None:
        return loaded.path
    if len(loaded.content) == _CHUNK and (size := info(url).size) != _CHUNK:
        return _fetch_large(url, loaded, size)
    path = cache().add(loaded.key, loaded.content)
    if path is not None:
        return path
    _warn_once(
        _FULL,
        f"the cache of remote files in {cache().folder.parent} is full ({cache().limit / 1e9:.3g} GB, "
        "data.cache.gigabytes); files that do not fit are read again each time",
    )
    with _state.lock:
        _state.held[url] = loaded.content
        while len(_state.held) > _MAX_HELD:
            _state.held.popitem(last=False)
    return loaded.content


def read_ahead(urls: Iterable[str], *, is_fixed: bool) -> None:
    """Start to read files that will be opened soon; those beyond a small number are left for later."""
    with _state.lock:
        for url in urls:
            key = url, is_fixed
            if "/../" in url:  # may be outside the image root, which is checked when it is opened
                continue
            if len(_state.ahead) >= MAX_AHEAD and not _drop_unused():
                return
            if key not in _state.ahead and url not in _state.held:
                _state.ahead[key] = _submit(_load(url, is_fixed, cache()))
                _state.ahead_since[key] = time.monotonic()


def _drop_unused() -> bool:
    """Forget files that were read ahead long ago, and return whether there were any."""
    limit = time.monotonic() - _SECONDS_AHEAD
    unused = [key for key, started in _state.ahead_since.items() if started < limit]
    for key in unused:
        del _state.ahead_since[key]
        _state.ahead.pop(key, None)
    return bool(unused)


def info(url: str) -> Info:
    """Return what a server tells about a file or a folder.

    Raises:
        FileNotFoundError: if there is none.
        OSError: if the server cannot be asked.
    """
    return _wait(_submit(_info(url)), url)


def list_folder(url: str) -> dict[str, Info]:
    """Return the files and folders in a remote folder by name.

    Raises:
        FileNotFoundError: if there is none.
        OSError: if it cannot be listed.
    """
    return _wait(_submit(_list(url)), url)


def _fetch_large(url: str, loaded: _Loaded, size: int | None) -> Path:
    """Read the rest of a file, piece by piece, into the cache."""
    if size is None:
        raise OSError(errno.EIO, "has more than 4 MB, and the server does not tell how many", url)
    with cache().adding(loaded.key, size) as file:
        if file is None:
            limit = cache().limit / 1e9
            raise OSError(
                errno.EFBIG,
                f"has {size / 1e9:.3g} GB, for which the cache of {limit:.3g} GB has no room (data.cache.gigabytes)",
                url,
            )
        file.write(loaded.content)
        for start in range(_CHUNK, size, _CHUNK):
            stop = min(start + _CHUNK, size)
            content, problem = _wait(_submit(_cat(url, start, stop)), url)
            _warn_of(url, problem)
            file.write(content)
    path = cache().find(loaded.key)
    if path is None:
        raise OSError(errno.EAGAIN, "was removed from the cache while it was read", url)
    return path


# On the event loop


async def _load(url: str, is_fixed: bool, cache: FileCache) -> _Loaded:
    key = cache.key(url, "" if is_fixed else (await _info(url)).version)
    path = cache.find(key)
    if path is not None:
        return _Loaded(key=key, path=path)
    content, problem = await _cat(url, 0, _CHUNK)
    return _Loaded(key=key, content=content, problem=problem)


async def _cat(url: str, start: int, stop: int) -> tuple[bytes, str | None]:
    """Read bytes of a file; from its start perhaps fewer, or all where the server knows no ranges."""

    async def read() -> bytes:
        system, name = _system(url)
        try:
            content: bytes = await _call(system, "cat_file", name, start=start, end=stop)
        except Exception as error:
            if _status(error) == 416 and start == 0:  # an empty file has no first byte
                return b""
            raise
        if start and len(content) != stop - start:
            raise ConnectionError(f"{len(content)} bytes came, expected {stop - start}")
        return content

    return await _retried(read)


async def _info(url: str) -> Info:
    folder, _, name = url.rpartition("/")
    listing = _state.listings.get(folder)
    if listing is not None and listing[0] > time.monotonic() and name in listing[1]:
        listed = listing[1][name]
        if listed.size is not None or listed.is_folder:
            return listed
    known = _state.infos.get(url)
    if known is not None and known[0] > time.monotonic():
        return known[1]

    async def read() -> dict[str, Any]:
        system, name = _system(url)
        result: dict[str, Any] = await _call(system, "info", name)
        return result

    found = _to_info((await _retried(read))[0])
    _state.infos[url] = time.monotonic() + _SECONDS_KNOWN, found
    return found


async def _list(url: str) -> dict[str, Info]:
    known = _state.listings.get(url)
    if known is not None and known[0] > time.monotonic():
        return known[1]
    is_web = url.startswith(("http://", "https://"))

    async def read() -> tuple[str, list[dict[str, Any]]]:
        system, name = _system(url)
        return name, await _call(system, "ls", name, detail=True)

    (base, entries), _ = await _retried(read)
    base = base.partition("?")[0].rstrip("/")
    found = {}
    for entry in entries:
        path = str(entry["name"]).rstrip("/")
        folder, _, name = path.rpartition("/")
        if not is_web and path == base and entry.get("type") == "file":
            raise NotADirectoryError(errno.ENOTDIR, "is a file, expected a folder", url)
        # A page has links to other places, too.
        if (
            name
            and "?" not in name
            and "#" not in name
            and folder.rpartition("@")[2].endswith(_host_path(base))
        ):
            found[unquote(name) if is_web else name] = _to_info(entry)
    _state.listings[url] = time.monotonic() + _SECONDS_KNOWN, found
    return found


def _host_path(url: str) -> str:
    return url.partition("://")[2].rpartition("@")[2]


def _to_info(entry: dict[str, Any]) -> Info:
    versions = (
        "ETag",
        "etag",
        "md5Hash",
        "LastModified",
        "Last-Modified",
        "updated",
        "mtime",
        "created",
        "size",
    )
    return Info(
        is_folder=entry.get("type") == "directory",
        size=entry.get("size"),
        version=repr([(name, str(entry[name])) for name in versions if entry.get(name) is not None]),
        is_page=entry.get("mimetype") == "text/html",
    )


async def _call(system: Any, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of a file system of fsspec, in a thread where it is not asynchronous."""
    if system.async_impl:
        return await getattr(system, f"_{method}")(*arguments, **options)
    return await asyncio.to_thread(getattr(system, method), *arguments, **options)


async def _retried(read: Callable[[], Awaitable[_T]]) -> tuple[_T, str | None]:
    """Try until it succeeds; return the result, and the last problem before it.

    Raises:
        Exception: what cannot change, such as that there is no such file.
        ConnectionError: what the last of all tries met.
    """
    settings, problem = _state.settings, None
    for number in range(settings.tries):
        try:
            return await asyncio.wait_for(read(), settings.timeout), problem
        except Exception as error:
            if _is_permanent(error):
                raise
            problem = _describe(error, settings.timeout)
        if number + 1 < settings.tries:
            pause = min(_FIRST_PAUSE * 2**number, _LONGEST_PAUSE)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # not all processes at once
    raise ConnectionError(f"{problem}, {settings.tries} times")


def _system(url: str) -> tuple[Any, str]:
    """Return the file system of fsspec for a URL, and the name of the file in it."""
    import fsspec

    scheme = url.partition("://")[0]
    # trust_env: proxies, and passwords in ~/.netrc
    options = {"client_kwargs": {"trust_env": True}} if scheme in ("http", "https") else {}
    system = fsspec.filesystem(scheme, **options)
    return system, system._strip_protocol(request_url(url))


# Between the threads


def _submit(coroutine: Coroutine[Any, Any, _T]) -> "Future[_T]":
    from fsspec.asyn import get_loop

    return asyncio.run_coroutine_threadsafe(coroutine, get_loop())


def _wait(future: "Future[_T]", url: str) -> _T:
    try:
        return future.result()
    except Exception as error:
        raise _to_os_error(error, url) from error
    except BaseException:
        future.cancel()
        raise


def _to_os_error(error: Exception, url: str) -> OSError:
    """Return an error of the operating system that names the URL, without credentials."""
    scheme = url.partition("://")[0]
    status = _status(error)
    reason = redact(" ".join(str(getattr(error, "strerror", None) or error).split())) or type(error).__name__
    kind: type[OSError] = OSError
    number: int | None = None
    if isinstance(error, FileNotFoundError) and status in (None, 404):
        kind, number, reason = FileNotFoundError, errno.ENOENT, "does not exist"
    elif status in (401, 403) or isinstance(error, PermissionError):
        kind = PermissionError
        reason = f"the server refuses access ({status or 403}); give credentials, or check the URL"
    elif type(error).__name__ in _NO_CREDENTIALS:
        kind, reason = PermissionError, f"no credentials for {scheme}:// were found"
    elif isinstance(error, ImportError):
        package = _PACKAGES.get(scheme)
        reason = reason if package is None else f"needs a package: pip install '{package}'"
    elif isinstance(error, ValueError) and "rotocol not known" in reason:
        reason = f"{scheme}:// is no protocol that fsspec knows"
    elif isinstance(error, NotADirectoryError | IsADirectoryError):
        kind = type(error)
    return kind(number, reason, url)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error of a file system; fsspec hides some behind a `FileNotFoundError`."""
    if "InvalidRange" in str(error):
        return 416
    is_hidden = isinstance(error, FileNotFoundError) and error.__cause__ is not None
    answered = error.__cause__ if is_hidden else error
    values = (str(getattr(answered, name, "")) for name in ("status", "code"))
    return next((int(value) for value in values if value.isdigit()), None)


def _is_permanent(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in _RETRIED_STATUS
    if type(error).__name__ in _NO_CREDENTIALS:
        return True
    # A FileNotFoundError may hide a failed connection, or come from a look-up in a file system without a server.
    is_hidden = isinstance(error, FileNotFoundError) and error.__cause__ is not None
    return isinstance(error, _PERMANENT) and (
        not is_hidden or isinstance(error.__cause__, (*_PERMANENT, LookupError))
    )


def _describe(error: Exception, timeout: float) -> str:
    status = _status(error)
    if status is not None:
        return f"the server answered with status {status}"
    if isinstance(error, TimeoutError):
        return f"no answer came in {timeout:g} seconds"
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    return redact(" ".join(str(cause).split())) or type(cause).__name__


def _warn_of(url: str, problem: str | None) -> None:
    if problem is not None:
        _warn_once(
            _FAILED,
            f"{url}: {problem}; it was tried again, as others will be, up to {_state.settings.tries} times (reported "
            "once)",
        )


def _warn_once(kind: int, message: str) -> None:
    if not _warned[kind]:
        _warned[kind] = 1
        warnings.warn(message, stacklevel=3)
