"""Upload a bundle to a repository of the Hugging Face Hub (extra ``hub``).

A repository that does not exist is created, private by default. All files go in one commit on top of the state that was
compared, so that nothing is replaced unseen: a file of the same name and other bytes stops the upload, unless forced.
Models over 50 GB are split as llama.cpp splits them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ..errors import OutputError
from ..llamacpp.gguf_split import write_parts
from ..session.run import Reporter
from ..system.resources import check_disk
from ..system.workfolder import WorkFolder, output_error
from .bundle import CARD, MODELFILE, SUMS, Bundle, sum_line

LARGEST_FILE_BYTES = 50 * 10**9  # the Hub's limit of a file
_HASHED_BYTES = 1 << 20

# Ends the message of a failed request after the bundle has been written.
_BUNDLE_IS_COMPLETE = "; the bundle is complete: run `nsds-gguf bundle` with --force and --upload to send it again"

State = Literal["new", "unchanged", "replaced"]


@dataclass(frozen=True)
class Upload:
    """What was uploaded, or in a dry run would be.

    Attributes:
        repo: the repository, ``ORG/NAME``.
        url: its address, or that of the commit.
        is_new: whether the repository was created.
        is_private: whether it was created private; ``None`` for one that existed, which stays as it is.
        files: bytes by name.
        states: what happens to each in the repository.
        is_dry_run: whether nothing was sent.
    """

    repo: str
    url: str
    is_new: bool
    is_private: bool | None
    files: dict[str, int]
    states: dict[str, State]
    is_dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Destination:
    """Where a bundle goes, and how.

    Attributes:
        repo: the repository, ``ORG/NAME``.
        is_public: whether a new repository is public.
        force: whether files of the same name and other bytes are replaced.
        is_dry_run: compare and report, send nothing.
    """

    repo: str
    is_public: bool = False
    force: bool = False
    is_dry_run: bool = False


def check_upload(repo: str) -> None:
    """Raise ``OutputError`` when nothing can be uploaded: no library, no token, or one that the Hub refuses."""
    library = _library(repo)
    with _plain_errors(repo, library):
        if not library.get_token():
            raise OutputError(f"--upload {repo}: no Hub token found: run `hf auth login`, or set HF_TOKEN")
        library.HfApi().whoami()


def upload(bundle: Bundle, where: Destination, report: Reporter) -> Upload:
    """Upload a bundle, or compare it with the repository in a dry run.

    Raises:
        OutputError: a file of the same name and other bytes is there and ``force`` is not set, the library or a token
            is missing, the disk has no room for parts, or the Hub refuses; the bundle itself stays complete.

    """
    library = _library(where.repo)
    with WorkFolder(bundle.folder) as work:
        try:
            files = _files(bundle, work, report)
        except OSError as error:
            raise output_error(work.path / bundle.gguf.name, error) from error
        with _plain_errors(where.repo, library, _BUNDLE_IS_COMPLETE):
            return _compare_and_send(library, where, files, report)


def _compare_and_send(library: ModuleType, where: Destination, files: Mapping[str, Path], report: Reporter) -> Upload:
    api = library.HfApi()
    head = _head(api, library, where.repo)
    with report.stage("compare with the Hub"):
        states = _states({} if head is None else _there(api, where.repo, files), files)
    _check_states(where, states)
    url = f"{library.constants.ENDPOINT}/{where.repo}"
    if not where.is_dry_run:
        changed = {name: path for name, path in files.items() if states[name] != "unchanged"}
        url = _send(library, where, changed, head, report)
    return Upload(
        repo=where.repo,
        url=url,
        is_new=head is None,
        is_private=None if head is not None else not where.is_public,
        files={name: path.stat().st_size for name, path in files.items()},
        states=states,
        is_dry_run=where.is_dry_run,
    )


def _files(bundle: Bundle, work: WorkFolder, report: Reporter) -> dict[str, Path]:
    """Return the files to upload by name: a model over the limit in parts, with a card and sums that name the parts.

    Ollama does not read parts, so the Modelfile is left out with them.
    """
    files = {name: bundle.folder / name for name in (*bundle.sha256, SUMS)}
    n_bytes = bundle.gguf.stat().st_size
    if n_bytes <= LARGEST_FILE_BYTES:
        return files
    check_disk(bundle.folder, n_bytes, "the model in parts")
    with report.stage("split") as progress:
        parts = write_parts(bundle.gguf, work.path, LARGEST_FILE_BYTES, progress)
    del files[bundle.gguf.name], files[MODELFILE]
    card, sums = work.path / CARD, work.path / SUMS
    text = files[CARD].read_text(encoding="utf-8").replace(bundle.gguf.name, parts[0].name)
    card.write_text(text, encoding="utf-8", newline="\n")
    files = {**{part.name: part for part in parts}, **files, CARD: card}
    del files[SUMS]
    digests = {name: _digest(path) for name, path in files.items()}
    sums.write_text("".join(map(sum_line, digests, digests.values())), encoding="utf-8", newline="\n")
    return {**files, SUMS: sums}


def _head(api: Any, library: ModuleType, repo: str) -> str | None:
    """Return the commit that the repository is at, ``None`` if this token sees none."""
    try:
        return str(api.repo_info(repo).sha)
    except library.errors.RepositoryNotFoundError:
        return None


def _there(api: Any, repo: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """Return the repository's record of every file that it has under the same name."""
    return {info.path: info for info in api.get_paths_info(repo, list(files))}


