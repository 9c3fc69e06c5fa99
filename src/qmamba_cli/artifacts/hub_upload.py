"""Uploading a model folder to the Hugging Face Hub."""

from pathlib import Path

from qmamba_cli.errors import QmambaError


def check_online() -> None:
    """Refuse where huggingface_hub was told to stay offline.

    Raises:
        QmambaError: it was, as by ``HF_HUB_OFFLINE=1``.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise QmambaError(
            "cannot upload to the Hugging Face Hub, got `HF_HUB_OFFLINE` set, expected a network",
            hint="unset it, or leave `--push-to-hub` out and upload the folder later with `hf upload`",
        )


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Upload every file of ``folder`` in one commit; the token is the one that huggingface_hub has stored.

    Args:
        folder: the model folder.
        repo: ``organisation/name``; made where it does not exist.
        private: whether a new repository is private.

    Returns:
        The repository's address.

    Raises:
        QmambaError: the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        # Nothing hidden: a lock or a leftover of another writer is not part of the model.
        api.upload_folder(
            folder_path=folder,
            repo_id=repo,
            ignore_patterns=[".*"],
            commit_message="Upload a model quantized by qmamba-cli",
        )
    except Exception as error:
        # The transport's classes differ among versions of huggingface_hub and share no base class.
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise QmambaError(
            f"cannot upload `{folder}` to `{repo}` on the Hugging Face Hub, "
            f"got `{type(error).__name__}: {first_line[:160]}`",
            hint=f"the folder is finished; log in with `hf auth login`, then `hf upload {repo} {folder}`",
        ) from None
    return address
