# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Download of one file: progress, resume, and a check before it gets its name."""

from __future__ import annotations

import importlib.util
import os
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from torchrl._utils import logger as torchrl_logger

_has_tqdm = importlib.util.find_spec("tqdm") is not None

_BLOCK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60


def download_npz(url: str, path: Path, *, attempts: int = 3, wait: float = 2.0) -> Path:
    """Downloads an npz file, and gives it its name once it is complete and sound.

    What has arrived stays in ``<path>.part``: a broken connection, or a later call, goes on from
    there if the server can (HTTP ranges), and starts again otherwise.

    Args:
        url (str): where the file is.
        path (Path): the file to write.
        attempts (int, optional): connections to try.
        wait (float, optional): seconds before the second attempt, doubled for each further one.

    Returns:
        Path: ``path``.

    Raises:
        ConnectionError: if the server refuses or cannot be reached, or breaks off every time.
        ValueError: if what arrived is no sound npz archive. It is deleted.
        OSError: if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(attempts):
        try:
            _fetch(url, part)
            break
        except urllib.error.HTTPError as error:
            raise ConnectionError(f"{url} answered {error.code} ({error.reason}).") from error
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if attempt == attempts - 1:
                raise ConnectionError(
                    f"{url} could not be downloaded in {attempts} attempts: {error}. Repeat the "
                    f"call to go on, give a folder that holds the official files (directory=...), "
                    f"or collect them on this machine where that is possible (source='local')."
                ) from error
            torchrl_logger.info(f"{url}: {error}; trying again.")
            time.sleep(wait * 2**attempt)
    _check_archive(url, part)
    os.replace(part, path)
    return path


def _fetch(url: str, part: Path) -> None:
    """One connection: continues ``part`` if the server sends the rest, else replaces it."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # no byte is left to send: the part is complete, or too long
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink()
            raise ConnectionError(f"the file on the server is not the one that {part} began") from (
                error
            )
        raise
    with response:
        resumed = have > 0 and response.status == 206
        start = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with open(part, "ab" if resumed else "wb") as file, _progress(url, start, total) as advance:
            while block := response.read(_BLOCK_BYTES):
                file.write(block)
                advance(len(block))
    size = part.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"the connection ended after {size} of {total} bytes")


def _check_archive(url: str, part: Path) -> None:
    """Reads the whole archive once, comparing its checksums."""
    size = part.stat().st_size
    problem = "it is no zip archive"
    if zipfile.is_zipfile(part):
        with zipfile.ZipFile(part) as archive:
            damaged = archive.testzip()
            if damaged is None:
                return
            problem = f"its member {damaged!r} is damaged"
    part.unlink()
    raise ValueError(f"{url} did not send a sound npz file ({size} bytes): {problem}.")


class _progress:
    """A progress bar if tqdm is installed; yields the function that advances it."""

    def __init__(self, url, start, total):
        self._bar = None
        if _has_tqdm:
            from tqdm import tqdm

            name = url.rsplit("/", 1)[-1]
            self._bar = tqdm(initial=start, total=total, unit="B", unit_scale=True, desc=name)

    def __enter__(self):
        return self._bar.update if self._bar is not None else lambda count: None

    def __exit__(self, *exc_info):
        if self._bar is not None:
            self._bar.close()
