"""A layer's matrices in float32, slab by slab, decoded once where memory allows."""

from __future__ import annotations

from ..records import Float32, Tensor
from ..system.resources import available_memory_bytes

HELD_SHARE = 0.25  # of the memory available, that the decoded weights of one layer may take

Slab = tuple[int, int]


def held_bytes(n_weights: int) -> int:
    """Return what so many weights take decoded where they are held, else 0: where they would take too much memory."""
    n_bytes, available = 4 * n_weights, available_memory_bytes()
    return n_bytes if available is None or n_bytes <= HELD_SHARE * available else 0


def slabs(tensor: Tensor) -> list[Slab]:
    """Return the row ranges ``(start, stop)`` in which a matrix is read."""
    return [(rows.start, rows.stop) for rows in tensor.row_slices()]


class LayerWeights:
    """Rows of matrices, for as long as one layer is computed.

    With ``is_held`` every slab is decoded on first use and kept: 4 bytes a weight. Without, it is decoded on every use.
    Threads may ask for different slabs at the same time.
    """

    def __init__(self, is_held: bool = False) -> None:
        self._is_held = is_held
        # A view's rows by the view itself, which is kept so that its id stays its own: views of one stored tensor have
        # its name.
        self._decoded: dict[tuple[int, Slab], tuple[Tensor, Float32]] = {}

    def rows(self, weight: Tensor, slab: Slab) -> Float32:
        """Return a slab of a matrix, ``(stop - start, n_cols)`` float32, not to be written to."""
        key = id(weight), slab
        if key in self._decoded:
            return self._decoded[key][1]
        rows = weight.rows(slice(*slab))
        if self._is_held:
            self._decoded[key] = weight, rows
        return rows
