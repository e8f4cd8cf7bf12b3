"""The models being served: brought in whole, swapped in one assignment, and a bad one refused."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from lazydp.components.bundle.manifest import FILE_NAME, BundleManifest
from lazydp.components.bundle.reader import Bundle
from lazydp.components.bundle.scoring.two_tower import TwoTowerScorer
from lazydp.components.bundle.signature import check_signature, read_public_key
from lazydp.components.shared.errors import InputError, LazyDPError, UnavailableError
from lazydp.service.http.metrics import Metrics
from lazydp.service.serving.answer_cache import AnswerCache
from lazydp.service.serving.private_copy import private_copy
from lazydp.service.serving.served_version import ServedVersion
from lazydp.service.serving.state_file import Loaded, State
from lazydp.service.settings import Settings

_LONGEST_PAUSE_S = 300.0
_log = structlog.get_logger("lazydp.service")


@dataclass(frozen=True, slots=True)
class _Identity:
    """What a path points at right now; changes when another version is put there."""

    folder: Path
    inode: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> _Identity | None:
        try:
            folder = path.resolve(strict=True)
            status = (folder / FILE_NAME).stat()
        except OSError:
            return None
        return cls(folder, status.st_ino, status.st_mtime_ns)


@dataclass(slots=True)
class _Watched:
    """A configured path.

    Attributes:
        identity: what it pointed at when it was last brought in, or tried.
        name: of the model that came from it.
        refusals: in a row, of what it points at now.
        again_at: monotonic time of the next attempt after a refusal.
    """

    identity: _Identity | None
    name: str
    refusals: int = 0
    again_at: float = 0.0

    def is_due(self, found: _Identity) -> bool:
        """Whether `found` should be brought in: it is new, or was refused and may be whole by now."""
        if found != self.identity:
            self.identity, self.refusals = found, 0
            return True
        return self.refusals > 0 and time.monotonic() >= self.again_at

    def was_refused(self, pause_s: float) -> None:
        """Try again later, and ever later: what is still being copied is soon whole, what is bad stays so."""
        self.refusals += 1
        self.again_at = time.monotonic() + min(pause_s * 2**self.refusals, _LONGEST_PAUSE_S)


class Registry:
    """Every model being served, by name.

    A request takes its `ServedVersion` once and keeps it to the end, so that its answer comes from one version.
    The mapping is replaced, never changed: readers need no lock.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._versions: dict[str, ServedVersion] = {}
        self._watched: dict[Path, _Watched] = {}
        self._refused: dict[str, str] = {}
        self._default: str | None = None
        # Names that bundles are served by -> the model's own name, where that is another.
        self._models: dict[str, str] = {}
        self._lock = threading.Lock()
        self._state = State()
        self._signers = [read_public_key(path) for path in settings.require_signature]
        # Matrix products of large catalogues; as many at once as the settings give threads.
        self._executor = ThreadPoolExecutor(settings.threads, thread_name_prefix="rank")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")

    @property
    def ready(self) -> bool:
        """Whether there is a model to answer with."""
        return bool(self._versions)

    @property
    def default(self) -> str | None:
        """Name of the model that answers where none is named."""
        return self._default

    def versions(self) -> Sequence[ServedVersion]:
        """What is served."""
        return tuple(self._versions.values())

    def names(self) -> Collection[str]:
        """Names of what is served."""
        return self._versions.keys()

    def get(self, name: str | None = None) -> ServedVersion | None:
        """The served version of a model, by default of the first."""
        wanted = self._default if name is None else name
        return None if wanted is None else self._versions.get(wanted)

    def refused(self, name: str) -> str | None:
        """Why the latest attempt to bring in another version of a model was refused."""
        return self._refused.get(name)

    def start(self) -> None:
        """Bring in every configured bundle, and what was loaded by request before the last stop.

        Raises:
            LazyDPError: a configured bundle cannot be served, or the state file is not one.
        """
        torch.set_num_threads(self._settings.threads)
        for path in self._settings.bundles:
            identity = _Identity.of(path)
            name = self._bring_in(path).name
            self._watched[path] = _Watched(identity, name)
        for name, path in self._settings.named_bundles.items():
            self._start_named(name, path)
        self._check_retrievers()
        self._check_split()
        if self._settings.state_file is not None:
            self._state = State.read(self._settings.state_file)
            self._restore(self._state)

    def _start_named(self, name: str, path: Path) -> None:
        if name in self._versions or path in self._watched:
            raise InputError(f"setting named_bundles: {name!r} at {path} is configured already; name a link to it")
        identity = _Identity.of(path)
        self._models[name] = BundleManifest.load(path).name
        self._bring_in(path, name)
        self._watched[path] = _Watched(identity, name)

    def _check_split(self) -> None:
        shadow = () if self._settings.shadow is None else (self._settings.shadow,)
        for setting, names in (("weights", self._settings.weights), ("shadow", shadow)):
            for name in names:
                if name not in self._versions:
                    known = ", ".join(self._versions)
                    raise InputError(f"setting {setting}: nothing is served as {name!r}; there are: {known}")

    def _check_retrievers(self) -> None:
        for model, retriever in self._settings.retrievers.items():
            for name in (model, retriever):
                if name not in self._versions:
                    known = ", ".join(self._versions)
                    raise InputError(f"setting retrievers: no model {name!r} is configured; there are: {known}")
            if not isinstance(self._versions[retriever].scorer, TwoTowerScorer):
                raise InputError(
                    f"setting retrievers: {retriever!r} is no two-tower model, so it cannot find candidates"
                )

    def _restore(self, state: State) -> None:
        """Serve what `state` says. What cannot be is logged: the configured version answers rather than none."""
        for name in state.unloaded:
            self._drop(name)
        for name, loaded in state.loaded.items():
            path = self._inside_repository(loaded.folder)
            try:
                if path is None or BundleManifest.load(path).version != loaded.version:
                    raise InputError(f"the repository no longer holds version {loaded.version} at {loaded.folder}")
                self._bring_in(path, name)
            except LazyDPError as error:
                self._refused[name] = str(error)
                _log.error("loaded model not restored", model=name, reason=str(error))

    def close(self) -> None:
        """Let the threads go."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._loader.shutdown(wait=False, cancel_futures=True)

    async def load(self, path: Path, *, expected_name: str) -> ServedVersion:
        """Bring in a bundle while the service answers; on return it is noted in the state file, where there is one.

        Raises:
            UnavailableError: it is served, but the state file cannot be written.
            LazyDPError: it cannot be served; what was served before still is.
        """
        return await asyncio.get_running_loop().run_in_executor(self._loader, self._load, path, expected_name)

    async def unload(self, name: str) -> bool:
        """Serve a model no more; whether it was served. The default model stays.

        Raises:
            UnavailableError: the state file cannot be written.
        """
        return await asyncio.get_running_loop().run_in_executor(self._loader, self._unload, name)

    def remembers(self, path: Path) -> bool:
        """Whether a restart would serve what was loaded from `path`."""
        return self._settings.state_file is not None or path in self._watched

    # The loader is one thread, so that loads, unloads and the state file keep one order.

    def _load(self, path: Path, name: str) -> ServedVersion:
        fresh = self._bring_in(path, name)
        root = self._settings.repository
        resolved = path.resolve()
        found = None
        if path not in self._watched and root is not None:
            found = Loaded(resolved.relative_to(root.resolve()).as_posix(), fresh.version)
        self._remember(self._state.with_loaded(name, found))
        return fresh

    def _unload(self, name: str) -> bool:
        gone = self._drop(name)
        if gone:
            self._remember(self._state.with_unloaded(name))
        return gone

    def _remember(self, state: State) -> None:
        if state == self._state or self._settings.state_file is None:
            return
        try:
            state.write(self._settings.state_file)
        except OSError as error:
            raise UnavailableError(
                f"the state file {self._settings.state_file} cannot be written ({error.strerror}): "
                "this holds until the service stops"
            ) from error
        self._state = state

    def _drop(self, name: str) -> bool:
        with self._lock:
            if name not in self._versions or name == self._default:
                return False
            gone = self._versions[name]
            self._versions = {key: value for key, value in self._versions.items() if key != name}
        self._metrics.gone(name, gone.version)
        return True

    def paths(self, name: str) -> list[Path]:
        """Watched paths that a model came from."""
        return [path for path, watched in self._watched.items() if watched.name == name]

    async def watch(self) -> None:
        """Bring in what the configured paths come to point at, for ever."""
        while True:
            await asyncio.sleep(self._settings.poll_s)
            for path, watched in list(self._watched.items()):
                found = await asyncio.to_thread(_Identity.of, path)
                if found is None or not watched.is_due(found):
                    continue
                try:
                    await self.load(path, expected_name=watched.name)
                except LazyDPError:
                    watched.was_refused(self._settings.poll_s)
                else:
                    watched.refusals = 0

    def in_repository(self, name: str) -> Path | None:
        """The folder of the repository that holds the model `name`, None without one.

        `name` is checked by its pattern, and the folder must lie in the repository after links are followed.
        """
        return self._inside_repository(name)

    def _inside_repository(self, folder_name: str) -> Path | None:
        root = self._settings.repository
        if root is None:
            return None
        folder = (root / folder_name).resolve()
        inside = folder.is_dir() and folder.is_relative_to(root.resolve()) and folder != root.resolve()
        return folder if inside else None

    def repository_names(self) -> list[tuple[str, str]]:
        """(name, version) of every bundle of the repository that can be read."""
        root = self._settings.repository
        found = []
        for folder in sorted(root.iterdir()) if root is not None and root.is_dir() else []:
            try:
                found.append((folder.name, BundleManifest.load(folder).version))
            except (LazyDPError, OSError):
                continue
        return found

    def _open(self, path: Path, expected_name: str | None) -> Bundle:
        bundle = self._copied(path) if self._settings.copy_bundles else self._opened(path)
        expected = None if expected_name is None else self._models.get(expected_name, expected_name)
        if expected is not None and bundle.manifest.name != expected:
            raise InputError(f"the bundle is of model {bundle.manifest.name!r}, expected {expected!r}")
        return bundle

    def _copied(self, path: Path) -> Bundle:
        if self._signers:
            # Before anything is parsed or copied; the copy is checked again, for the folder may change meanwhile.
            check_signature(path.resolve(), self._signers)
        with private_copy(path, self._settings.copy_folder) as copy:
            try:
                return self._opened(copy)
            except LazyDPError as error:
                raise type(error)(str(error).replace(str(copy), str(path))) from error

    def _opened(self, path: Path) -> Bundle:
        return Bundle.open(
            path,
            verify=self._settings.verify,
            allow_test_key=self._settings.allow_test_key,
            allow_non_private=self._settings.allow_non_private,
            signed_by=self._signers,
        )

    def _bring_in(self, path: Path, expected_name: str | None = None) -> ServedVersion:
        try:
            bundle = self._open(path, expected_name)
            fresh = ServedVersion(
                bundle,
                name=expected_name or bundle.manifest.name,
                executor=self._executor,
                cache=AnswerCache(self._settings.cache_entries, max_bytes=self._settings.cache_bytes),
                approximate_from=self._settings.approximate_from,
                rank_whole_up_to=self._settings.rank_whole_up_to,
            )
        except Exception as error:
            # Whatever is in a bundle, it must not end the watch for the next one.
            refusal = error if isinstance(error, LazyDPError) else _unreadable(path, error)
            if expected_name is not None:
                self._refused[expected_name] = str(refusal)
                self._metrics.swaps.labels(expected_name, "refused").inc()
            _log.error("bundle refused", model=expected_name, reason=str(refusal))
            if refusal is error:
                raise
            raise refusal from error
        with self._lock:
            before = self._versions.get(fresh.name)
            self._versions = {**self._versions, fresh.name: fresh}
            self._default = self._default or fresh.name
        self._refused.pop(fresh.name, None)
        epsilon = bundle.statement.epsilon
        self._metrics.serving(fresh.name, fresh.version, epsilon, before=None if before is None else before.version)
        self._metrics.swaps.labels(fresh.name, "served").inc()
        _log.info(
            "model served", model=fresh.name, version=fresh.version, inline=fresh.inline, index=fresh.scorer.index
        )
        return fresh


def _unreadable(path: Path, error: Exception) -> InputError:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
    return InputError(f"bundle {path} cannot be served ({type(error).__name__} at {where}): export it again")
