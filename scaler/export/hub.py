"""An exported folder to a repository of the Hugging Face Hub, or of a server that speaks like it (HF_ENDPOINT)."""

from __future__ import annotations

import re
from pathlib import Path


def check_repository(name: str) -> None:
    """Refuse what is no name of a repository, before anything is written.

    Raises:
        ValueError: says what a name looks like.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name!r} is no repository; give USER/NAME, as on the hub")


def push(folder: Path, repository: str, *, private: bool = False, endpoint: str | None = None) -> str:
    """Upload a folder, making the repository if need be; the token is the one of `hf auth login`, or HF_TOKEN.

    Args:
        endpoint: the hub; None: HF_ENDPOINT, or huggingface.co.

    Returns:
        Where it can be seen.

    Raises:
        ValueError: not logged in, not allowed, or no such hub; the folder stays.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ValueError("a push needs huggingface_hub: pip install 'scaler[remote]'") from None
    api = HfApi(endpoint=endpoint, library_name="scaler")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export by scaler")
    except Exception as error:  # of whatever HTTP client this version has, too
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{repository} could not be pushed to {api.endpoint} ({why}); log in with `hf auth login` or set HF_TOKEN, "
            f"to a token that may write there, then run the same command with --overwrite; {folder} is complete"
        ) from error
    return f"{api.endpoint}/{repository}"
