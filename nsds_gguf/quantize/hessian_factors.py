"""Factors of many Hessians, kept on disk: a file for every input, shared by the matrices that have it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ..system.workfolder import output_error
from .gptq import Feedback, make_feedback

_IN_MEMORY = 3  # factors: of the tensor being written, of the next one, and one to spare


class Feedbacks:
    """Factors by tensor name. Files lie in a folder of the caller's, who removes it."""

    def __init__(self, folder: Path) -> None:
        """Take an existing folder."""
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._recent: OrderedDict[Path, Feedback] = OrderedDict()
        self._lock = Lock()

    def add(self, names: Collection[str], hessian: NDArray[np.floating], shrinkage: float) -> None:
        """Factor the Hessian, ``(n_cols, n_cols)``, of an input that these tensors have; see ``make_feedback``.

        Raises ``OutputError`` when the disk is full.
        """
        feedback = make_feedback(hessian, shrinkage=shrinkage)
        path = self._folder / f"{len(self._files)}.npz"
        arrays = {name: getattr(feedback, name) for name in ("coefficients", "variances", "importance")}
        try:
            np.savez(path, **arrays)
        except OSError as error:
            raise output_error(path, error) from error
        self._files.update(dict.fromkeys(names, path))

    def of(self, name: str) -> Feedback | None:
        """Return the factors of a tensor, ``None`` where it has none."""
        path = self._files.get(name)
        if path is None:
            return None
        with self._lock:
            if path not in self._recent:
                with np.load(path, allow_pickle=False) as arrays:
                    self._recent[path] = Feedback(**{key: arrays[key] for key in arrays.files})
            self._recent.move_to_end(path)
            while len(self._recent) > _IN_MEMORY:
                self._recent.popitem(last=False)
            return self._recent[path]

    @property
    def names(self) -> Collection[str]:
        """Tensors that have factors."""
        return self._files.keys()
