"""Where something lies on the Hub: what ``pathlib.Path`` is to the disk. Nothing is asked of the Hub before it must."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelopt_convert.checkpoint.hub.client import NOT_CACHED
from modelopt_convert.run.errors import InputError

if TYPE_CHECKING:
    from modelopt_convert.checkpoint.hub.remote_file import RemoteFile
    from modelopt_convert.checkpoint.hub.repo import HubRepo
    from modelopt_convert.checkpoint.local_file import LocalFile

PREFIX = "hf://"
# A Path has made one slash of the two in an address.
_WRITTEN = re.compile(
    r"(?:(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/+)?([\w-][\w.-]*/[\w-][\w.-]*)"
    r"(?:/(?:tree|blob|resolve)/([\w.-]+)(?:/(.+?))?)?/?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class HubPath:
    """A folder or file of a repo, with the methods of ``Path`` that inputs need.

    Attributes:
        repo: The repo; it stays at one commit once it was asked for anything.
        path: The path inside the repo; empty for the root.
    """

    repo: "HubRepo"
    path: str

    def __truediv__(self, name: str) -> "HubPath":
        """What lies in this folder."""
        return HubPath(self.repo, f"{self.path}/{name}".strip("/"))

    def __str__(self) -> str:
        """The path as a command line would have it."""
        return f"{self.repo}/{self.path}".rstrip("/")

    @property
    def name(self) -> str:
        """The last part of the path; for the root, that of the repo's name."""
        return (self.path or self.repo.repo_id).rpartition("/")[2]

    @property
    def parent(self) -> "HubPath":
        """The folder in which this lies."""
        return HubPath(self.repo, self.path.rpartition("/")[0])

    def is_file(self) -> bool:
        """Whether the repo has such a file."""
        return self.path in self.repo.files

    def is_dir(self) -> bool:
        """Whether the repo has files below it."""
        prefix = f"{self.path}/" if self.path else ""
        return any(name.startswith(prefix) for name in self.repo.files)

    def names(self) -> list[str]:
        """Names of the files and folders in it, sorted."""
        prefix = f"{self.path}/" if self.path else ""
        inside = (name.removeprefix(prefix) for name in self.repo.files if name.startswith(prefix))
        return sorted({name.partition("/")[0] for name in inside})

    def open(self) -> "LocalFile | RemoteFile":
        """Open the file: from the Hub's cache if it is there, else to be read by ranges.

        Raises:
            MoptError: With an ``input.*`` or ``hub.*`` code.
        """
        return self.repo.open(self.path)

    def fetch(self) -> Path:
        """The file on disk, whole: in the Hub's cache.

        Raises:
            MoptError: With an ``input.*`` or ``hub.*`` code.
        """
        return self.repo.fetch(self.path)

    def identity(self) -> dict[str, str]:
        """The repo, and its commit that is read."""
        return {"origin": "hub", "repo": self.repo.repo_id, "commit": self.repo.commit}

    def download_command(self) -> str:
        """The Hub's own, of the whole repo."""
        return f"hf download {self.repo.repo_id} --local-dir FOLDER"

    def absence(self) -> str | None:
        """That the cache alone was looked at, if the Hub may not be asked."""
        return f"the cache may hold a part only: {NOT_CACHED}" if self.repo.offline else None


def hub_address(text: str) -> str | None:
    """``hf://...`` for what is written as a repo's id or as its address in a browser; None for anything else."""
    found = _WRITTEN.fullmatch(text)
    if found is None:
        return None
    name, revision, path = found.groups(default="")
    return f"{PREFIX}{name}{'@' + revision if revision not in ('', 'main') else ''}{'/' + path if path else ''}"


def parse_hub_path(text: str, *, download: bool) -> HubPath:
    """Understand ``hf://ORGANIZATION/NAME[@REVISION][/PATH]``.

    Args:
        text: What the user gave.
        download: Whether files are fetched whole, into the Hub's cache.

    Raises:
        InputError: ``hub.uri``.
    """
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    from modelopt_convert.checkpoint.hub.repo import HubRepo

    try:
        uri = parse_hf_uri(text.rstrip("/"))
        if uri.type != "model":
            raise HfUriError(text, f"a {uri.type} holds no transformer")
        if {".", ".."} & {*uri.path_in_repo.split("/"), *(uri.revision or "").split("/")}:
            raise HfUriError(text, "neither a revision nor a path inside a repo has . and ..")
    except HfUriError as error:
        raise InputError(
            f"{text}: {str(error).splitlines()[-1]}",
            code="hub.uri",
            path=text,
            hint="write hf://ORGANIZATION/NAME, hf://ORGANIZATION/NAME@REVISION or either with /FOLDER behind it",
        ) from error
    return HubPath(HubRepo(uri.id, uri.revision, download=download), uri.path_in_repo)
