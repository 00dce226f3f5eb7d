"""The files of an adapter out of a folder or a zip that somebody else made: sizes are capped while reading, nothing is ever extracted."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from lorayard.errors import AdapterRejected

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "card.json"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl", "pytorch_lora_weights.bin")
_SMALL = 1 << 20  # cap of a JSON file
_ENTRIES = 256
_DIRECTORY_BYTES = 1 << 18  # of a zip's central directory: read whole by zipfile before anything can be counted
_RATIO = 100
_CHUNK = 1 << 20

Source = bytes | str | os.PathLike[str]


def read_files(source: Source, max_bytes: int) -> dict[str, bytes]:
    """Content of `adapter_config.json`, `adapter_model.safetensors` and, where there is one, `card.json`.

    `source` is a folder, a zip's path, or a zip's bytes; `max_bytes` caps the weights. Raises `AdapterRejected`.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_zip(io.BytesIO(source), len(source), max_bytes)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, max_bytes)
    try:
        with path.open("rb") as file:
            return _from_zip(file, path.stat().st_size, max_bytes)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise AdapterRejected(f"{str(source)[:200]}: {_reason(error)}; give a PEFT folder or a zip of one") from None


def _reason(error: BaseException) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _cap(name: str, max_bytes: int) -> int:
    return max_bytes if name == WEIGHTS else _SMALL


def _too_large(name: str, cap: int) -> AdapterRejected:
    return AdapterRejected(f"{name}: more than {cap:,} bytes; the operator may raise LORAYARD_MAX_ADAPTER_BYTES", code="adapter_too_large")


def _check_present(names: Iterable[str]) -> None:
    have = set(names)
    if WEIGHTS not in have and (pickles := sorted(have & set(_PICKLES))):
        raise AdapterRejected(
            f"{pickles[0]}: pickled weights can run code when read, so they are refused; save the adapter with safe_serialization=True",
            code="adapter_pickle",
        )
    for name in (CONFIG, WEIGHTS):
        if name not in have:
            raise AdapterRejected(f"{name} is missing; an adapter is what PEFT's save_pretrained writes: {CONFIG} and {WEIGHTS}")


def _from_folder(folder: Path, max_bytes: int) -> dict[str, bytes]:
    _check_present(entry.name for entry in folder.iterdir())
    return {name: _read_file(folder / name, _cap(name, max_bytes)) for name in (CONFIG, WEIGHTS, CARD) if os.path.lexists(folder / name)}


def _read_file(path: Path, cap: int) -> bytes:
    try:
        # Not following a link, and not blocking on a pipe: opening either must not reach outside the folder or hang.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if path.is_symlink():
            raise AdapterRejected(f"{path.name}: is a link, which is not followed; copy the file itself (cp -L)") from None
        raise AdapterRejected(f"{path.name}: {_reason(error)}") from None
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterRejected(f"{path.name}: not a plain file")
        if status.st_size > cap:
            raise _too_large(path.name, cap)
        data = file.read(cap + 1)
    if len(data) > cap:
        raise _too_large(path.name, cap)
    return data


def _from_zip(file: io.BufferedIOBase | io.BufferedReader, size: int, max_bytes: int) -> dict[str, bytes]:
    if size > max_bytes + (16 << 20):
        raise _too_large("the zip", max_bytes)
    try:
        _check_directory(file, size)
        with zipfile.ZipFile(file) as archive:
            wanted = _select(archive.infolist())
            return {name: _inflate(archive, info, _cap(name, max_bytes)) for name, info in wanted.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, RuntimeError, OverflowError, struct.error) as error:
        raise AdapterRejected(f"not a sound zip: {_reason(error)[:200]}", code="adapter_archive") from None


def _check_directory(file: io.BufferedIOBase | io.BufferedReader, size: int) -> None:
    """Refuse a central directory that would be a bomb itself: zipfile makes an object of each of its entries."""
    tail_size = min(size, 65_535 + 22 + 20)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    # The same rule as zipfile's: a record that ends the file, else the last that has the signature.
    at = len(tail) - 22 if tail[-22:-18] == b"PK\5\6" and tail[-2:] == b"\0\0" else tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < 22:
        magic = "a pickle or an old PyTorch file" if tail[:1] == b"\x80" else "not a zip, or one that was cut short"
        raise AdapterRejected(f"the archive is {magic}; give a PEFT folder or a zip of one", code="adapter_archive")
    if b"PK\6\7" in tail[max(0, at - 20) : at]:
        raise AdapterRejected("the archive is in the ZIP64 form, which no adapter needs; zip the files again", code="adapter_archive")
    (directory_bytes,) = struct.unpack_from("<L", tail, at + 12)
    if directory_bytes > _DIRECTORY_BYTES:
        raise AdapterRejected(f"the zip has too many files; put only {CONFIG} and {WEIGHTS} into it", code="adapter_archive")
    file.seek(0)


def _select(infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Entries of the one adapter inside, which lies at the top or in one folder. Every name is checked, those of ignored files too."""
    if len(infos) > _ENTRIES:
        raise AdapterRejected(f"the zip has {len(infos)} files; put only {CONFIG} and {WEIGHTS} into it", code="adapter_archive")
    by_path: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for info in infos:
        path = _safe_path(info)
        if path in by_path:
            raise AdapterRejected(f"the zip holds {str(path)!r} twice", code="adapter_archive")
        by_path[path] = info
    roots = [path.parent for path in by_path if path.name == CONFIG and len(path.parts) <= 2]
    if len(roots) > 1:
        raise AdapterRejected(f"the zip holds {len(roots)} adapters; zip each by itself", code="adapter_archive")
    root = roots[0] if roots else PurePosixPath()
    here = {path.name: info for path, info in by_path.items() if path.parent == root and not info.is_dir()}
    _check_present(here)
    return {name: here[name] for name in (CONFIG, WEIGHTS, CARD) if name in here}


def _safe_path(info: zipfile.ZipInfo) -> PurePosixPath:
    name = info.orig_filename  # zipfile cuts `filename` at a NUL
    path = PurePosixPath(name)
    if not name or not name.isprintable() or "\\" in name or ":" in name or path.is_absolute() or ".." in path.parts:
        raise AdapterRejected(f"the zip holds the unsafe path {name[:80]!r}; zip the files by plain names", code="adapter_archive")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise AdapterRejected(f"{name[:80]!r} in the zip is a link or a device; zip the file itself", code="adapter_archive")
    if info.flag_bits & 0x1:
        raise AdapterRejected("the zip is encrypted; zip it without a password", code="adapter_archive")
    if not info.is_dir() and info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise AdapterRejected(f"{name[:80]!r} is compressed in an unusual way; use deflate or none", code="adapter_archive")
    return path


def _inflate(archive: zipfile.ZipFile, info: zipfile.ZipInfo, cap: int) -> bytes:
    """The entry's bytes, counted while they come: what the directory says of sizes is a claim."""
    out = io.BytesIO()
    bomb = max(_SMALL, _RATIO * info.compress_size)
    with archive.open(info) as stream:
        while chunk := stream.read(_CHUNK):
            out.write(chunk)
            if out.tell() > cap:
                raise _too_large(PurePosixPath(info.filename).name, cap)
            if out.tell() > bomb:
                raise AdapterRejected(
                    f"{info.filename[:80]!r} inflates more than {_RATIO} times: refused as a bomb", code="adapter_archive"
                )
    return out.getvalue()
