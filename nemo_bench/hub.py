"""What the hub of Hugging Face has and what of it was downloaded before. A network that is away is noticed at once."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nemo_bench.errors import ModelError, PromptError

PATIENCE = 8.0
"""Seconds until a hub that gives no answer counts as out of reach; its own client would try for half a minute."""
_BUSY = {429, 500, 502, 503, 504}
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repository:
    """A repository of the hub at one commit.

    Attributes:
        place: Its id.
        commit: The commit.
        files: Paths of its files; where the hub was not asked, of those that were downloaded.
        offline: Whether the hub was not asked, or gave no answer.
    """

    place: str
    commit: str
    files: frozenset[str]
    offline: bool

    def has_downloaded(self, name: str) -> bool:
        """Whether a file, by its path in the repository, was downloaded before."""
        return isinstance(try_to_load_from_cache(self.place, name, revision=self.commit), str)

    def get(self, name: str) -> Path:
        """A file, downloaded where need be.

        Args:
            name: Its path in the repository.

        Raises:
            ModelError: It can't be had; the message says why.
        """
        try:
            return Path(hf_hub_download(self.place, name, revision=self.commit, local_files_only=self.offline))
        except (HfHubHTTPError, EntryNotFoundError) as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise ModelError(f"{name} was not downloaded; {_advice()}") from error
            raise ModelError(_refusal(self.place, self.commit, error)) from error


def look(
    place: str, revision: str | None = None, *, local_files_only: bool = False, or_downloaded: bool = True
) -> Repository:
    """Looks a repository up, on the hub or, if that is not wanted or out of reach, among what was downloaded.

    Args:
        place: Its id.
        revision: Commit, tag or branch; None for the main branch.
        local_files_only: Never ask the hub.
        or_downloaded: Whether what was downloaded will do where the hub is out of reach.

    Raises:
        ModelError: There is none, access is refused, or the hub is out of reach and nothing was downloaded; the caller
            says before it what was looked for.
    """
    away: Exception | None = None
    if not local_files_only and not is_offline_mode():
        try:
            info = _in_time(lambda: HfApi().model_info(place, revision=revision, timeout=PATIENCE))
            files = frozenset(file.rfilename for file in info.siblings or ())
            return Repository(place, str(info.sha), files, offline=False)
        except HfHubHTTPError as error:
            if error.response.status_code not in _BUSY:
                raise ModelError(_refusal(place, revision, error)) from error
            away = error
        except Exception as error:  # of whichever client the hub's library uses
            away = error
    folder = _downloaded(place, revision) if or_downloaded or away is None else None
    if folder is None:
        at = f" at '{revision}'" if revision else ""
        if away is None:
            raise ModelError(f"it can't be found{at} among the downloaded models; {_advice()}")
        raise ModelError(
            f"the network is unreachable, {constants.ENDPOINT} gives no answer ({_first_line(away)}), and it was not "
            f"downloaded{at} before; {_advice()}"
        ) from away
    if away is not None:
        _log.warning(
            "the network is unreachable (%s): '%s' is taken from %s, commit %s; with model.local_files_only=true no "
            "network is asked",
            _first_line(away),
            place,
            _folder(),
            folder.name,
        )
    files = frozenset(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    return Repository(place, folder.name, files, offline=True)


def check_data_set(place: str) -> None:
    """Makes sure that a data set of the hub can be had, at once; its own library would try for half a minute.

    Args:
        place: Its id.

    Raises:
        PromptError: There is none, access is refused, or the hub is out of reach.
    """
    if is_offline_mode():
        return
    try:
        _in_time(lambda: HfApi().dataset_info(place, timeout=PATIENCE))
    except HfHubHTTPError as error:
        raise PromptError(_refusal(f"datasets/{place}", None, error)) from error
    except Exception as error:  # of whichever client the hub's library uses
        raise PromptError(
            f"the network is unreachable, {constants.ENDPOINT} gives no answer ({_first_line(error)}); with "
            "HF_HUB_OFFLINE=1 what was downloaded before is taken"
        ) from error


def _in_time(ask: Callable[[], _T]) -> _T:
    """What a question is answered with; a firewall that swallows packets would hold it up once for each address."""
    answers: queue.Queue[tuple[_T | None, Exception | None]] = queue.Queue()

    def answer() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=answer, daemon=True).start()
    try:
        found, error = answers.get(timeout=PATIENCE)
    except queue.Empty:
        raise TimeoutError(f"none within {PATIENCE:g} s") from None
    if error is not None:
        raise error
    return found  # type: ignore[return-value] # without an error there is an answer


def _downloaded(place: str, revision: str | None) -> Path | None:
    """Folder of what was downloaded of a revision, named by its commit; None where nothing was."""
    try:
        return Path(snapshot_download(place, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _folder() -> str:
    return f"the cache {constants.HF_HUB_CACHE}"


def _advice() -> str:
    return f"download it once where there is a connection and take {_folder()} along (HF_HOME moves it)"


def _refusal(place: str, revision: str | None, error: Exception) -> str:
    page = f"{constants.ENDPOINT}/{place}"
    if isinstance(error, GatedRepoError):
        return f"it is gated: accept its conditions at {page}, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "it can't be found on the hub; if it is private, log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision '{revision}'; see {page}/tree/main for those it has"
    return f"the hub refuses it ({_first_line(error)}); see {page}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
