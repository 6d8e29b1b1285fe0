"""A Hub that refuses, fails, hangs or is elsewhere: nothing local is lost, and the message says what to do."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub.conftest import content
from hub.loopback import DROP, HANG, Fault, Hub
from huggingface_hub import HfApi

from hf_ema_scaling.hub import PushError, push
from hf_ema_scaling.hub.publish import WAITS

NAME = "tester/model"
CREATE, PREUPLOAD, COMMIT = r"^/api/repos/create$", "/preupload/", "/commit/"


def failed(hub: Hub, run: Path, waits: list[float], *, timeout: float = 120.0) -> str:
    """What a push that fails says; the run's folder and the pushed files are as before."""
    before, there = content(run), {key: dict(repo.branches) for key, repo in hub.repositories.items()}
    with pytest.raises(PushError) as caught:
        push(run, NAME, wait=waits.append, timeout=timeout)
    assert content(run) == before
    for key, branches in there.items():
        assert hub.repositories[key].branches == branches
    message = str(caught.value)
    assert f"{run} was not pushed to {NAME}: " in message and "Nothing on this machine was changed" in message
    assert message.endswith(f"To push it again: hf-ema-scaling push {run} --repo_id {NAME}")
    assert "hf_loopback" not in message
    return message


@pytest.mark.parametrize(
    ("status", "path", "told"),
    [
        (401, CREATE, "refused the token, or there is none (401"),
        (403, CREATE, "the token may not write there (403"),
        (403, COMMIT, "the token may not write there (403"),
        (404, COMMIT, "the Hub does not find it (404"),
        (400, COMMIT, "the Hub refused the request (400"),
        (413, COMMIT, "the Hub refused the request (413"),
    ],
)
def test_refusals_are_not_asked_twice(
    hub: Hub, run: Path, waits: list[float], status: int, path: str, told: str
) -> None:
    hub.faults = [Fault("POST", path, status, times=9)]
    assert told in failed(hub, run, waits)
    assert waits == [] and hub.faults[0].times == 8


def test_a_wrong_token(hub: Hub, run: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = failed(hub, run, waits)
    assert "refused the token" in message and "Set HF_TOKEN" in message and "hf_wrong" not in message
    assert hub.repositories == {} and waits == []


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (409, "someone else changed the repository at the same time (409"),
        (412, "someone else changed the repository at the same time (412"),
        (429, "the Hub asks to slow down (429)"),
        (500, "the Hub has an error of its own (500"),
        (503, "the Hub has an error of its own (503"),
        (DROP, "the connection was lost or refused"),
    ],
)
def test_what_may_pass_is_tried_four_times(hub: Hub, run: Path, waits: list[float], status: int, told: str) -> None:
    hub.faults = [Fault("POST", COMMIT, status, times=3)]
    push(run, NAME, wait=waits.append)
    assert waits == list(WAITS) and len(hub.titles(NAME)) == 1
    (run / "metrics.json").write_text("{}", encoding="utf-8")
    hub.faults, waits[:] = [Fault("POST", COMMIT, status, times=99)], []
    assert told in failed(hub, run, waits)
    assert waits == list(WAITS) and hub.faults[0].times == 95


def test_a_repository_that_is_there_is_no_fault(hub: Hub, run: Path, waits: list[float]) -> None:
    HfApi(endpoint=hub.url).create_repo(NAME)
    push(run, NAME, wait=waits.append)
    assert ("POST", "/api/repos/create") in hub.requests and waits == [] and len(hub.titles(NAME)) == 1


def test_the_hub_says_how_long_to_wait(hub: Hub, run: Path, waits: list[float]) -> None:
    hub.faults = [Fault("POST", COMMIT, 429, headers={"Retry-After": "20"})]
    push(run, NAME, wait=waits.append)
    assert waits == [20.0]


def test_a_long_wait_is_the_users(hub: Hub, run: Path, waits: list[float]) -> None:
    hub.faults = [Fault("POST", COMMIT, 429, times=9, headers={"Retry-After": "3600"})]
    message = failed(hub, run, waits)
    assert "slow down (429, for 3600 s). Wait 3600 s." in message and waits == []


