"""Zip files: names as paths, sizes that are checked before anything is unpacked."""

import bz2
import lzma
import os
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from genai_fast.data.reading import check_unpacked, open_regular, parsing

_ENCRYPTED = 0x1
_LZMA_MEMORY = 1 << 28  # bytes of a dictionary


class Archive:
    """Those regular files in a zip file that are wanted.

    Names are paths with "/" whatever wrote the file: back slashes separate too, and "./", "../" and a leading "/" are
    dropped. Of entries of one name the last counts, as when a zip file is unpacked. Reading is safe in threads.

    Args:
        path: the zip file.
        wanted: name -> whether the file counts.
        expected: what the file is said to be in errors.

    Raises DataError: it is no zip file, or the wanted files unpack to far more than its size.
    """

    def __init__(self, path: Path, wanted: Callable[[str], bool], expected: str = "a zip file") -> None:
        self._lock = threading.Lock()
        self._members: dict[str, zipfile.ZipInfo] = {}
        with parsing(path, expected):
            self._file = open_regular(path)
            self._size = os.fstat(self._file.fileno()).st_size
            for info in zipfile.ZipFile(self._file).infolist():
                name = _path(info.filename)
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind in (0, stat.S_IFREG) and not info.filename.endswith(("/", "\\")) and wanted(name):
                    self._members[name] = info
            check_unpacked(sum(info.file_size for info in self._members.values()), self._size)

    @property
    def names(self) -> list[str]:
        """Names of the wanted files, in the order of the archive."""
        return list(self._members)

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises Exception: the file is damaged; zlib, bz2 and lzma raise their own."""
        info = self._members[name]
        if info.flag_bits & _ENCRYPTED:
            raise ValueError("an encrypted file")
        with self._lock:
            self._file.seek(info.header_offset)
            head = self._file.read(30)
            if len(head) < 30 or head[:4] != b"PK\x03\x04":
                raise ValueError("no file where the zip's directory says")
            self._file.seek(sum(struct.unpack("<HH", head[26:])), os.SEEK_CUR)  # its name, and what was added
            raw = self._file.read(min(info.compress_size, self._size))
        # zipfile trusts the stated size until all is unpacked; here one byte more than stated is the most.
        found = _unpacked(raw, info.compress_type, info.file_size + 1)
        if len(found) != info.file_size or zlib.crc32(found) != info.CRC:
            raise ValueError("a file whose size or check sum is not as stated")
        return found

    def close(self) -> None:
        """Close the zip file."""
        self._file.close()


def _path(name: str) -> str:
    parts: list[str] = []
    for part in name.replace("\\", "/").split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def _unpacked(raw: bytes, method: int, most: int) -> bytes:
    if method == zipfile.ZIP_STORED:
        return raw
    if method == zipfile.ZIP_DEFLATED:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, most)
    if method == zipfile.ZIP_BZIP2:
        return bz2.BZ2Decompressor().decompress(raw, most)
    if method == zipfile.ZIP_LZMA:  # two numbers, five bytes of properties, data: .lzma's form without the size
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_ALONE, _LZMA_MEMORY)
        return decompressor.decompress(raw[4:9] + b"\xff" * 8 + raw[9:], most)
    raise ValueError(f"compression method {method}; remedy: zip it with deflate")
