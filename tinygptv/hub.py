"""Checkpoint folders on the Hugging Face hub: ``hf://org/name`` is downloaded and checked, a folder is uploaded whole.

    python -m tinygptv.hub pull hf://org/name --output checkpoint/
    python -m tinygptv.hub push checkpoint/ org/name --private

A folder goes up with its model card (licences of the parts it was made from) and its manifest (size and SHA-256 of
every file); what comes down is compared with that manifest.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinygptv.checkpoint.folders import MANIFEST, CheckpointError, verify_folder
from tinygptv.folder_fault import folder_fault

PREFIX = "hf://"
CARD = "README.md"
_FILES = ["*.json", "*.safetensors", "*.txt", "*.md", "*.jinja", "*.model"]
"""No pickles, no code."""


def is_hub(name: str | Path) -> bool:
    """Whether a name means a repository of the hub: ``hf://org/name``, ``hf://org/name@revision``."""
    return str(name).startswith(PREFIX)


def local_folder(name: str | Path, output: str | Path | None = None, *, hashes: bool = False) -> Path:
    """A folder of this machine: the path itself, or a repository of the hub, downloaded and checked.

    Args:
        name: a path, or ``hf://org/name[@revision]``.
        output: where a repository goes; None keeps it in the hub's cache.
        hashes: compare a repository's files with its manifest by their hashes, not their sizes alone; whatever loads
            the folder compares the hashes anyway.

    Raises:
        CheckpointError: the repository cannot be had, is no checkpoint folder, or does not match its manifest, or
            ``output`` holds other files.
    """
    if not is_hub(name):
        return Path(name)
    repo, _, revision = str(name).removeprefix(PREFIX).partition("@")
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise CheckpointError(f"{name} names no repository: write hf://org/name or hf://org/name@revision.")
    if output is not None:
        _check_target(Path(output))
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=_FILES, local_dir=output))
    except Exception as error:  # the hub's own errors, its HTTP library's, and the system's
        fix = " Give another --output." if output else " Set HF_HOME to another folder."
        raise CheckpointError(f"{name} cannot be downloaded: {_reason(error, fix)}") from error
    if (folder / MANIFEST).is_file():
        verify_folder(folder, hashes=hashes)
    return folder


def _check_target(folder: Path) -> None:
    """Refuse a folder with other files: the hub's library would replace those that have a name of the repository's."""
    was_pulled = (folder / ".cache/huggingface/download").is_dir()
    if not was_pulled and folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(
            f"--output {folder} holds files that a download might replace: give a new or empty folder."
        )


def push_folder(folder: str | Path, repo: str, *, private: bool = False, message: str = "") -> str:
    """Upload a checkpoint or artifact folder; returns the address of the commit.

    Args:
        folder: with its manifest and model card, as this project writes it.
        repo: ``org/name``; made where it is missing.
        private: a new repository is only visible to its owners.
        message: of the commit.

    Raises:
        CheckpointError: the folder is damaged or has no card, or the hub refuses.
    """
    folder = Path(folder)
    manifest = verify_folder(folder)
    if not (folder / CARD).is_file():
        raise CheckpointError(f"{folder} has no {CARD}, which tells the licences: save it with save_checkpoint.")
    names = [MANIFEST, *manifest.files]
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=names,
            commit_message=message or f"Upload {folder.absolute().name}",
        )
    except Exception as error:  # as above
        raise CheckpointError(f"{folder} cannot be uploaded to {repo}: {_reason(error)}") from error
    return str(commit.commit_url)


def _reason(error: Exception, fix: str = "") -> str:
    if isinstance(error, OSError) and error.errno and error.filename:  # of this machine's disk, not the hub's
        return f"{error.filename} cannot be made: {folder_fault(Path(str(error.filename)), error)}.{fix}"
    text = " ".join(str(error).split()) or type(error).__name__
    if "401" in text or "403" in text or "token" in text.lower():
        text += " Log in with `hf auth login`, or set HF_TOKEN."
    return text


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m tinygptv.hub") -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog=prog, description="Checkpoint folders on the hub.")
    commands = parser.add_subparsers(dest="command", required=True)
    pull = commands.add_parser("pull", help="download a repository and check it")
    pull.add_argument("name", help="hf://org/name or hf://org/name@revision")
    pull.add_argument("--output", type=Path, help="folder [the hub's cache]")
    push = commands.add_parser("push", help="upload a checkpoint or artifact folder")
    push.add_argument("folder", type=Path, help="checkpoint or artifact folder")
    push.add_argument("repo", help="org/name")
    push.add_argument("--private", action="store_true", help="a new repository is private")
    options = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        result: Any
        if options.command == "pull":
            name = options.name if is_hub(options.name) else PREFIX + options.name
            result = local_folder(name, options.output, hashes=True)
        else:
            result = push_folder(options.folder, options.repo, private=options.private)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
