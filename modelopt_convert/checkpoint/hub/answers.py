"""What the Hub is asked about a repo. Every answer is checked here before it names a path, a length or a time."""

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any
from urllib.parse import parse_qsl, quote

from modelopt_convert.checkpoint.hub.client import ask, ask_once, hub_headers, page_of, read_whole, shown
from modelopt_convert.run.errors import InputError

_COMMIT = re.compile("[0-9a-f]{40}")
_HTTP = re.compile(r"https?://[!-~]{1,1000}")
_SHA256 = re.compile("[0-9a-f]{64}")
_MAX_FILES = 200_000
_MAX_FILE_BYTES = 1 << 44
_MAX_PATH_BYTES = 1000
_MAX_NAME_BYTES = 255
_MAX_SECONDS = 1 << 40  # of a time since 1970
_REQUEST_S = 30.0
_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})  # control characters, halves of pairs, separators of lines


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the Hub lists it.

    Attributes:
        num_bytes: Its size.
        etag: SHA-256 of a file in LFS or Xet, else git's blob id; a link to the file must say the same.
        xet_hash: The hash by which Xet knows the file; None if Xet does not.
    """

    num_bytes: int
    etag: str
    xet_hash: str | None

    @property
    def is_small(self) -> bool:
        """Whether it lies in git itself."""
        return _COMMIT.fullmatch(self.etag) is not None


@dataclass(frozen=True, slots=True)
class XetAccess:
    """Where Xet keeps a repo's bytes, and the token to have them with until a second since 1970."""

    endpoint: str
    token: str
    until: int


class Answer:
    """Parsed JSON of an answer, or a part of it, whose fields are taken by their type."""

    def __init__(self, repo_id: str, what: str, content: object) -> None:
        """Take what came.

        Raises:
            InputError: ``hub.answer``: it is no object.
        """
        self._repo_id = repo_id
        self._what = what
        if not isinstance(content, dict):
            raise wrong(repo_id, what, "an object", content)
        self._content: Mapping[str, object] = content

    def text(self, field: str, pattern: re.Pattern[str], expected: str) -> str:
        """A string of a known form.

        Raises:
            InputError: ``hub.answer``.
        """
        found = self._content.get(field)
        if not isinstance(found, str) or pattern.fullmatch(found) is None:
            raise self.wrong(field, expected, found)
        return found

    def number(self, field: str, most: int) -> int:
        """A whole number from 0 to ``most``.

        Raises:
            InputError: ``hub.answer``.
        """
        found = self._content.get(field)
        if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= most:
            raise self.wrong(field, f"a whole number from 0 to {most}", found)
        return found

    def has(self, field: str) -> bool:
        """Whether a field is there, and is not null."""
        return self._content.get(field) is not None

    def part(self, field: str) -> "Answer":
        """An object in it.

        Raises:
            InputError: ``hub.answer``.
        """
        return Answer(self._repo_id, f"{self._what}, {field}", self._content.get(field))

    def parts(self, field: str) -> "list[Answer]":
        """The objects of a list in it; none where there is no list.

        Raises:
            InputError: ``hub.answer``.
        """
        found = self._content.get(field)
        if found is not None and not isinstance(found, list):
            raise self.wrong(field, "a list", found)
        return [Answer(self._repo_id, f"{self._what}, {field}", one) for one in found or ()]

    def path(self) -> str:
        """A path that stays in the folder it is put into, on every system.

        Raises:
            InputError: ``hub.answer``.
        """
        found = self._content.get("path")
        if not isinstance(found, str) or not _is_plain(found):
            expected = f"a relative path, of names of at most {_MAX_NAME_BYTES} bytes, without . and .. and \\"
            raise self.wrong("path", expected, found)
        return found

    def wrong(self, field: str, expected: str, found: object) -> InputError:
        """The error for a field."""
        return wrong(self._repo_id, f"{self._what}, {field}", expected, found)


