"""Download models of the Hugging Face Hub into the cache of ``huggingface_hub`` (extra ``hub``).

The library manages the cache, resumes broken downloads and reads the environment: ``HF_TOKEN``, ``HF_ENDPOINT``,
``HF_HOME``, ``HF_HUB_OFFLINE``. This module selects the files and explains errors. It downloads settings and tokenizer
first, so that an unsupported model costs no download of weights.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ModelError, OutputError, UnsupportedError
from ..records import Progress, no_progress
from ..system.resources import check_disk
from . import check_supported
from .checkpoint import FORMATS, read_index

# Files beside the weights, chat templates in subfolders included; never code, nor weights in other formats.
SMALL_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template"
    r"|preprocessor_config|processor_config)\.json"
    r"|tokenizer\.model|merges\.txt|chat_template\.jinja|additional_chat_templates/\w[\w.-]*\.jinja|README\.md"
)

_ID = r"(?P<repo>\w[\w.-]*/\w[\w.-]*)"
_PLAIN = re.compile(rf"{_ID}(:(?P<file>.+\.gguf))?", re.ASCII)
_URL = re.compile(
    rf"https?://(huggingface\.co|hf\.co)/{_ID}(/(tree|blob|resolve)/(?P<revision>[^/?]+)(/(?P<file>.+\.gguf))?)?/?",
    re.ASCII,
)
_PATH = re.compile(r"\w[\w+.-]*(/\w[\w+.-]*)*", re.ASCII)  # a relative path without ..
_SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class HubName:
    """A model on the Hub: ``ORG/MODEL``, a branch, tag or commit, and a file in a repository of GGUFs."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


def parse_name(text: str, revision: str | None = None) -> HubName | None:
    """Parse the name of a Hub model; ``None`` for a local path.

    ``hf:ORG/MODEL`` and ``https://huggingface.co/ORG/MODEL`` always name a Hub model, ``ORG/MODEL`` only if neither
    that path nor a folder ``ORG`` exists; ``:FILE.gguf`` may follow.

    Raises ``ModelError`` for a prefix without a name, two revisions, or an invalid file name.
    """
    prefix, plain = text.partition(":")[0], text.removeprefix("hf:")
    is_marked = prefix in ("hf", "http", "https")
    match = _URL.fullmatch(plain) or _PLAIN.fullmatch(plain)
    if match is None or (prefix == "hf" and "://" in plain):
        if is_marked:
            raise ModelError(f"{text}: wanted hf:ORG/MODEL or https://huggingface.co/ORG/MODEL")
        return None
    parts = match.groupdict()
    if not is_marked and (Path(plain.split("/")[0]).exists() or parts["repo"].endswith(".gguf")):
        return None
    if revision and parts.get("revision"):
        raise ModelError(f"{text}: names a revision, --revision {revision} another; give one")
    if parts["file"] is not None and not _PATH.fullmatch(parts["file"]):
        raise ModelError(f"{text}: wanted the name of a GGUF file of the repository after the colon")
    return HubName(parts["repo"], revision or parts.get("revision"), parts["file"])


def fetch(name: HubName, progress: Progress = no_progress) -> Path:
    """Download the needed files of a model unless cached; return its folder or GGUF file.

    Raises:
        ModelError: the library is missing, or the model is not available; the message says what to do.
        UnsupportedError: the model cannot be converted; downloads no weights then.
        OutputError: the disk is too small, or full.

    """
    library = _library(name)
    with _plain_errors(name, library):
        if library.constants.HF_HUB_OFFLINE:
            return _cached(name, library)
        found = library.HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in found.siblings or () if _PATH.fullmatch(file.rfilename)}
        download = _Download(name, sizes, library, progress)
        if name.file is not None:
            return download.files(_gguf_parts(name, sizes))[0]
        if "config.json" not in sizes:
            raise _no_model(name, sizes)
        folder = download.files(sorted(filter(SMALL_FILES.fullmatch, sizes)))[0].parent
        check_supported(folder, getattr(found.safetensors, "parameters", ()))
        download.files(_weight_files(name, sizes, lambda index: download.files([index])[0]))
        download.check_one_commit()
    return folder


class _Download:
    """Sequential download of the files of one repository; progress counts bytes."""

    def __init__(self, name: HubName, sizes: dict[str, int], library: ModuleType, progress: Progress) -> None:
        self.name, self.sizes, self.library, self.progress = name, sizes, library, progress
        self.folders: set[Path] = set()

    def files(self, names: Sequence[str]) -> list[Path]:
        """Download files and return their paths; raise ``OutputError`` when the disk has no room for them."""
        self._check_disk(names)
        total, done, paths = sum(self.sizes[file] for file in names), 0, []
        for file in names:
            bar = _bar(partial(self._report, done, done + self.sizes[file], total))
            path = self.library.hf_hub_download(self.name.repo, file, revision=self.name.revision, tqdm_class=bar)
            paths.append(Path(path))
            self.folders.add(Path(path.removesuffix(file)))
            done += self.sizes[file]
            self.progress(done, total)
        return paths

    def _report(self, done: int, end: int, total: int, n_bytes: int) -> None:
        """Report bytes of one file, at most its size: the library counts from 0 again after a restart."""
        self.progress(min(done + n_bytes, end), total)

    def _check_disk(self, names: Iterable[str]) -> None:
        cache = Path(self.library.constants.HF_HUB_CACHE)
        missing = sum(self.sizes[file] for file in names if not isinstance(self._cached(file), str))
        existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
        check_disk(existing, missing, f"the download of {self.name} to {cache} (set HF_HOME to change the place)")

    def _cached(self, file: str) -> Any:
        return self.library.try_to_load_from_cache(self.name.repo, file, revision=self.name.revision)

    def check_one_commit(self) -> None:
        """Raise ``ModelError`` when the repository changed during the download: each commit has its own folder."""
        if len(self.folders) > 1:
            raise ModelError(f"{self.name}: the repository changed during the download: run the command again")


