"""Records of what metrics find in each layer, from which interrupted scoring resumes; see ``system.store``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from ..system.store import Store
from ..system.workers import AHEAD, Result, Task, Workers
from .nsds import Sensitivity


@dataclass(frozen=True)
class RecordedWorkers:
    """``Workers`` that record the results of a metric, a layer per task, and do not run tasks with a record again.

    Attributes:
        workers: run the tasks.
        store: of the metric and its options.

    """

    workers: Workers
    store: Store

    @property
    def slab_bytes(self) -> int:
        """See ``Workers``."""
        return self.workers.slab_bytes

    def check_sees(self, folder: Path) -> None:
        """See ``Workers``."""
        self.workers.check_sees(folder)

    def ordered(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], *, ahead: int = AHEAD, is_large: bool = False
    ) -> Generator[tuple[Task, Result], None, None]:
        """See ``Workers``; results are numbers, or ``Sensitivity`` by component."""
        every = list(tasks)
        kept = [_decoded(value) for value in self._kept(len(every))]
        names = [_name(index) for index in range(len(kept))]
        self.store.tell_kept("scored layers", names, len(every))
        yield from zip(every, kept, strict=False)
        rest = self.workers.ordered(function, every[len(kept) :], ahead=ahead, is_large=is_large)
        with closing(rest) as scored:
            for index, (task, result) in zip(count(len(kept)), scored):
                self.store.put(_name(index), _encoded(result))
                yield task, result

    def _kept(self, n_layers: int) -> list[Any]:
        """Return the records of the layers, from the first on."""
        found = (self.store.get(_name(index)) for index in range(n_layers))
        return list(takewhile(lambda value: value is not None, found))


def _name(layer: int) -> str:
    return f"scored layers/{layer}"


def _encoded(result: Any) -> Any:
    if isinstance(result, dict):
        return {name: asdict(value) for name, value in result.items()}
    return float(result)


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: Sensitivity(**parts) for name, parts in value.items()}
    return value
