"""A finished checkpoint to the Hugging Face Hub: what can be refused is refused before anything is converted."""

import logging
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .objections import ObjectionError

__all__ = ["HubError", "check_hub", "upload"]

log = logging.getLogger(__name__)


class HubError(ObjectionError):
    """Nothing can be uploaded to that repository."""


def check_hub(repo: str) -> None:
    """Refuse an upload that cannot succeed, as far as the Hub tells without one.

    Args:
        repo: ``OWNER/NAME``.

    Raises:
        HubError: the name is malformed, there is no network or no token, or the token may not write there.
    """
    flag = f"--push-to-hub {repo}"
    owner, separator, _ = repo.partition("/")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"{flag}: {error}") from None
    if not separator:
        raise HubError(f"{flag}: write OWNER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{flag}: HF_HUB_OFFLINE is set; unset it, or upload later with: hf upload {repo} DIR")
    try:
        me = HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network: many unrelated types
        raise HubError(
            f"{flag}: the Hub does not say who you are ({_line(error)}); without a token run: hf auth login"
        ) from error
    owners = [me["name"], *(organization["name"] for organization in me.get("orgs", []))]
    if owner not in owners:
        raise HubError(f"{flag}: the token is of {me['name']}, who may write to {', '.join(owners)}")
    if (me.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"{flag}: the token of {me['name']} may only read; make one that may write")


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Upload all files of a checkpoint to a model repository, which is made if there is none.

    Args:
        folder: the checkpoint.
        repo: ``OWNER/NAME``.
        private: makes a new repository private.

    Returns:
        URL of the commit.

    Raises:
        HubError: it failed; the folder is what it was.
    """
    api = HfApi()
    log.info("uploading %s to %s", folder, repo)
    try:
        api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            repo_type="model",
            commit_message="ReQuant checkpoint",
            # weights of an earlier upload would be read with these
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )
    except Exception as error:  # as above
        raise HubError(
            f"--push-to-hub {repo}: {_line(error)}; {folder} is complete, upload it with: hf upload {repo} {folder}"
        ) from error
    return str(commit.commit_url)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
