"""Files behind URLs: paths that name them, and a client that reads them through a bounded cache on the local disk."""

from sniper.remote.client import Settings, Shared, configure, share, use_shared
from sniper.remote.path import RemotePath, fetch_ahead, is_remote, read_ahead, to_path
from sniper.remote.urls import is_url, redact

__all__ = [
    "RemotePath",
    "Settings",
    "Shared",
    "configure",
    "fetch_ahead",
    "is_remote",
    "is_url",
    "read_ahead",
    "redact",
    "share",
    "to_path",
    "use_shared",
]
