from typing import Any

from numpy.typing import NDArray

def round_rows(
    rows: NDArray[Any],
    upper: NDArray[Any],
    variances: NDArray[Any],
    type_name: str,
    n_descents: int,
    codes: NDArray[Any],
    s: NDArray[Any],
    m: NDArray[Any],
    d: NDArray[Any],
    dmin: NDArray[Any],
    errors: NDArray[Any],
    variant: str,
) -> None: ...
def nearest_rows(
    rows: NDArray[Any],
    columns: NDArray[Any],
    type_name: str,
    codes: NDArray[Any],
    s: NDArray[Any],
    m: NDArray[Any],
    d: NDArray[Any],
    dmin: NDArray[Any],
    errors: NDArray[Any],
    variant: str,
) -> None: ...
def variants() -> list[str]: ...