def wrong(repo_id: str, what: str, expected: str, found: object) -> InputError:
    """The error for an answer that the Hub does not give."""
    return InputError(
        f"hf://{repo_id}: {what}: expected {expected}, found {shown(found)}",
        code="hub.answer",
        path=f"hf://{repo_id}",
        hint=f"see {page_of(repo_id)}; a proxy, or the server that HF_ENDPOINT names, may have answered",
    )


def find_commit(repo_id: str, revision: str | None) -> str:
    """The commit of a revision, or of the default branch.

    Raises:
        MoptError: ``hub.answer`` or ``hub.stalled``.
        OSError, HTTPError: What the client raises.
    """
    path = f"/api/models/{repo_id}" + (f"/revision/{quote(revision, safe='')}" if revision else "")
    content, _ = ask(partial(_get, repo_id, path, {}))
    answer = Answer(repo_id, "the revision's description", content)
    if revision is not None and _COMMIT.fullmatch(revision):
        return answer.text("sha", re.compile(revision), f"the commit that was asked for, {revision}")
    return answer.text("sha", _COMMIT, "40 hex digits")


def list_files(repo_id: str, commit: str) -> dict[str, HubFile]:
    """Every file of a commit by its path; all pages of the list together come in the time of one answer.

    Raises:
        MoptError: ``hub.answer`` or ``hub.stalled``.
        OSError, HTTPError: What the client raises.
    """
    return ask_once(partial(_list_files, repo_id, commit))


def _list_files(repo_id: str, commit: str) -> dict[str, HubFile]:
    files: dict[str, HubFile] = {}
    folders: set[str] = set()
    query: dict[str, str] | None = {"recursive": "true"}
    while query is not None:
        page, query = ask(partial(_get, repo_id, f"/api/models/{repo_id}/tree/{commit}", query))
        if not isinstance(page, list) or (query is not None and not page):
            raise wrong(repo_id, "the list of files", "a list, and no more pages behind an empty one", page)
        for one in page:
            entry = Answer(repo_id, f"the list of files, entry {len(files) + len(folders) + 1}", one)
            kind = entry.text("type", re.compile("file|directory"), "file or directory")
            path = entry.path()
            if path in files or path in folders or len(files) + len(folders) >= _MAX_FILES:
                raise entry.wrong("path", f"at most {_MAX_FILES} paths, none of them twice", path)
            if kind == "file":
                files[path] = _file(entry)
            else:
                folders.add(path)
    for path in files:
        above = path
        while above := above.rpartition("/")[0]:
            if above in files:
                raise wrong(repo_id, "the list of files", "no file below a file", path)
    return files


# Of all others hf_xet is kept away: an answer that names a folder of this machine would be written to.
TRUSTED = ("https://huggingface.co",)


def use_xet() -> bool:
    """Whether the client moves large files through hf_xet where the Hub knows Xet."""
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def sends_by_xet() -> bool:
    """Whether large files may be sent through hf_xet, which asks the Hub itself where to, and obeys a path as well."""
    from huggingface_hub import constants

    return use_xet() and constants.ENDPOINT in TRUSTED


def xet_access(repo_id: str, kind: str, revision: str, query: Mapping[str, str]) -> XetAccess:
    """Where Xet keeps the repo's bytes. hf_xet itself would take a place on this disk from the Hub, and write there.

    Args:
        repo_id: ORGANIZATION/NAME.
        kind: ``read`` or ``write``.
        revision: A commit, or a branch, quoted.
        query: What else is said in the request.

    Raises:
        MoptError: ``hub.answer`` or ``hub.stalled``.
        OSError, HTTPError: What the client raises.
    """
    content, _ = ask(partial(_get, repo_id, f"/api/models/{repo_id}/xet-{kind}-token/{revision}", query))
    answer = Answer(repo_id, "access to Xet", content)
    endpoint = answer.text("casUrl", _HTTP, "an http address")
    return XetAccess(
        endpoint,
        answer.text("accessToken", re.compile("[!-~]{1,10000}"), "a token"),
        answer.number("exp", _MAX_SECONDS),
    )


