"""Files of Hugging Face repositories: from the cache where it holds them whole, else from the hub.

What will be downloaded is said before, with its size; afterwards every file is compared with the checksum that the hub
lists for the commit, and from then on no network is needed.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import requests
from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

PATIENCE = 10.0  # seconds that the hub has to answer
OFFLINE = "bookworm"  # the model that comes with this repository


class Damaged(ValueError):
    """A file that is there, but broken; the message says which, and why."""


def snapshot(
    what: str,
    hub_ids: Sequence[str],
    revision: str | None,
    files: list[str],
    checked: Callable[[Path], Path],
    unread: list[str] | None = None,
) -> Path:
    """What `checked` makes of the folder with these files of a repository: from the cache, else downloaded.

    `checked` raises ValueError for a folder that lacks something, `Damaged` for a broken file: then the hub comes next,
    and gives what is damaged anew. Raises OSError that names `what` and the reasons when neither has it whole.
    """
    wanted = {"revision": revision, "allow_patterns": files, "ignore_patterns": unread}
    reasons: list[str] = []
    damaged: set[str] = set()
    for fetched in (_cached, _downloaded):
        for hub_id in hub_ids:
            try:
                return checked(fetched(what, hub_id, wanted, hub_id in damaged))
            except Damaged as error:
                damaged.add(hub_id)
                reasons.append(str(error))
            except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
                reasons += _reason(error, hub_id)
    raise OSError(
        f"{what} cannot be loaded: {' and '.join(hub_ids)} at revision {revision or 'main'} is neither in the Hugging "
        f"Face cache nor to be had from the hub ({'; '.join(dict.fromkeys(reasons))}). Check the name and the "
        f"connection, download it once where there is one, or work offline with {OFFLINE!r}, which comes with this "
        "repository."
    )


def cache_folder() -> Path:
    """Where the Hugging Face cache is, whether it exists or not."""
    return Path(constants.HF_HUB_CACHE)


def check_weights(file: Path) -> None:
    """Raises Damaged for a safetensors file that is cut off, or is none; reads no more than its header."""
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{file} is damaged ({error})") from error


def _cached(what: str, hub_id: str, wanted: dict, anew: bool) -> Path:
    return Path(snapshot_download(hub_id, local_files_only=True, **wanted))


def _downloaded(what: str, hub_id: str, wanted: dict, anew: bool) -> Path:
    """The folder after a download of what is missing (of everything, with `anew`), told before and checked after."""
    if is_offline_mode():
        raise ConnectionError("HF_HUB_OFFLINE forbids a download")
    requests.head(constants.ENDPOINT, timeout=PATIENCE)  # huggingface_hub itself would wait for it forever
    listed = snapshot_download(hub_id, dry_run=True, force_download=anew, tqdm_class=_NoBar, **wanted)
    coming = [file for file in listed if file.will_download]
    size, cache = sum(file.file_size or 0 for file in coming), cache_folder()
    if coming:
        _check_room(size, cache)
        commit = coming[0].commit_hash
        print(
            f"{what}: {_amount(len(coming), 'file')}, {_bytes(size)}, will be downloaded from {hub_id} at revision "
            f"{commit[:12]} into {cache}, once.",
            file=sys.stderr,
            flush=True,
        )
    folder = Path(snapshot_download(hub_id, force_download=anew, **wanted))
    if coming:
        _check_sums(hub_id, folder)
    return folder


def _check_sums(hub_id: str, folder: Path) -> None:
    """Raises Damaged when a file is not what the hub lists for the commit, and takes it out of the cache."""
    broken = [each["path"] for each in HfApi().verify_repo_checksums(hub_id, revision=folder.name).mismatches]
    for name in broken:
        (folder / name).resolve().unlink()
        (folder / name).unlink(missing_ok=True)  # the link to it
    if broken:
        raise Damaged(f"{', '.join(broken)} of {hub_id} came with another checksum than the hub lists")


def _check_room(size: int, cache: Path) -> None:
    """Raises OSError when the disk with the cache has no room for so many bytes."""
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if (free := shutil.disk_usage(there).free) < size:
        raise OSError(f"{_bytes(size)} are needed in {cache}, and {_bytes(free)} are free: set HF_HOME to another disk")


def _reason(error: Exception, hub_id: str) -> list[str]:
    """Why a repository was not to be had, in words; nothing for one that is just not in the cache."""
    match error:
        case DryRunError() if isinstance(error.__cause__, OSError):
            return _reason(error.__cause__, hub_id)
        case GatedRepoError():
            page = f"{constants.ENDPOINT}/{hub_id}"
            return [f"{hub_id} is gated: consent to its licence on {page}, then log in with `hf auth login`"]
        case RepositoryNotFoundError():
            return [f"the hub has no {hub_id}, or keeps it private"]
        case RevisionNotFoundError():
            return [f"the hub has no such revision of {hub_id}"]
        case IncompleteSnapshotError():
            return [f"the cache holds only a part of {hub_id}"]
        case LocalEntryNotFoundError():
            return []
        case ValueError():
            return [str(error)]
    return [f"{type(error).__name__}: {str(error).strip() or error!r}".splitlines()[0]]


def _amount(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000


class _NoBar(tqdm):
    """No progress bar: none is needed for a list."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **(settings | {"disable": True}))
