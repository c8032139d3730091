"""Annotation files that are text or XML: reading them, with one clear line where that fails."""

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from sniper.errors import AnnotationError, describe_os_error
from sniper.files import open_regular, read_bytes
from sniper.geometry.boxes import Sides

_LARGEST_SIDE = 2**62
_DECLARATION = re.compile(rb"<\?xml[^>]*\sencoding=[\"']([A-Za-z0-9._-]+)[\"']")
_MULTI_BYTE = ("gb", "hz", "big5", "shift_jis", "euc_", "iso2022", "johab", "cp932", "cp949", "cp950")
_BYTE_ORDER_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def read_text(path: Path) -> str:
    """Read a text file: UTF-8 with or without a byte order mark, or UTF-16 with one; lines end in a line feed.

    Raises:
        AnnotationError: if it is no regular file, cannot be read, or is not text.
    """
    with naming(path):
        content = read_bytes(path)
    encoding = _BYTE_ORDER_MARKS.get(content[:2], "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path}: is not UTF-8 text ({error.reason} in byte {error.start})") from error
    if "\0" in text:
        raise AnnotationError(f"{path}: is not text, it has a zero byte")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one that names the file."""
    try:
        yield
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({describe_os_error(error)})") from error


def read_xml(path: Path) -> ElementTree.Element:
    """Read an XML file.

    Raises:
        AnnotationError: if it cannot be read, is not XML, or declares entities, which can exhaust memory.
    """
    with naming(path):
        content = read_bytes(path)
    try:
        encoding = _multi_byte_encoding(content)
        text = content if encoding is None else content.decode(encoding)
        _check_entities(path, text.encode() if isinstance(text, str) else text)
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise AnnotationError(f"{path}: is not XML ({error})") from error


def iterate_xml(path: Path) -> Iterator[tuple[str, ElementTree.Element]]:
    """Read a large XML file, element by element: yield ("start" or "end", element).

    Raises:
        AnnotationError: as `read_xml`.
    """
    try:
        with naming(path), open_regular(path) as file:
            start = file.read(4096)
            _check_entities(path, start)
            file.seek(0)
            encoding = _multi_byte_encoding(start)
            stream = file if encoding is None else io.TextIOWrapper(file, encoding=encoding)
            yield from ElementTree.iterparse(stream, events=("start", "end"))
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise AnnotationError(f"{path}: is not XML ({error})") from error


def _multi_byte_encoding(content: bytes) -> str | None:
    """Return the encoding that an XML file declares if it is one that the parser does not decode, such as GBK.

    Raises:
        LookupError: if there is no such encoding.
    """
    declared = _DECLARATION.match(content)
    if declared is None:
        return None
    name = codecs.lookup(declared[1].decode()).name
    return name if name.startswith(_MULTI_BYTE) else None


def _check_entities(path: Path, content: bytes) -> None:
    if b"<!ENTITY" in content.replace(b"\0", b""):
        raise AnnotationError(f"{path}: declares XML entities, which annotations do not need")


def text_of(element: ElementTree.Element | None, name: str) -> str:
    """Return the text of a child of an XML element, without white space around it; empty where there is none."""
    return "" if element is None else (element.findtext(name) or "").strip()


def number_of(value: Any) -> float | None:
    """Return a text as a number; None if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def flag_of(text: str) -> bool:
    """Check whether a text is a number above 0, or `true`."""
    return text.strip().lower() == "true" or (number_of(text) or 0) > 0


def sides_of(width: str | None, height: str | None) -> Sides | None:
    """Return the sides of an image from text; None if they are missing, or 0 as some tools write, or no such number."""
    numbers = number_of(width), number_of(height)
    if not all(number is not None and 1 <= number < _LARGEST_SIDE for number in numbers):
        return None
    return Sides(*(int(number) for number in numbers if number is not None))


def read_start(path: Path, *, num_bytes: int = 64) -> bytes:
    """Return the first bytes of a file, without a byte order mark and white space.

    Raises:
        AnnotationError: if it cannot be read.
    """
    with naming(path), open_regular(path) as file:
        return file.read(num_bytes).removeprefix(b"\xef\xbb\xbf").lstrip()
