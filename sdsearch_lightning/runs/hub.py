"""Pushing a folder to the Hugging Face hub, and what to tell where that cannot be done."""

from __future__ import annotations

import re
from pathlib import Path

from sdsearch_lightning.errors import ConfigError, HubError


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` can be that of a repository, OWNER/NAME."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ConfigError(f"push_to_hub: expected OWNER/NAME of a repository of the hub, found {name!r}.")


def push(folder: Path, name: str) -> str:
    """Upload a folder as a model repository, which is private where it is new; returns its address.

    Raises:
        HubError: no network, no token, or no right to write there; the folder stays.
    """
    import httpx
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by sdsearch-lightning")
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = str(error).strip().partition("\n")[0][:160] or type(error).__name__
        raise HubError(
            f"push_to_hub: {name} could not be written: {reason}\n"
            f"The model is whole in {folder}. Log in with `hf auth login`, then: hf upload {name} {folder}"
        ) from error
    return str(address)
