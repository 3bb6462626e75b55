"""Upload to the Hugging Face Hub and download from it.

A name is a local folder if that folder exists. Any other name is a Hub repository.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from training_harness.errors import UserError
from training_harness.model_cards import CARD_FILE


def local_folder(
    source: str | Path,
    marker: str,
    kind: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Return the folder that contains the file `marker`, downloading it from the Hub if needed.

    Args:
        source: a folder, a run folder with a folder `kind` or `model` in it, or a Hub repository.
        marker: name of a file that every such folder contains.
        kind: "pipeline", "tokenizer" …, for the messages.

    Raises:
        UserError: if there is no such folder and no such repository.
    """
    path = Path(source).expanduser()
    if path.exists():
        for folder in (path, path / kind, path / "model"):
            if (folder / marker).is_file():
                return folder
        raise UserError(f"{path} holds no {kind}; expected a folder with {marker}, or a run folder that has finished")
    name = str(source)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"no {kind} at {name}; expected a folder with {marker}, or a Hub repository such as me/my-generator"
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=["*.json", "*.safetensors", "*.md", "*.png"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        offline = constants.is_offline_mode()
        action = "unset HF_HUB_OFFLINE to download it" if offline else "run `hf auth login` if it is private"
        raise UserError(
            f"{name} is neither a local folder nor a {kind} {'in the cache' if offline else 'on the Hub'} "
            f"({type(error).__name__}); expected a folder or a repository that you can read; {action}"
        ) from error
    return local_folder(snapshot, marker, kind)


def create_repository(repo_id: str, *, private: bool | None, token: str | None) -> str:
    """Create a model repository if it does not exist; return its full name, owner/name."""
    from huggingface_hub import HfApi

    with _push_errors(repo_id):
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def fetch_card(repo_id: str, folder: Path, *, token: str | None) -> None:
    """Download the repository's README.md, if it has one, into a new folder, so that the owner's text in it is kept."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    folder.mkdir(parents=True, exist_ok=True)
    with _push_errors(repo_id), suppress(EntryNotFoundError):
        cached = hf_hub_download(repo_id, CARD_FILE, token=token)
        shutil.copyfile(cached, folder / CARD_FILE)


def upload_folder(folder: Path, repo_id: str, *, token: str | None, commit_message: str) -> str:
    """Upload the files of a folder as one commit to an existing repository; return the URL of the commit."""
    from huggingface_hub import HfApi

    with _push_errors(repo_id):
        commit = HfApi(token=token).upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(commit.commit_url)


@contextmanager
def _push_errors(repo_id: str) -> Iterator[None]:
    """Convert errors of the Hub and of the connection to it to a `UserError`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError

    if constants.is_offline_mode():
        raise UserError(
            f"could not push to {repo_id}: HF_HUB_OFFLINE is set; expected a connection to the Hub; unset HF_HUB_OFFLINE and push "
            "again"
        )
    try:
        yield
    except (HTTPError, HFValidationError, LocalTokenNotFoundError) as error:  # HTTPError includes a missing connection
        raise UserError(
            f"could not push to {repo_id} ({' '.join(str(error).split())[:200]}); expected a repository that you may "
            "write to, such as me/my-generator; log in with `hf auth login` or set HF_TOKEN"
        ) from error
