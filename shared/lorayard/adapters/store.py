"""Where adapters lie: the artifact store (shared, by content digest) and a worker's folder of GGUF files made from it."""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import obstore
from obstore.store import LocalStore, ObjectStore, from_url

from lorayard.adapters.conversion import Precision, write_gguf
from lorayard.adapters.files import CONFIG, WEIGHTS
from lorayard.adapters.manifest import BaseModel
from lorayard.adapters.peft import PeftAdapter, build_adapter, check_fit
from lorayard.errors import AdapterRejected, LorayardError, NotFound, SetupError, Unavailable
from lorayard.settings import Settings

IN_USE_S = 600.0
LOCK_S = 3.0
"""How long a process waits for another one that makes the same file, before it makes it as well."""
_LOOK_S = 0.02

_DIGEST = re.compile(r"[0-9a-f]{32}")


class ArtifactStore:
    """Adapters by digest, as `<digest>/adapter_config.json` and `<digest>/adapter_model.safetensors` in a folder or a bucket."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @classmethod
    def open(cls, settings: Settings) -> ArtifactStore:
        """The store of `LORAYARD_ARTIFACTS_URL` (s3, gs, az, file; credentials from the environment), else a folder of the state.

        Raises `SetupError`.
        """
        url = settings.artifacts_url
        try:
            if url is None:
                return cls(LocalStore((settings.state_dir / "artifacts").absolute(), mkdir=True))
            return cls(from_url(url, mkdir=True) if url.startswith("file:") else from_url(url))
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise SetupError(f"LORAYARD_ARTIFACTS_URL: {url!r} cannot be opened: {error}") from None

    def put(self, adapter: PeftAdapter) -> str:
        """Keep it; returns its digest. Putting it again repairs what was damaged."""
        digest = adapter.digest
        with _reachable(digest):
            # The weights last: what `exists` looks at is there only when both are.
            obstore.put(self._store, f"{digest}/{CONFIG}", adapter.config_file())
            obstore.put(self._store, f"{digest}/{WEIGHTS}", adapter.weights_file())
        return digest

    def exists(self, digest: str) -> bool:
        try:
            with _reachable(_checked(digest)):
                obstore.head(self._store, f"{digest}/{WEIGHTS}")
        except NotFound:
            return False
        return True

    def get(self, digest: str) -> PeftAdapter:
        """Read it back, with its digest computed again from the content.

        Raises `NotFound`, `Unavailable` when the store does not answer, and `LorayardError` (`artifact_damaged`) for other content.
        """
        with _reachable(_checked(digest)):
            found = {name: bytes(obstore.get(self._store, f"{digest}/{name}").bytes()) for name in (CONFIG, WEIGHTS)}
        try:
            adapter = build_adapter(found)
        except AdapterRejected as error:
            raise _damaged(digest, error.message) from None
        if adapter.digest != digest:
            raise _damaged(digest, f"its content is {adapter.digest}")
        return adapter

    def remove(self, digest: str) -> None:
        """Delete it; no error when it is not there."""
        for name in (WEIGHTS, CONFIG):
            try:
                with _reachable(_checked(digest)):
                    obstore.delete(self._store, f"{digest}/{name}")
            except NotFound:
                continue


def _checked(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):  # it becomes a path
        raise NotFound(f"{digest[:80]!r} is not an adapter's digest", code="adapter_not_found")
    return digest


def _damaged(digest: str, why: str) -> LorayardError:
    return LorayardError(f"the stored adapter {digest} is damaged ({why}); add the adapter again", code="artifact_damaged")


@contextmanager
def _reachable(digest: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, obstore.exceptions.NotFoundError):
        raise NotFound(f"the adapter {digest} is not in the artifact store; add it again", code="adapter_not_found") from None
    except (obstore.exceptions.BaseError, OSError) as error:
        raise Unavailable(f"the artifact store does not answer: {error}", code="artifacts_unavailable") from None


class GgufCache:
    """GGUF files in a folder, for one base, each fetched and converted once; processes of one machine may share the folder."""

    def __init__(self, folder: Path, store: ArtifactStore, base: BaseModel, precision: Precision = "f32") -> None:
        # All that the conversion depends on besides the adapter: another base must not find this one's files.
        variant = f"{base.architecture}-{base.n_head}-{base.n_head_kv}-{base.head_dim}-{precision}"
        self._folder = folder / variant
        self._store = store
        self._base = base
        self._precision: Precision = precision

    def cached(self, digest: str) -> Path | None:
        """The file, if it needs no work."""
        path = self._folder / f"{_checked(digest)}.gguf"
        return path if path.exists() else None

    def path(self, digest: str, on_fetch: Callable[[], None] | None = None) -> Path:
        """The adapter as a GGUF file, used now; `on_fetch` is called first where it must be fetched and converted.

        Raises what `ArtifactStore.get` and `write_gguf` raise, and `AdapterRejected` where it does not fit the base.
        """
        if (found := self.cached(digest)) is not None and _used(found):
            return found
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f".{digest}.lock").open("wb") as lock:
            _wait_for(lock)
            path = self.cached(digest)
            if path is None:
                if on_fetch is not None:
                    on_fetch()
                adapter = self._store.get(digest)
                check_fit(adapter, self._base)
                path = self._folder / f"{digest}.gguf"
                write_gguf(adapter, self._base, path, self._precision)
        return path

    def trim(self, most_bytes: int, planned: Sequence[str] = ()) -> list[str]:
        """Delete files, of other bases' too, until they take no more; the digests of those deleted.

        First those that are not planned, the longest unused before any; then those that are planned latest. What was used in the last
        `IN_USE_S` stays in any case: it may be about to be read.
        """
        files = []
        for path in self._folder.parent.glob("*/*.gguf"):
            with suppress(FileNotFoundError):  # another process trims too
                files.append((path, path.stat()))
        over = sum(stat.st_size for _, stat in files) - most_bytes
        places = {digest: place for place, digest in enumerate(planned)}
        files.sort(key=lambda file: (-places.get(file[0].stem, len(places)), file[1].st_mtime))
        deleted = []
        for path, stat in files:
            if over > 0 and time.time() - stat.st_mtime > IN_USE_S:
                path.unlink(missing_ok=True)
                over -= stat.st_size
                deleted.append(path.stem)
        return deleted


def _wait_for(lock: IO[bytes]) -> None:
    """Have it, or go on without: it saves doing twice what another process does, and that one may stand still or wait for a store for ever.
    Two that write the same file write the same, each under a name of its own until it is whole."""
    give_up = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                return
            time.sleep(_LOOK_S)
        else:
            return


def _used(file: Path) -> bool:
    """Note that it is used now; false if it is gone."""
    try:
        os.utime(file)
    except FileNotFoundError:
        return False
    except OSError:  # somebody else's, or on a disk that may only be read: nobody trims it either
        return True
    return True
