"""A folder as one commit to the Hub, tried again where that helps, and told plainly where it does not."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

logger = logging.getLogger(__name__)

WAITS = (1.0, 4.0, 16.0)
"""Seconds before each further attempt."""
LONGEST_WAIT = 60.0
"""Seconds that are waited because the Hub says so (`Retry-After`); it is not tried again when it asks for more."""
TIMEOUT = 120.0
"""Seconds without a byte after which a connection counts as dead; the client has no limit of its own."""
# The client's own errors and those of its HTTP library, whose name changes between versions of the client.
HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]
_TRANSIENT = {408, 409, 412, 429, 500, 502, 503, 504}
# Uploads before the commit: the client has already tried these several times by itself.
_TRIED_BY_CLIENT = re.compile(r"/preupload/|/info/lfs/|/xet-")


Result = TypeVar("Result")


class PushError(RuntimeError):
    """Nothing or not all reached the Hub; the message says why, and how to go on."""


@dataclass(frozen=True)
class Target:
    """Where on the Hub a folder goes.

    Args:
        repo_id: `OWNER/NAME`; `NAME` alone is the token owner's.
        repo_type: `model` or `dataset`.
        private: of a repository that is not there yet; None for the owner's default.
        revision: branch, made if it is not there; None for `main`.
        token: None for `HF_TOKEN` or the one that `hf auth login` stored.
        within: folder in the repository.
    """

    repo_id: str
    repo_type: str = "model"
    private: bool | None = None
    revision: str | None = None
    token: str | None = None
    within: str = ""


def publish(
    folder: Path,
    target: Target,
    *,
    message: str,
    replaces: str,
    source: str,
    again: str,
    api: HfApi | None = None,
    wait: Callable[[float], None] = time.sleep,
    timeout: float = TIMEOUT,
) -> CommitInfo:
    """Makes what is in `folder` the head of a branch, in one commit: a reader never sees half of it.

    A commit that the Hub already has is not made again, so an answer that is lost on its way costs nothing. `folder`
    is only read.

    Args:
        folder: files to push; symbolic links are followed.
        target: where to.
        message: of the commit.
        replaces: regular expression of files in the repository that are deleted unless they are pushed anew.
        source: what is pushed, for messages.
        again: the command that does this once more, for messages.
        api: client; default: one of the endpoint in `HF_ENDPOINT`.
        wait: called with seconds between attempts.
        timeout: seconds without a byte after which a connection counts as dead.

    Raises:
        PushError: it did not work, after up to four attempts where trying again helps.
    """
    api = api or client()

    def commit() -> CommitInfo:
        return _commit(api, folder, target, message, replaces)

    return persistently(commit, target, source=source, again=again, wait=wait, timeout=timeout)


def client() -> HfApi:
    """A client of the endpoint in `HF_ENDPOINT`."""
    return HfApi(library_name="hf-ema-scaling")


def persistently(
    action: Callable[[], Result],
    target: Target,
    *,
    source: str,
    again: str,
    wait: Callable[[float], None] = time.sleep,
    timeout: float = TIMEOUT,
) -> Result:
    """What `action` returns, which asks the Hub and may be done again; arguments and errors as for `publish`."""
    waits = iter(WAITS)
    while True:
        try:
            with _limited(timeout):
                return action()
        except (HTTPError, HFValidationError, OSError, RuntimeError, ValueError) as error:
            pause = _pause(error, waits)
            said, way_out = _told(error, target)
            if pause is None:
                raise PushError(
                    f"{source} was not pushed to {target.repo_id}: {said}. {way_out}. Nothing on this machine was "
                    f"changed. To push it again: {again}"
                ) from error
            logger.warning("Pushing %s to %s: %s; trying again in %g s.", source, target.repo_id, said, pause)
            wait(pause)


def _commit(api: HfApi, folder: Path, target: Target, message: str, replaces: str) -> CommitInfo:
    common = {"repo_type": target.repo_type, "token": target.token}
    created = api.create_repo(target.repo_id, private=target.private, exist_ok=True, **common)  # type: ignore[arg-type]
    repo_id = created.repo_id
    if target.revision not in (None, "main"):
        api.create_branch(repo_id, branch=str(target.revision), exist_ok=True, **common)  # type: ignore[arg-type]
    info = api.repo_info(repo_id, revision=target.revision, **common)  # type: ignore[arg-type]
    if target.private and not info.private:
        raise PushError("the repository is there already and is public")
    prefix = f"{target.within}/" if target.within else ""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    additions = [
        CommitOperationAdd(prefix + path.relative_to(folder).as_posix(), path_or_fileobj=path) for path in files
    ]
    added = {addition.path_in_repo for addition in additions}
    stale = [
        file.rfilename
        for file in getattr(info, "siblings", None) or []
        if file.rfilename not in added and re.fullmatch(re.escape(prefix) + f"(?:{replaces})", file.rfilename)
    ]
    return api.create_commit(
        repo_id,
        [*additions, *(CommitOperationDelete(name, is_folder=False) for name in stale)],
        commit_message=message,
        repo_type=target.repo_type,
        revision=target.revision,
        token=target.token,
        # What is deleted was decided at this commit.
        parent_commit=info.sha,
    )


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    client = get_session()
    before = client.timeout
    if before.read is None:
        client.timeout = seconds  # type: ignore[assignment]
    try:
        yield
    finally:
        client.timeout = before


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _retry_after(error: Exception) -> float:
    said = getattr(error, "response", None)
    try:
        return max(0.0, float(said.headers.get("Retry-After", 0))) if said is not None else 0.0
    except ValueError:  # a date
        return 0.0


def _pause(error: Exception, waits: Iterator[float]) -> float | None:
    """Seconds to wait before another attempt, None for no further attempt."""
    if not isinstance(error, HTTPError) or isinstance(error, OfflineModeIsEnabled):
        return None
    status = _status(error)
    if status is not None and (status not in _TRANSIENT or _retry_after(error) > LONGEST_WAIT):
        return None
    if _TRIED_BY_CLIENT.search(_address(error)):
        return None
    planned = next(waits, None)
    return None if planned is None else max(planned, _retry_after(error))


def _address(error: Exception) -> str:
    try:
        return str(getattr(error, "response", error).request.url)  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):  # the HTTP library's way to say that it is not known
        return ""


def _told(error: Exception, target: Target) -> tuple[str, str]:
    """What happened, and what to do."""
    status = _status(error)
    server = str(getattr(error, "server_message", None) or "").strip().rstrip(".")
    said = f" ({server})" if server else ""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set", "Unset it to push"
    if isinstance(error, HFValidationError):
        return f"{target.repo_id!r} is no name for a repository ({error})".rstrip("."), "Give OWNER/NAME"
    if isinstance(error, PushError):
        return str(error), "Make it private on the Hub, choose another name, or leave --private out"
    if status == 401:
        return (
            f"the Hub refused the token, or there is none (401{said})",
            "Set HF_TOKEN to a token that may write, or run `hf auth login`",
        )
    if status == 403:
        return (
            f"the token may not write there (403{said})",
            f"Use a token with write access to the namespace of {target.repo_id}, or a name of your own",
        )
    if status == 404:
        where = f"branch {target.revision!r} of it" if target.revision else "it"
        return f"the Hub does not find {where} (404{said})", "Check the name, and whether the token may see it"
    if status in (409, 412):
        return (
            f"someone else changed the repository at the same time ({status}{said})",
            "Wait until the other push has ended",
        )
    if status == 429:
        seconds = _retry_after(error)
        asked = f", for {seconds:g} s" if seconds else ""
        return f"the Hub asks to slow down (429{asked})", f"Wait {f'{seconds:g} s' if seconds else 'some minutes'}"
    if status is not None and status >= 500:
        return f"the Hub has an error of its own ({status}{said})", "See https://status.huggingface.co, and wait"
    if status is not None:
        return f"the Hub refused the request ({status}{said})", "Change what it names"
    if isinstance(error, HTTPError):
        slow = "Timeout" in type(error).__name__
        what = "the Hub did not answer in time" if slow else "the connection was lost or refused"
        return f"{what} ({type(error).__name__})", "Check the network, and HF_ENDPOINT if it is set"
    return f"{type(error).__name__}: {error}".rstrip("."), "Mend that first"
