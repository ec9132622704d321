"""The line of ``mopt push``: look, ask, verify, compare, send, commit.

Nothing is kept on disk between runs. A shard that was sent stays with the Hub, uncommitted, and is not sent again; the
one commit comes last, on the parent that was compared with, and so a repo holds the checkpoint before or the new one.
"""

import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelopt_convert import __version__
from modelopt_convert.checkpoint.hub.client import hub_api, hub_errors, page_of
from modelopt_convert.commands.accounting import timed
from modelopt_convert.commands.push.access import check_access
from modelopt_convert.commands.push.changes import Changes, Listed, compare
from modelopt_convert.commands.push.publishable import CARD, Publishable, publishable
from modelopt_convert.engines.sglang import load_command
from modelopt_convert.report.report import OutputReport, PushedReport, Report
from modelopt_convert.run.errors import InconclusiveError, InputError
from modelopt_convert.run.progress import Progress
from modelopt_convert.verification.request import DEFAULT_SAMPLE, VerifyRequest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MAIN = "main"
_NO_BRANCH = re.compile(r"[0-9a-f]{40}$|refs/")


@dataclass(frozen=True, slots=True)
class PushRequest:
    """What the user asked of ``push``.

    Attributes:
        checkpoint: The transformer, or the folder above several.
        repo_id: ORGANIZATION/NAME.
        create_pr: Open a pull request against main, and leave main alone.
        private: Create the repo so; refuse one that is public.
        revision: The branch; it is made where there is none.
        message: Of the commit.
    """

    checkpoint: Path
    repo_id: str
    create_pr: bool = False
    private: bool = False
    revision: str | None = None
    message: str | None = None

    def command(self) -> str:
        """The command line that asks the same."""
        words = ["mopt", "push", str(self.checkpoint), self.repo_id]
        words += ["--create-pr"] * self.create_pr + ["--private"] * self.private
        words += ["--revision", self.revision] if self.revision is not None else []
        words += ["--message", self.message] if self.message is not None else []
        return shlex.join(words)

    @property
    def again(self) -> str:
        """How to try again, for hints."""
        return f"run `{self.command()}`; what was sent is not sent again"


@dataclass(frozen=True, slots=True)
class _Target:
    """The commit to build on, and whether its branch has still to be made."""

    parent: str
    branch_exists: bool


def push(request: PushRequest, report: Report, progress: Progress) -> None:
    """Publish a checkpoint; what happened is in ``report.pushed``.

    Raises:
        MoptError: One of its kinds. Nothing is committed then; a repo that was created is empty.
    """
    with ExitStack() as stack:
        local = publishable(request.checkpoint, _token, stack)
        if local.left_out:
            report.warn("push.left_out", f"not published: {', '.join(local.left_out)}")
        exists = check_access(
            request.repo_id, create_pr=request.create_pr, private=request.private, again=request.again
        )
        _check_card(request, local)
        _verify(request, report, progress)
        with timed(report, "push"), _without_bars():
            report.pushed = _send(request, local, exists, report, progress)
        report.pushed.not_published = list(local.left_out)
        report.pushed.load = _load_command(report.pushed, local)


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _check_card(request: PushRequest, local: Publishable) -> None:
    """Ask for the Hub's opinion of the card before the shards are sent, and not after."""
    from huggingface_hub import constants
    from huggingface_hub.errors import BadRequestError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    card = next((one.source for one in local.files if one.path == CARD), None)
    if not isinstance(card, bytes):
        return
    content = {"content": card.decode(errors="replace"), "repoType": "model"}
    with hub_errors(request.repo_id, request.again):
        response = get_session().post(
            f"{constants.ENDPOINT}/api/validate-yaml", json=content, headers=build_hf_headers()
        )
        try:
            hf_raise_for_status(response)
        except BadRequestError as error:
            said = [str(one.get("message")) for one in response.json().get("errors", ())]
            raise InputError(
                f"{CARD}: the Hub refuses its metadata: {'; '.join(said)[:300]}",
                code="push.card",
                path=CARD,
                hint="mend the lines between --- at its top; nothing was sent",
            ) from error


def _verify(request: PushRequest, report: Report, progress: Progress) -> None:
    """Every byte against the record, and structure; without a record, structure alone.

    On the CPU: a kernel says nothing about the checkpoint that the other levels do not.
    """
    from modelopt_convert.commands.verify import verify

    asked = VerifyRequest(request.checkpoint, None, ("best",), "cpu", DEFAULT_SAMPLE, None, None)
    checked = Report(command=report.command, output=OutputReport(path=""))
    try:
        verify(asked, checked, progress)
    except InconclusiveError as error:
        report.warn("push.unproven", f"nothing proves the weights, only their structure was checked: {error.message}")
    finally:
        # A build's own inputs and verdicts say more.
        report.inputs = report.inputs or checked.inputs
        report.verify = report.verify or checked.verify
        report.timings_s |= {f"push_{name}": time for name, time in checked.timings_s.items()}


