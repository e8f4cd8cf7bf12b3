"""Checkpoints written beside training."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch

from lazydp.components.train.run.checkpoint import Checkpoint
from lazydp.components.train.run.folder import RunFolder
from lazydp.components.train.run.shards import Shards


class BackgroundWriter:
    """Writes checkpoints beside training: the state is copied (into host memory) at once, the disk is waited for later.

    One write is under way at most. An error of the write is raised by the next `save`, or when the block is left.

    Args:
        folder: where to.
        memory_limit: a state larger than this (bytes) is written at once instead of copied.
        shards: of a run that several ranks may train; their messages are the writer's own.
    """

    def __init__(self, folder: RunFolder, *, memory_limit: int, shards: Shards | None = None) -> None:
        self._folder = folder
        self._shards = shards
        self._memory_limit = memory_limit
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save(self, checkpoint: Checkpoint) -> None:
        """Take the state as it is now."""
        self.close()
        if _tensor_bytes(checkpoint.state) > self._memory_limit:
            self._folder.save(checkpoint, self._shards)
            return
        snapshot = replace(checkpoint, state=_copy(checkpoint.state))
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=False)
        self._thread.start()

    def close(self) -> None:
        """Wait for the write under way, and raise its error if it had one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            self._folder.save(checkpoint, self._shards)
        except BaseException as error:
            self._error = error


def _copy(node: Any) -> Any:
    if isinstance(node, torch.Tensor):
        return node.detach().to("cpu", copy=True)
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_copy(value) for value in node]
    return node


def _tensor_bytes(node: Any) -> int:
    if isinstance(node, torch.Tensor):
        return node.numel() * node.element_size()
    if isinstance(node, dict):
        return sum(_tensor_bytes(value) for value in node.values())
    if isinstance(node, list | tuple):
        return sum(_tensor_bytes(value) for value in node)
    return 0
