"""The matrices of a layer in float32, slab by slab, decoded once if memory allows."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor

from ..records import Float32, Tensor
from ..system.resources import available_memory_bytes

HELD_SHARE = 0.25  # of the available memory, for the decoded weights of one layer

Slab = tuple[int, int]


def held_bytes(n_weights: int) -> int:
    """Return the bytes of decoded weights if they may be cached; 0 if they take too much memory."""
    n_bytes, available = 4 * n_weights, available_memory_bytes()
    return n_bytes if available is None or n_bytes <= HELD_SHARE * available else 0


def slabs(tensor: Tensor) -> list[Slab]:
    """Return the row ranges ``(start, stop)`` of the slabs of a matrix."""
    return [(rows.start, rows.stop) for rows in tensor.row_slices()]


class LayerWeights:
    """Rows of matrices while one layer is computed.

    With ``is_held``, every slab is decoded once and cached (4 bytes per weight); without, on every use.
    """

    def __init__(self, is_held: bool = False) -> None:
        self._is_held = is_held
        # By the id of the view, not its name, which views of one stored tensor share; the entry keeps the view alive,
        # so that its id stays unique.
        self._decoded: dict[tuple[int, Slab], tuple[Tensor, Float32]] = {}

    def decode(self, weights: Iterable[Tensor], pool: Executor) -> None:
        """Decode the slabs of matrices that are not cached yet, in the threads of a pool; nothing without ``is_held``.

        Threads that need the same slab at the same time would each decode it.
        """
        if self._is_held:
            wanted = [(weight, slab) for weight in weights for slab in slabs(weight)]
            for _ in pool.map(lambda part: self.rows(*part), wanted):
                pass

    def rows(self, weight: Tensor, slab: Slab) -> Float32:
        """Return a slab of a matrix, ``(stop - start, n_cols)`` float32; read-only."""
        key = id(weight), slab
        if key in self._decoded:
            return self._decoded[key][1]
        rows = weight.rows(slice(*slab))
        if self._is_held:
            self._decoded[key] = weight, rows
        return rows
