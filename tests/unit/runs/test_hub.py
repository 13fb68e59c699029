"""Pushing: what the hub is asked for, and one line where it cannot be reached. No network is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from sdsearch_lightning.errors import ConfigError, HubError
from sdsearch_lightning.runs.hub import check_name, push


class FakeApi:
    """Remembers what it is asked for; `failure` is raised by the upload."""

    asked: list[tuple[str, dict[str, Any]]]
    failure: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.asked.append(("create", {"repo_id": repo_id, **options}))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        if self.failure is not None:
            raise self.failure
        self.asked.append(("upload", options))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    class Api(FakeApi):
        asked = []

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api


def test_a_new_repository_is_private_and_gets_the_folder(api: type[FakeApi], tmp_path: Path) -> None:
    assert push(tmp_path, "owner/model") == "https://huggingface.co/owner/model"
    (created, made), (uploaded, sent) = api.asked
    assert (created, made) == ("create", {"repo_id": "owner/model", "private": True, "exist_ok": True})
    assert uploaded == "upload" and sent["folder_path"] == tmp_path and sent["repo_id"] == "owner/model"


@pytest.mark.parametrize(
    "failure", [LocalTokenNotFoundError("Token is required"), ConnectionError("no route"), OSError()]
)
def test_what_fails_is_told_in_two_lines_with_where_the_folder_is(
    api: type[FakeApi], tmp_path: Path, failure: Exception
) -> None:
    api.failure = failure
    with pytest.raises(HubError, match="push_to_hub: owner/model could not be written: ") as told:
        push(tmp_path, "owner/model")
    first, second = str(told.value).splitlines()
    assert (str(failure) or "OSError") in first and str(tmp_path) in second and "hf auth login" in second


def test_offline_is_such_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="could not be written"):
        push(tmp_path, "owner/model")


@pytest.mark.parametrize("name", ["model", "owner/", "/model", "a/b/c", "owner/mo del", "", "-x/y"])
def test_a_name_without_owner_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="push_to_hub: expected OWNER/NAME"):
        check_name(name)


def test_a_whole_name_is_not() -> None:
    check_name("owner-1/model_2.b")
