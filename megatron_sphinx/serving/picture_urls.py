"""Pictures that a request gives as URLs: data: always, file: and https: only where the user of the server allows it.

A URL is a way to make the server read what its client cannot. So a file must lie in a folder that was named, links
resolved, and a host must have been named; redirects are not followed, and nothing larger than a picture is read.
"""

import base64
import binascii
import http.client
import os
import ssl
import stat
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit

from megatron_sphinx.errors import DataError, shortened
from megatron_sphinx.paths import inside
from megatron_sphinx.serving.limits import Access, Limits

_SHOWN = 100  # characters of a URL in a message
_BLOCK = 2**16  # bytes read from a host at a time


def read_picture(url: str, access: Access, limits: Limits) -> bytes:
    """Return the content of the picture that a URL gives or names.

    Raises:
        DataError: the URL is none, is not allowed, or leads to nothing that can be read; or it is too large.
    """
    if url[:5].lower() == "data:":
        return _from_data(url, limits)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise DataError(
            f"url={shortened(url, _SHOWN)}: is no URL ({shortened(error, 80)}); give data:image/…;base64,…"
        ) from error
    if parts.scheme == "file":
        return _from_file(parts, access, limits)
    if parts.scheme == "https":
        return _from_host(parts, port, access, limits)
    raise DataError(
        f"url={shortened(url, _SHOWN)}: must begin with data:, or with file: or https: where the server allows it; "
        f"give data:image/…;base64,…"
    )


def _from_data(url: str, limits: Limits) -> bytes:
    """Return what a data: URL holds."""
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise DataError(f"url={shortened(url, 40)}: must be data:image/…;base64,…")
    if len(text) * 3 // 4 > limits.picture_mebibytes * 2**20 + 2:
        raise _too_large("the data: URL", limits)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError of what is not ASCII
        raise DataError(f"url={shortened(url, 40)}: is no base64 ({error}); encode the picture's file") from error


def _from_file(parts: SplitResult, access: Access, limits: Limits) -> bytes:
    """Read the file that a file: URL names."""
    name = unquote(parts.path)
    shown = shortened(f"file://{name}", _SHOWN)
    if parts.netloc not in ("", "localhost") or not name.startswith("/"):
        raise DataError(f"url={shown}: must be file:///folder/picture.jpg, of this machine")
    if not (path := _allowed(name, access)):
        raise DataError(
            f"url={shown}: is in no folder of --allow-files; give data:image/…;base64,…, or allow its folder"
        )
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(f"url={shown}: is no regular file; name a picture")
            content = file.read(limits.picture_mebibytes * 2**20 + 1)
    except OSError as error:
        raise DataError(f"url={shown}: cannot be read ({error.strerror}); name a picture") from error
    if len(content) > limits.picture_mebibytes * 2**20:
        raise _too_large(shown, limits)
    return content


def _allowed(name: str, access: Access) -> Path | None:
    """Return the path that a name means where it is in an allowed folder, links resolved."""
    for folder in access.folders:
        try:
            return Path(os.path.realpath(folder / inside(folder, name)))
        except DataError:
            continue
    return None


def _from_host(parts: SplitResult, port: int | None, access: Access, limits: Limits) -> bytes:
    """Download what an https: URL names."""
    host = (parts.hostname or "").rstrip(".")
    place = host if port in (None, 443) else f"{host}:{port}"
    shown = shortened(f"https://{place}{parts.path}", _SHOWN)  # without what may be secret
    known = [allowed.lower().removesuffix(":443") for allowed in access.hosts]
    if not host or place not in known or "@" in parts.netloc:
        raise DataError(
            f"url={shown}: is of no host of --allow-urls; give data:image/…;base64,…, "
            f"or allow the host {shortened(place, 80)}"
        )
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{parts.query}" if parts.query else "")
    context = ssl.create_default_context()
    connection = http.client.HTTPSConnection(host, port, timeout=limits.fetch_seconds, context=context)
    try:
        with closing(connection):
            connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "megatron-sphinx"})
            response = connection.getresponse()
            if response.status != 200:
                raise DataError(
                    f"url={shown}: the host answered {response.status}, and redirects are not followed; "
                    f"give the picture's own URL"
                )
            return _body(response, shown, limits)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"url={shown}: cannot be had ({shortened(error, 80)}); give data:image/…;base64,…") from error


def _body(response: http.client.HTTPResponse, shown: str, limits: Limits) -> bytes:
    """Read the body of a response, as much and as long as is allowed."""
    content, end = bytearray(), time.monotonic() + limits.fetch_seconds
    while block := response.read1(_BLOCK):
        content += block
        if len(content) > limits.picture_mebibytes * 2**20:
            raise _too_large(shown, limits)
        if time.monotonic() > end:
            raise DataError(
                f"url={shown}: takes longer than --fetch-seconds={limits.fetch_seconds:g}; give data:image/…;base64,…"
            )
    return bytes(content)


def _too_large(shown: str, limits: Limits) -> DataError:
    """Return the error of a picture's file that is too large."""
    return DataError(
        f"{shown}: has more than --picture-mebibytes={limits.picture_mebibytes}; give a smaller picture, or allow more"
    )
