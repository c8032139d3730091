"""URLs and their credentials."""

import pytest

from sniper.remote import is_url, redact, to_path, urls


@pytest.mark.parametrize(
    ("given", "clean", "requested"),
    [
        ("https://host/a/b.json", "https://host/a/b.json", "https://host/a/b.json"),
        ("HTTPS://host/a/", "https://host/a", "https://host/a"),
        ("https://me:pw@host/a.json", "https://host/a.json", "https://me:pw@host/a.json"),
        ("https://token@host/a.json", "https://host/a.json", "https://token@host/a.json"),
        ("https://host/a.json?X-Sig=9%2F8", "https://host/a.json", "https://host/a.json?X-Sig=9%2F8"),
        ("https://host/a%20b/ü.jpg", "https://host/a b/ü.jpg", "https://host/a%20b/%C3%BC.jpg"),
        ("s3://bucket/a?b#c%20.jpg", "s3://bucket/a?b#c%20.jpg", "s3://bucket/a?b#c%20.jpg"),
        ("ftp://me:pw@host/a", "ftp://host/a", "ftp://me:pw@host/a"),
        ("abfs://box@account.net/a", "abfs://box@account.net/a", "abfs://box@account.net/a"),
        ("memory://a", "memory://a", "memory://a"),
        ("s3://bucket/a/../b/../../c.jpg", "s3://bucket/a/../b/../../c.jpg", "s3://bucket/c.jpg"),
    ],
)
def test_credentials_are_in_requests_and_nowhere_else(given: str, clean: str, requested: str) -> None:
    assert is_url(given)
    assert str(to_path(given)) == clean
    assert urls.request_url(clean) == requested


def test_credentials_of_a_folder_are_those_of_the_files_below() -> None:
    folder = to_path("https://me:pw@host/data?sig=1")
    to_path("https://host/data/special?sig=2")
    assert urls.request_url(str(folder / "images" / "a.jpg")) == "https://me:pw@host/data/images/a.jpg?sig=1"
    assert (
        urls.request_url("https://host/data/special/a.jpg") == "https://me:pw@host/data/special/a.jpg?sig=2"
    )
    assert urls.request_url("https://host/other.jpg") == "https://me:pw@host/other.jpg"
    assert urls.request_url("https://elsewhere/data/a.jpg") == "https://elsewhere/data/a.jpg"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("sniper train https://me:pw@host/a.json?sig=1 --x", "sniper train https://host/a.json?... --x"),
        ("'https://host/a?sig=(1)', and more", "'https://host/a?...', and more"),
        ("x=ftp://u:p@h/a b=s3://k:s@bucket/c?d", "x=ftp://h/a b=s3://bucket/c?d"),
        ("no URL: a@b?c=d", "no URL: a@b?c=d"),
    ],
)
def test_text_is_redacted(text: str, redacted: str) -> None:
    assert redact(text) == redacted


def test_a_file_url_is_a_local_path(tmp_path: object) -> None:
    path = to_path(f"file://{tmp_path}/a.jpg")
    assert str(path) == f"{tmp_path}/a.jpg"
    assert not is_url(str(path))