def test_what_the_client_has_tried_already_is_not_tried_again(hub: Hub, run: Path, waits: list[float]) -> None:
    hub.faults = [Fault("POST", PREUPLOAD, 500, times=99)]
    assert "an error of its own (500" in failed(hub, run, waits)
    assert hub.faults[0].times == 99 - 6 and waits == [1, 2, 4, 8, 8]


def test_a_slow_hub(hub: Hub, run: Path, waits: list[float]) -> None:
    hub.faults = [Fault("POST", CREATE, HANG, times=99)]
    begun = time.monotonic()
    assert "the Hub did not answer in time (ReadTimeout)" in failed(hub, run, waits, timeout=0.05)
    assert time.monotonic() - begun < 10
    assert waits == list(WAITS)
    client = huggingface_hub.get_session()
    assert client.timeout.read is None


def test_no_hub_at_all(hub: Hub, run: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    message = failed(hub, run, waits)
    assert "the connection was lost or refused (ConnectError)" in message and "HF_ENDPOINT" in message


def test_offline(hub: Hub, run: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set. Unset it" in failed(hub, run, waits)
    assert waits == [] and hub.requests == []


@pytest.mark.parametrize("status", [DROP, 500])
def test_an_answer_that_is_lost_makes_no_second_commit(hub: Hub, run: Path, waits: list[float], status: int) -> None:
    hub.lost = [Fault("POST", COMMIT, status)]
    commit = push(run, NAME, wait=waits.append)
    assert len(hub.titles(NAME)) == 1 and waits == [1.0]
    assert commit.oid == hub.repositories["model", NAME].branches["main"]


def test_a_push_between_ours_is_kept(hub: Hub, run: Path) -> None:
    """The first commit meets another parent than it was made for; the second is made for that."""
    push(run, NAME)
    (run / "metrics.json").write_text('{"optimizer_steps": 5}', encoding="utf-8")
    repository = hub.repositories["model", NAME]
    hub.faults = [Fault("POST", COMMIT, 412, message="A commit has happened since. Please refresh and try again.")]

    def other(seconds: float) -> None:
        tree = dict(repository.commits[repository.branches["main"]])
        repository.commit(tree | {"theirs.txt": hub.add(b"theirs")}, "theirs", "main")

    push(run, NAME, wait=other)
    files = hub.files(NAME)
    assert files["theirs.txt"] == b"theirs" and b'"optimizer_steps": 5' in files["metrics.json"]


def test_the_parent_is_stated(hub: Hub, run: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was decided by one commit's list of files is not applied to another."""
    push(run, NAME)
    (run / "metrics.json").write_text("{}", encoding="utf-8")
    repository = hub.repositories["model", NAME]
    info = HfApi.repo_info
    seen: list[str] = []

    def overtaken(self: HfApi, *args: object, **kwargs: object) -> object:
        found = info(self, *args, **kwargs)  # type: ignore[arg-type]
        if not seen:
            repository.commit(dict(repository.commits[repository.branches["main"]]), "theirs", "main")
        seen.append(found.sha)  # type: ignore[union-attr, arg-type]
        return found

    monkeypatch.setattr(HfApi, "repo_info", overtaken)
    push(run, NAME, wait=waits.append)
    assert waits == [1.0] and len(set(seen)) == 2
    assert hub.titles(NAME) == ["Model, ema at the root", "theirs", "Model, ema at the root"]


def test_a_bad_name(hub: Hub, run: Path) -> None:
    with pytest.raises(PushError, match=r"is no name for a repository .*Give OWNER/NAME"):
        push(run, "a/b/c")
    assert hub.requests == []


def test_what_is_tried_again_is_told(
    hub: Hub, run: Path, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults = [Fault("POST", COMMIT, 500)]
    with caplog.at_level(logging.WARNING, "hf_ema_scaling.hub.publish"):
        push(run, NAME, wait=waits.append)
    told = [record.getMessage() for record in caplog.records if record.name == "hf_ema_scaling.hub.publish"]
    assert told == [f"Pushing {run} to {NAME}: the Hub has an error of its own (500 (injected)); trying again in 1 s."]
