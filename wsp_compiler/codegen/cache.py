"""The kernel cache on disk: one file per kernel, written atomically, checked when read.

A few other things that take long to find out are kept there too, in files named "KIND-...".

Many processes may use one directory at once. A damaged entry, an unreadable file or an unwritable directory
costs a rebuild, never a failure. ``WSP_CACHE_DIR`` overrides the directory; an empty value turns it off.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Mapping

import platformdirs

logger = logging.getLogger("wsp_compiler")

MAGIC = b"wsp_compiler kernel 1\n"


def cache_directory() -> pathlib.Path | None:
    """Where kernels are kept, or None if caching is off."""
    override = os.environ.get("WSP_CACHE_DIR")
    if override is not None:
        return pathlib.Path(override) if override else None
    return pathlib.Path(platformdirs.user_cache_dir("wsp_compiler")) / "kernels"


def cache_key(*parts: str) -> str:
    """A file name from everything the kernel depends on."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def encode(entry: Mapping[str, bytes]) -> bytes:
    """Named byte strings as one file's content, with a checksum over all of it."""
    body = b"".join(entry.values())
    header = json.dumps({"sizes": {name: len(data) for name, data in entry.items()}}).encode()
    content = len(header).to_bytes(4, "little") + header + body
    return MAGIC + hashlib.sha256(content).digest() + content


def decode(data: bytes) -> dict[str, bytes]:
    """The inverse of :func:`encode`.

    Raises:
        ValueError: the content is damaged.
    """
    digest, content = data[len(MAGIC) : len(MAGIC) + 32], data[len(MAGIC) + 32 :]
    if not data.startswith(MAGIC) or hashlib.sha256(content).digest() != digest:
        raise ValueError("checksum mismatch")
    length = int.from_bytes(content[:4], "little")
    position, entry = 4 + length, dict[str, bytes]()
    for name, size in json.loads(content[4 : 4 + length])["sizes"].items():
        entry[name] = content[position : position + size]
        position += size
    return entry


def load(key: str) -> dict[str, bytes] | None:
    """The entry stored under ``key``, or None if there is none that can be used."""
    directory = cache_directory()
    if directory is None:
        return None
    try:
        return decode((directory / key).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        logger.warning("kernel cache entry %s is unusable (%s), rebuilding", key, error)
        return None


def store(key: str, entry: Mapping[str, bytes]) -> None:
    """Keep ``entry`` under ``key``; failing to do so is logged, not raised."""
    directory = cache_directory()
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=".partial-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(encode(entry))
            os.replace(temporary, directory / key)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        logger.warning("kernel cache directory %s is not writable (%s)", directory, error)