def _states(there: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, State]:
    """Return what would happen to each file: large files are compared by SHA-256, others by git's SHA-1."""
    states: dict[str, State] = {}
    for name, path in files.items():
        info = there.get(name)
        if info is None:
            states[name] = "new"
            continue
        is_same = info.size == path.stat().st_size and (
            info.lfs.sha256 == _digest(path) if info.lfs is not None else info.blob_id == _git_digest(path)
        )
        states[name] = "unchanged" if is_same else "replaced"
    return states


def _check_states(where: Destination, states: Mapping[str, State]) -> None:
    replaced = [name for name, state in states.items() if state == "replaced"]
    if replaced and not where.force and not where.is_dry_run:
        raise OutputError(
            f"--upload {where.repo}: has {', '.join(replaced)} with other bytes; pass --force to replace "
            f"{'it' if len(replaced) == 1 else 'them'}, or name another repository"
        )


def _send(
    library: ModuleType, where: Destination, files: Mapping[str, Path], head: str | None, report: Reporter
) -> str:
    """Create the repository if there is none, send the files in one commit, and return its address."""
    api = library.HfApi()
    if head is None:
        api.create_repo(where.repo, private=not where.is_public)
        head = str(api.repo_info(where.repo).sha)
    if not files:
        return f"{library.constants.ENDPOINT}/{where.repo}"
    additions = [library.CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    with report.stage("upload"):
        found = api.create_commit(
            where.repo, additions, commit_message="Upload with nsds-gguf", parent_commit=head
        )  # fmt: skip
    return str(found.commit_url)


def _digest(path: Path) -> str:
    return _hashed(path, hashlib.sha256())


def _git_digest(path: Path) -> str:
    """Return the SHA-1 by which git names the content of a file."""
    return _hashed(path, hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False))


def _hashed(path: Path, digest: Any) -> str:
    with path.open("rb") as stream:
        while data := stream.read(_HASHED_BYTES):
            digest.update(data)
    return str(digest.hexdigest())


def _library(repo: str) -> ModuleType:
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors, utils  # noqa: F401  (attributes that are loaded lazily)
    except ImportError as error:
        raise OutputError(f"--upload {repo} needs huggingface_hub; run: pip install 'nsds-gguf[hub]'") from error
    utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    library: ModuleType = huggingface_hub
    return library


@contextmanager
def _plain_errors(repo: str, library: ModuleType, ending: str = "") -> Iterator[None]:
    """Convert errors of the library and its HTTP client to one line that says what to do, with an ending if unknown."""
    errors = library.errors
    transport = errors.HfHubHTTPError.__bases__[0]  # base class of the HTTP client, which depends on the version
    try:
        yield
    except (transport, errors.HFValidationError, OSError, ValueError, RuntimeError) as error:
        raise OutputError(f"--upload {repo}: {_reason(library, error, ending)}") from error


def _reason(library: ModuleType, error: Exception, ending: str) -> str:
    endpoint = library.constants.ENDPOINT
    answers = (getattr(each, "response", None) for each in (error, error.__cause__))
    status = next((answer.status_code for answer in answers if answer is not None), None)
    if status in (401, 403):
        return f"{endpoint} refuses access ({status}): wanted a token with write access in HF_TOKEN, or `hf auth login`"
    if status in (409, 412):
        return f"the repository changed meanwhile ({status}): run the command again"
    said = f"status {status}" if status else next(iter(str(error.__cause__ or error).splitlines()), repr(error))
    return f"a request to {endpoint} failed: {said}{ending}"
