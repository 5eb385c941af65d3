"""Arrays of an `.npz` archive, memory-mapped: opening one reads its header, never its data."""

import os
import shutil
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from numpy.lib import format as npy

from onnxmerge.errors import UsageError

_ENCRYPTED = 0x1  # bit 0 of a zip member's flags
_LOCAL_HEADER_MAGIC, _LOCAL_HEADER_SIZE = b"PK\x03\x04", 30


class Archive:
    """An `.npz` file, read without pickle.

    An uncompressed member is memory-mapped where it lies. A compressed one is unpacked once to a nameless temporary
    file (in TMPDIR, freed when the array goes) and memory-mapped there, so neither has to fit into memory.
    """

    def __init__(self, path: Path) -> None:
        """Read the archive's table of contents.

        Raises:
            UsageError: the file is missing, unreadable, or not a whole zip archive.
        """
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except FileNotFoundError:
            raise UsageError(f"{path}: no such file") from None
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise UsageError(
                f"{path}: is not a whole .npz archive (a zip file of arrays); it may be cut off"
            ) from error
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
        self._members: Mapping[str, zipfile.ZipInfo] = {
            member.filename.removesuffix(".npy"): member for member in members if member.filename.endswith(".npy")
        }

    @property
    def names(self) -> list[str]:
        """The names of the arrays in the file's order."""
        return list(self._members)

    def open(self, name: str) -> np.ndarray:
        """The array called `name`, memory-mapped and read-only.

        Raises:
            UsageError: it holds Python objects, is damaged or encrypted, or there is no room to unpack it.
        """
        member = self._members[name]
        if member.flag_bits & _ENCRYPTED:
            raise UsageError(f"{self.path}: array {name!r} is encrypted")
        try:
            if member.compress_type == zipfile.ZIP_STORED:
                with self.path.open("rb") as file:
                    file.seek(_data_offset(file, member))
                    return self._map(file, name, member.file_size)
            with tempfile.TemporaryFile(prefix="onnxmerge-") as unpacked:
                with zipfile.ZipFile(self.path) as archive, archive.open(member) as packed:
                    _unpack(packed, unpacked, name, self.path)
                return self._map(unpacked, name, member.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise UsageError(f"{self.path}: array {name!r} is damaged: {error}") from error
        except OSError as error:
            raise UsageError(f"{self.path}: array {name!r} cannot be read: {error.strerror or error}") from error

    def _map(self, file: BinaryIO | IO[bytes], name: str, size: int) -> np.ndarray:
        """Memory-map the `.npy` data of `size` bytes that starts where `file` stands."""
        start = file.tell()
        try:
            version = npy.read_magic(file)
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, fortran_order, dtype = read_header(file)
        except (ValueError, KeyError, SyntaxError, tokenize.TokenError) as error:  # numpy lets the latter two through
            raise UsageError(f"{self.path}: array {name!r} has no header of the .npy format") from error
        if dtype.hasobject:
            raise UsageError(f"{self.path}: array {name!r} holds Python objects, which are never unpickled")
        offset = file.tell()
        expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if size - (offset - start) != expected or os.fstat(file.fileno()).st_size < offset + expected:
            raise UsageError(f"{self.path}: array {name!r} is cut off: its data is not the {expected} bytes of {shape}")
        if expected == 0:
            return np.empty(shape, dtype)
        order = "F" if fortran_order else "C"
        return np.memmap(file, dtype, mode="r", offset=offset, shape=shape, order=order)  # type: ignore[call-overload]


def _unpack(packed: IO[bytes], unpacked: IO[bytes], name: str, path: Path) -> None:
    """Copy a member's content to a temporary file; the zip module checks its checksum at the end."""
    try:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
        unpacked.seek(0)
    except OSError as error:
        raise UsageError(
            f"{path}: array {name!r} cannot be unpacked into {tempfile.gettempdir()}: {error.strerror or error}"
        ) from error


def _data_offset(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where a stored member's data begins: after its local header, whose name and extra field vary in length."""
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER_SIZE)
    if len(header) < _LOCAL_HEADER_SIZE or not header.startswith(_LOCAL_HEADER_MAGIC):
        raise zipfile.BadZipFile("its local header is missing")
    name_length = int.from_bytes(header[26:28], "little")
    extra_length = int.from_bytes(header[28:30], "little")
    return member.header_offset + _LOCAL_HEADER_SIZE + name_length + extra_length