def _bar(report: Callable[[int], None]) -> type[Any]:
    """Return a progress bar class for the library that draws nothing and reports bytes so far."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # mypy ignores the library's types, see pyproject.toml
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self.n_done = int(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            self.n_done += int(n or 0)
            report(self.n_done)

        def update_transfer(self, n: float | None = 1) -> None:
            """Ignore bytes on the wire, which the library counts in addition to bytes on disk."""

    return Bar


def _library(name: HubName) -> ModuleType:
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors, utils  # noqa: F401  (attributes that are loaded lazily)
    except ImportError as error:
        raise ModelError(
            f"{name}: no such folder; to download the model of this name run `pip install 'nsds-gguf[hub]'`"
        ) from error
    if "HF_HUB_VERBOSITY" not in os.environ:
        utils.logging.set_verbosity_error()  # after its warnings, it retries or raises
    library: ModuleType = huggingface_hub
    return library


def _cached(name: HubName, library: ModuleType) -> Path:
    found = library.try_to_load_from_cache(name.repo, name.file or "config.json", revision=name.revision)
    if not isinstance(found, str):
        raise ModelError(
            f"{name}: is not in the cache {library.constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids the download: "
            "unset it"
        )
    return Path(found) if name.file is not None else Path(found).parent


def _weight_files(name: HubName, sizes: Iterable[str], download: Callable[[str], Path]) -> list[str]:
    """Return the files of the first format that ``open_checkpoint`` would use; ``download`` fetches the index."""
    for single, index, _ in FORMATS:
        if single in sizes:
            return [single]
        if index in sizes:
            shards = sorted(set(read_index(download(index)).values()))
            missing = [shard for shard in shards if shard not in sizes]
            if missing:
                raise ModelError(f"{name}: {index} names {missing[0]}, which is not in the repository")
            return shards
    raise _no_model(name, sizes)


def _gguf_parts(name: HubName, sizes: Iterable[str]) -> list[str]:
    """Return the named file, or all parts of a split one, the named part first."""
    wanted = str(name.file)
    if wanted not in sizes:
        raise ModelError(f"{name}: no such file in the repository; its GGUF files: {_some(_ggufs(sizes)) or 'none'}")
    split = _SPLIT.fullmatch(wanted)
    if split is None:
        return [wanted]
    n_parts = int(split[2])
    parts = [f"{split[1]}-{i + 1:05d}-of-{split[2]}.gguf" for i in range(n_parts)]
    missing = [part for part in parts if part not in sizes]
    if missing:
        raise ModelError(f"{name}: part {missing[0]} is not in the repository")
    return [wanted, *(part for part in parts if part != wanted)]


def _no_model(name: HubName, sizes: Iterable[str]) -> UnsupportedError:
    ggufs = _ggufs(sizes)
    if ggufs:
        return UnsupportedError(f"{name}: a repository of GGUF files; name one, as {name}:{ggufs[0]}: {_some(ggufs)}")
    return UnsupportedError(
        f"{name}: wanted config.json with safetensors or pytorch_model.bin; the repository holds "
        f"{_some(sorted(sizes)) or 'no files'}"
    )


def _ggufs(sizes: Iterable[str]) -> list[str]:
    return sorted(file for file in sizes if file.endswith(".gguf"))


def _some(names: Sequence[str], n_shown: int = 10) -> str:
    more = f", … ({len(names) - n_shown} more)" if len(names) > n_shown else ""
    return ", ".join(names[:n_shown]) + more


@contextmanager
def _plain_errors(name: HubName, library: ModuleType) -> Iterator[None]:
    """Convert errors of the library and its HTTP client to one line that says what to do."""
    errors = library.errors
    transport = errors.HfHubHTTPError.__bases__[0]  # base class of the HTTP client, which depends on the version
    try:
        yield
    except OSError as error:
        raise _explained(name, library, error) from error
    except (transport, errors.HFValidationError) as error:
        raise _explained(name, library, error) from error


def _explained(name: HubName, library: ModuleType, error: Exception) -> ModelError | OutputError:
    errors, endpoint = library.errors, library.constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        advice = f"accept its terms at {endpoint}/{name.repo}, then `hf auth login` or set HF_TOKEN"
        return ModelError(f"{name}: is gated: {advice}")
    if isinstance(error, errors.RepositoryNotFoundError):
        advice = "check the name, or for a private one `hf auth login` or set HF_TOKEN"
        return ModelError(f"{name}: no such folder here, and no such model on {endpoint}: {advice}")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(f"{name}: {name.repo} has no such branch, tag or commit")
    if status in (401, 403):
        return ModelError(f"{name}: {endpoint} refuses access ({status}): check the token in HF_TOKEN")
    if isinstance(error, errors.HFValidationError):
        return ModelError(f"{name}: not a valid model name: {error}")
    if getattr(error, "errno", None) == errno.ENOSPC:
        return OutputError(f"{name}: no space left in {library.constants.HF_HUB_CACHE}: make room or set HF_HOME")
    reason = f"status {status}" if status else next(iter(str(error.__cause__ or error).splitlines()), repr(error))
    return ModelError(
        f"{name}: no such folder here, and the download from {endpoint} failed: {reason}: check the connection and run "
        "the command again; files that have arrived are kept"
    )
