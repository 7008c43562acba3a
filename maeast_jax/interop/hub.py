"""Checkpoints on the Hugging Face Hub, at hf://ORG/NAME[/FILE][@REVISION].

Only weights and their configuration are fetched; nothing in a repository is executed.
huggingface_hub, which keeps what it fetches in a cache, is imported inside the functions that need
it, because the core install does not have it.
"""

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maeast_jax.runtime import terminal

PREFIX = "hf://"
_ADDRESS = re.compile(
    r"hf://(?P<name>[\w.-]+/[\w.-]+)(/(?P<file>[^@]+))?(@(?P<revision>.+))?", re.ASCII
)
_PATTERNS = ["config.json", "model.safetensors", "*.pt"]


class HubError(ValueError):
    """The Hub or its cache does not hold what an address names; the message is one line."""


def fetch(address: str) -> str:
    """Returns the path, on this machine, of the checkpoint at an address.

    It is the repository's folder if that holds `model.safetensors`, or else its only `.pt` file, or
    the file that the address names. What is in the cache is used where the Hub cannot be reached.

    Raises HubError.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise HubError(f"{address} must read hf://ORG/NAME or hf://ORG/NAME/FILE, then @REVISION")
    with _errors(address) as hub:
        folder = hub.snapshot_download(
            match["name"],
            revision=match["revision"],
            allow_patterns=[glob.escape(match["file"])] if match["file"] else _PATTERNS,
        )
    if match["file"]:
        found = [path for path in [Path(folder, match["file"])] if path.is_file()]
    elif Path(folder, "model.safetensors").is_file():
        found = [Path(folder)]
    else:
        found = sorted(Path(folder).glob("*.pt"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise HubError(
            f"{address} must hold model.safetensors, one .pt file, or the file that is named; it "
            f"has {names}: name one as {PREFIX}{match['name']}/FILE"
        )
    return os.fspath(found[0])


def make_repository(name: str, private: bool) -> str:
    """Makes the repository ORG/NAME where it is not there, and returns the address of its page.

    Args:
      private: whether only its owners see a repository that is made here.

    Raises HubError, for example without a login.
    """
    if not _ADDRESS.fullmatch(f"{PREFIX}{name}"):
        raise HubError(f"--push_to_hub={name} must be ORG/NAME")
    with _errors(f"{PREFIX}{name}") as hub:
        return str(hub.create_repo(name, private=private, exist_ok=True))


def upload(folder: str | os.PathLike, name: str) -> None:
    """Puts the files of a folder into the repository ORG/NAME. Raises HubError."""
    with _errors(f"{PREFIX}{name}") as hub:
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a MAE-AST model")


@contextmanager
def _errors(address: str) -> Iterator:
    """Yields the module huggingface_hub, and turns its errors into a HubError of one line."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise HubError(
            f"{address} needs huggingface_hub: pip install -r requirements-hub.txt"
        ) from error
    login = "log in (hf auth login), or set HF_TOKEN"
    try:
        yield hub
    except errors.GatedRepoError as error:
        raise HubError(
            f"{address} asks to accept its terms: do so on its page, and {login}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{address} is not there, or is private: check the name, or {login}"
        ) from error
    except errors.RevisionNotFoundError as error:
        message = f"{address} has no such revision: name a branch, tag or commit"
        raise HubError(message) from error
    except errors.HfHubHTTPError as error:
        refused = error.response is not None and error.response.status_code in (401, 403)
        remedy = f": {login}" if refused else ""
        raise HubError(f"{address}: {terminal.one_line(error)}{remedy}") from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{address} is not in the cache, and the Hub cannot be reached: check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
    except (OSError, ValueError) as error:
        raise HubError(f"{address}: {terminal.one_line(error)}") from error