def _send(request: PushRequest, local: Publishable, exists: bool, report: Report, progress: Progress) -> PushedReport:
    api = hub_api()
    repo_id = request.repo_id
    with hub_errors(repo_id, request.again):
        if not exists:
            api.create_repo(repo_id, private=request.private or None, exist_ok=True)
        target = _target(api, request)
        there = _tree(api, repo_id, target.parent)
    known = sum(one.num_bytes for one in local.files if one.is_shard and one.path in there)
    if known:
        progress.begin("compare with what is there", known)
    changes = compare(local, there, _fetcher(api, request, target.parent), progress.advance, repo_id)
    for card in changes.kept_cards:
        report.warn(
            "push.card_kept",
            f"{card} was edited on the Hub and stays; `hf upload {repo_id} {request.checkpoint / card} {card}` "
            "replaces it",
        )
    pushed = PushedReport(
        repo_id=repo_id,
        revision=request.revision or _MAIN,
        url=page_of(repo_id) + (f"/tree/{request.revision}" if request.revision else ""),
        same=list(changes.same),
        deleted=list(changes.delete),
    )
    with hub_errors(repo_id, request.again):
        if not target.branch_exists:
            api.create_branch(repo_id, branch=request.revision or _MAIN, revision=target.parent, exist_ok=True)
        if changes.send or changes.delete:
            _commit(api, request, local, changes, target.parent, pushed, progress)
    return pushed


def _commit(
    api: "HfApi",
    request: PushRequest,
    local: Publishable,
    changes: Changes,
    parent: str,
    pushed: PushedReport,
    progress: Progress,
) -> None:
    """Send shard by shard, then all the small files, then commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    def send(additions: list[CommitOperationAdd]) -> None:
        # A .gitignore in the repo would leave files out without a word.
        api.preupload_lfs_files(
            request.repo_id,
            additions,
            revision=request.revision,
            create_pr=request.create_pr,
            gitignore_content="",
        )

    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    shards = [one for one in changes.send if one.is_shard]
    for number, shard in enumerate(shards, 1):
        progress.begin(f"send {shard.path} ({number} of {len(shards)})", shard.num_bytes)
        addition = CommitOperationAdd(shard.path, shard.source)
        send([addition])
        operations.append(addition)
        progress.advance(shard.num_bytes)
    small = [CommitOperationAdd(one.path, one.source) for one in changes.send if not one.is_shard]
    send(small)
    operations += [*small, *(CommitOperationDelete(path) for path in changes.delete)]
    local.check_unchanged()  # since it was verified
    done = api.create_commit(
        request.repo_id,
        operations,
        commit_message=request.message or f"Upload with mopt {__version__}",
        revision=request.revision,
        create_pr=request.create_pr,
        parent_commit=parent,
    )
    pushed.commit = done.oid
    pushed.url = done.pr_url or done.commit_url
    pushed.pull_request = done.pr_url
    pushed.revision = done.pr_revision or pushed.revision
    pushed.sent = [one.path for one in changes.send]
    pushed.bytes_sent = sum(one.num_bytes for one in changes.send)


def _target(api: "HfApi", request: PushRequest) -> _Target:
    revision = request.revision or _MAIN
    if revision.startswith("refs/pr/"):
        return _Target(str(api.repo_info(request.repo_id, revision=revision).sha), branch_exists=True)
    refs = api.list_repo_refs(request.repo_id)
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    if revision in heads:
        return _Target(heads[revision], branch_exists=True)
    is_tag = any(ref.name == revision for ref in refs.tags)
    if is_tag or _NO_BRANCH.match(revision):
        what = "a tag, and a tag does not move" if is_tag else "a commit or a full reference, and no branch"
        raise InputError(
            f"hf://{request.repo_id}: {revision} is {what}",
            code="push.revision",
            path=f"hf://{request.repo_id}",
            hint="give --revision the name of a branch",
        )
    return _Target(heads[_MAIN], branch_exists=False)


def _tree(api: "HfApi", repo_id: str, commit: str) -> dict[str, Listed]:
    from huggingface_hub import RepoFile

    found = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {
        one.path: Listed(one.size, one.lfs.sha256 if one.lfs is not None else None, one.blob_id)
        for one in found
        if isinstance(one, RepoFile)
    }


def _fetcher(api: "HfApi", request: PushRequest, commit: str) -> Callable[[str], bytes]:
    def fetch(path: str) -> bytes:
        with hub_errors(request.repo_id, request.again):
            return Path(api.hf_hub_download(request.repo_id, path, revision=commit)).read_bytes()

    return fetch


def _load_command(pushed: PushedReport, local: Publishable) -> str:
    base = str(local.record.get("base_repo") or "BASE_MODEL")
    if not local.components and pushed.revision == _MAIN:
        return load_command(pushed.repo_id, base, [])
    # An engine takes a repo's main branch alone, and its path to one of several transformers must be a folder.
    folder = pushed.repo_id.rpartition("/")[2]
    revision = [] if pushed.revision == _MAIN else ["--revision", pushed.revision]
    download = shlex.join(["hf", "download", pushed.repo_id, *revision, "--local-dir", folder])
    return f"{download} && {load_command(folder, base, local.components)}"


@contextmanager
def _without_bars() -> Iterator[None]:
    """The client's own bars would be drawn over ours, and into logs."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
