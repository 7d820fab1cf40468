"""Repositories of the Hugging Face hub, online or as downloaded before; an unreachable network is noticed at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TypeVar

from nemo_bench.errors import ModelError, first_line

# huggingface_hub is imported where it is used: most commands never need it.

PATIENCE = 8.0
"""Seconds to wait for an answer of the hub; its own client would try for half a minute."""
_BUSY = {429, 500, 502, 503, 504}
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repository:
    """A repository of the hub, named by its id such as ``"user/name"``, at one commit, with the paths of its files.

    If ``offline``, the hub was not asked or did not answer, and the files are the downloaded ones.
    """

    place: str
    commit: str
    files: frozenset[str]
    offline: bool

    def has_downloaded(self, name: str) -> bool:
        """Whether a file, named by its path in the repository, is in the cache."""
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(self.place, name, revision=self.commit), str)

    def get(self, name: str) -> Path:
        """Downloads a file, named by its path in the repository, unless it is in the cache."""
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(hf_hub_download(self.place, name, revision=self.commit, local_files_only=self.offline))
        except errors.LocalEntryNotFoundError as error:
            raise ModelError(f"{name} was not downloaded; {_advice()}") from error
        except (errors.HfHubHTTPError, errors.EntryNotFoundError) as error:
            raise ModelError(_refusal(self.place, self.commit, error)) from error


def look(
    place: str, revision: str | None = None, *, local_files_only: bool = False, or_downloaded: bool = True
) -> Repository:
    """Looks a model repository up on the hub or, if that is unreachable or unwanted, in the cache.

    With ``local_files_only`` the hub is never asked, without ``or_downloaded`` the cache does not stand in for it. The
    message of a ModelError leaves it to the caller to name the repository.
    """
    from huggingface_hub import HfApi, constants, errors, is_offline_mode, snapshot_download

    unreachable: ConnectionError | None = None
    if not local_files_only and not is_offline_mode():
        try:
            info = _ask(place, revision, lambda: HfApi().model_info(place, revision=revision, timeout=PATIENCE))
            files = frozenset(file.rfilename for file in info.siblings or ())
            return Repository(place, str(info.sha), files, offline=False)
        except ConnectionError as error:
            unreachable = error
    folder = None
    if or_downloaded or unreachable is None:
        with suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
            folder = Path(snapshot_download(place, revision=revision, local_files_only=True))
    if folder is None:
        at = f" at '{revision}'" if revision else ""
        if unreachable is None:
            raise ModelError(f"it can't be found{at} among the downloaded models; {_advice()}")
        raise ModelError(f"{unreachable}, and it was not downloaded{at} before; {_advice()}") from unreachable
    if unreachable:
        msg = "%s: '%s' is taken from the cache %s, commit %s; with model.local_files_only=true no network is asked"
        _log.warning(msg, unreachable, place, constants.HF_HUB_CACHE, folder.name)
    files = frozenset(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return Repository(place, folder.name, files, offline=True)


def check_data_set(place: str) -> None:
    """Checks that a data set of the hub is available, else raises a ModelError; its own library takes far longer."""
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        return
    try:
        _ask(f"datasets/{place}", None, lambda: HfApi().dataset_info(place, timeout=PATIENCE))
    except ConnectionError as error:
        raise ModelError(f"{error}; with HF_HUB_OFFLINE=1 what was downloaded before is taken") from error


def _ask(place: str, revision: str | None, question: Callable[[], _T]) -> _T:
    """Asks the hub in a thread, since a firewall that swallows packets would delay every address by a time-out.

    That the hub refuses is a ModelError, that it gives no answer or is busy a ConnectionError.
    """
    from huggingface_hub import constants, errors

    answer: Future[_T] = Future()

    def run() -> None:
        try:
            answer.set_result(question())
        except Exception as error:
            answer.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return answer.result(PATIENCE)
    except Exception as error:  # of whichever client the hub's library uses
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code not in _BUSY:
            raise ModelError(_refusal(place, revision, error)) from error
        why = first_line(error) if answer.done() else f"none within {PATIENCE:g} s"
        raise ConnectionError(f"the network is unreachable, {constants.ENDPOINT} gives no answer ({why})") from error


def _advice() -> str:
    from huggingface_hub import constants

    cache = constants.HF_HUB_CACHE
    return f"download it once where there is a connection and take the cache {cache} along (HF_HOME moves it)"


def _refusal(place: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{place}"
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated: accept its conditions at {page}, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "it can't be found on the hub; if it is private, log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision '{revision}'; see {page}/tree/main for those it has"
    return f"the hub refuses it ({first_line(error)}); see {page}"