def check_xet(repo_id: str, revision: str, *, create_pr: bool) -> None:
    """Refuse to upload where the Hub names a place on this disk for Xet: the client would have hf_xet write there.

    Raises:
        MoptError: ``hub.answer`` or ``hub.stalled``.
        OSError, HTTPError: What the client raises.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        xet_access(repo_id, "write", quote(revision, safe=""), {"create_pr": "1"} if create_pr else {})
    except HfHubHTTPError as error:
        if error.response.status_code != 404:  # a Hub without Xet
            raise


def find_branches(repo_id: str) -> tuple[dict[str, str], set[str]]:
    """The commit of each branch of a repo, and the names of the repo's tags.

    Raises:
        MoptError: ``hub.answer`` or ``hub.stalled``.
        OSError, HTTPError: What the client raises.
    """
    content, _ = ask(partial(_get, repo_id, f"/api/models/{repo_id}/refs", {}))
    answer = Answer(repo_id, "the list of branches", content)
    name, expected = re.compile(r"[^\x00-\x20\x7f]{1,250}"), "a name"
    branches = {
        one.text("name", name, expected): one.text("targetCommit", _COMMIT, "40 hex digits")
        for one in answer.parts("branches")
    }
    return branches, {one.text("name", name, expected) for one in answer.parts("tags")}


def checked_commit(repo_id: str, what: str, found: object) -> str:
    """A commit that the client took from an answer.

    Raises:
        InputError: ``hub.answer``.
    """
    return Answer(repo_id, what, {"commit": found}).text("commit", _COMMIT, "40 hex digits")


def checked_url(repo_id: str, what: str, found: object) -> str:
    """A page's address that the client took from an answer.

    Raises:
        InputError: ``hub.answer``.
    """
    return Answer(repo_id, what, {"url": found}).text("url", _HTTP, "an http address")


def is_commit(text: str) -> bool:
    """Whether it has the form of a commit."""
    return _COMMIT.fullmatch(text) is not None


def _file(entry: Answer) -> HubFile:
    size = entry.number("size", _MAX_FILE_BYTES)
    if entry.has("lfs"):
        large = entry.part("lfs")
        if (found := large.number("size", _MAX_FILE_BYTES)) != size:
            raise large.wrong("size", f"the file's, {size}", found)
        etag = large.text("oid", _SHA256, "64 hex digits")
    else:
        etag = entry.text("oid", _COMMIT, "40 hex digits")
    return HubFile(size, etag, entry.text("xetHash", _SHA256, "64 hex digits") if entry.has("xetHash") else None)


def _is_plain(path: str) -> bool:
    if "\\" in path or any(unicodedata.category(char) in _UNPRINTABLE for char in path):
        return False
    names = path.split("/")
    return len(path.encode()) <= _MAX_PATH_BYTES and all(
        name not in ("", ".", "..") and len(name.encode()) <= _MAX_NAME_BYTES for name in names
    )


def _get(repo_id: str, path: str, query: Mapping[str, str]) -> tuple[Any, dict[str, str] | None]:
    """An answer's JSON, and the query for the next page of the answer if there is one."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    url, headers = f"{constants.ENDPOINT}{path}", hub_headers()
    with get_session().stream("GET", url, params=dict(query), headers=headers, timeout=_REQUEST_S) as response:
        answer = read_whole(response)
    hf_raise_for_status(answer)
    try:
        content = json.loads(answer.content)
    except (ValueError, RecursionError):
        raise wrong(repo_id, f"GET {path}", "JSON", answer.content[:100].decode(errors="replace")) from None
    further = answer.links.get("next", {}).get("url")
    # Only the query is taken: the next page is asked of the same Hub, which knows our token.
    return content, None if further is None else dict(parse_qsl(further.partition("?")[2], keep_blank_values=True))
