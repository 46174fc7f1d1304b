from typing_extensions import Buffer

def round_rows(
    rows: Buffer,
    upper: Buffer,
    variances: Buffer,
    type_name: str,
    n_descents: int,
    codes: Buffer,
    s: Buffer,
    m: Buffer,
    d: Buffer,
    dmin: Buffer,
    errors: Buffer,
    variant: str,
) -> None: ...
def variants() -> list[str]: ...
