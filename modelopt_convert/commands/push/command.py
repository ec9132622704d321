"""The line of ``mopt push``: look, ask, verify, compare, send, commit.

Nothing is kept on disk between runs. A shard that was sent stays with the Hub, uncommitted, and is not sent again; the
one commit comes last, on the parent that was compared with, and so a repo holds the checkpoint before or the new one.
"""

import re
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelopt_convert import __version__
from modelopt_convert.checkpoint.hub import watch
from modelopt_convert.checkpoint.hub.answers import (
    HubFile,
    check_xet,
    checked_commit,
    checked_url,
    find_branches,
    find_commit,
    list_files,
    sends_by_xet,
    wrong,
)
from modelopt_convert.checkpoint.hub.client import (
    ask_once,
    first_line,
    hub_api,
    hub_errors,
    hub_headers,
    page_of,
    read_whole,
)
from modelopt_convert.checkpoint.hub.range_source import Outage, RangeSource
from modelopt_convert.checkpoint.reader import MAX_INDEX_BYTES
from modelopt_convert.commands.command import Clock, Warned, ending, versions, warnings_of
from modelopt_convert.commands.push.access import check_access
from modelopt_convert.commands.push.changes import Changes, compare
from modelopt_convert.commands.push.publishable import CARD, Publishable, publishable
from modelopt_convert.commands.requests import PushRequest, VerifyRequest
from modelopt_convert.commands.serving import known_limits, loads_right, refuse_broken
from modelopt_convert.commands.verify import VerifyCommand
from modelopt_convert.engines.limits import declared
from modelopt_convert.engines.sglang import load_command, pipeline_command
from modelopt_convert.preset.preset import load_preset, preset_names
from modelopt_convert.report.report import EngineLimitReport, OutputReport, PublishedReport, PushedReport, Report
from modelopt_convert.run.errors import InconclusiveError, InputError, MoptError
from modelopt_convert.run.progress import Progress
from modelopt_convert.run.text import runnable

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MAIN = "main"
_UNKNOWN = ("hub.answer", "hub.refused", "hub.stalled", "hub.unreachable", "hub.server")
_NO_BRANCH = re.compile(r"[0-9a-f]{40}$|refs/")


@dataclass(frozen=True, slots=True)
class _Target:
    """The commit to build on, and whether its branch has still to be made."""

    parent: str
    branch_exists: bool


class PushCommand:
    """Publish a checkpoint."""

    def __init__(self, request: PushRequest) -> None:
        """Do nothing yet."""
        self._request = request
        self._clock = Clock()
        self._warned: list[Warned] = []
        self._verified: Report | None = None
        self._pushed: PushedReport | None = None

    def run(self, progress: Progress) -> None:
        """Publish.

        Raises:
            MoptError: One of its kinds. Nothing is committed then; a repo that was created is empty.
        """
        request = self._request
        with ExitStack() as stack:
            local = publishable(Path(request.checkpoint), _token, stack)
            if local.left_out:
                self._warned.append(("push.left_out", f"not published: {', '.join(local.left_out)}"))
            known = list[EngineLimitReport]()
            for one in local.readers:
                if (algorithm := declared(one.config)) is not None:
                    self._warned += refuse_broken(one.config, algorithm, str(one.path), request)
                    known += known_limits([one.config], algorithm)
            exists = check_access(
                request.repo_id, create_pr=request.create_pr, private=request.private, again=request.again
            )
            _check_card(request, local)
            self._verify(progress)
            with self._clock.timed("push"), _quiet_client():
                pushed, warned = _send(request, local, exists, progress)
            is_served = all(one.config for one in local.readers) and loads_right(known, request.engine)
            load = _load_command(pushed, local) if is_served else None
            self._pushed = pushed.model_copy(update={"not_published": list(local.left_out), "load": load})
            self._warned += warned

    def report(self, error: BaseException | None = None) -> Report:
        """What happened, also after a failure."""
        kind, output = Report if self._pushed is None else PublishedReport, OutputReport(path="")
        ended = ending(error, "planned" if self._request.dry_run else "ok")
        return self.added_to(kind(command=self._request.command, output=output, pushed=self._pushed, **ended))

    def added_to(self, report: Report) -> Report:
        """A report with what this push has to say; what it says itself of inputs and verdicts says more.

        Args:
            report: With nothing else in it, or of the build that the checkpoint comes from.
        """
        verified = self._verified
        seconds = verified.timings_s if verified is not None else {}
        return report.model_copy(
            update={
                "timings_s": report.timings_s | self._clock.seconds | {f"push_{one}": s for one, s in seconds.items()},
                "warnings": report.warnings + warnings_of(self._warned),
                "pushed": self._pushed,
                "inputs": report.inputs or (verified.inputs if verified is not None else {}),
                "verify": report.verify or (verified.verify if verified is not None else None),
                "versions": versions(),
            }
        )

    def _verify(self, progress: Progress) -> None:
        """Every byte against the record, and structure; without a record, structure alone.

        On the CPU: a kernel says nothing about the checkpoint that the other levels do not.
        """
        command = VerifyCommand(VerifyRequest(self._request.checkpoint, device="cpu"))
        try:
            command.run(progress)
        except InconclusiveError as error:
            message = f"nothing proves the weights, only their structure was checked: {error.message}"
            self._warned.append(("push.unproven", message))
        finally:
            self._verified = command.report()


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _check_card(request: PushRequest, local: Publishable) -> None:
    """Ask for the Hub's opinion of the card before the shards are sent, and not after."""
    from huggingface_hub import constants
    from huggingface_hub.errors import BadRequestError
    from huggingface_hub.utils import get_session, hf_raise_for_status

    card = next((one.source for one in local.files if one.path == CARD), None)
    if not isinstance(card, bytes):
        return
    url = f"{constants.ENDPOINT}/api/validate-yaml"
    content = {"content": card.decode(errors="replace"), "repoType": "model"}

    def check() -> Any:
        with get_session().stream("POST", url, json=content, headers=hub_headers()) as response:
            return read_whole(response)

    with hub_errors(request.repo_id, request.again):
        response = ask_once(check)
        try:
            hf_raise_for_status(response)
        except BadRequestError as error:
            try:
                said = "; ".join(ascii(one["message"]) for one in response.json()["errors"])[:300]
            except (ValueError, LookupError, TypeError, RecursionError):
                said = first_line(error)
            raise InputError(
                f"{CARD}: the Hub refuses its metadata: {said}",
                code="push.card",
                path=CARD,
                hint="correct the lines between --- at its top; nothing was sent",
            ) from error


def _send(
    request: PushRequest, local: Publishable, exists: bool, progress: Progress
) -> tuple[PushedReport, list[Warned]]:
    api = hub_api()
    repo_id = request.repo_id
    with hub_errors(repo_id, request.again):
        if not exists and not request.dry_run:
            ask_once(partial(api.create_repo, repo_id, private=request.private or None, exist_ok=True))
        # Of a repo that is only planned there is no commit to build on, and nothing to compare with.
        target = _target(request) if exists or not request.dry_run else _Target("", branch_exists=False)
        there = list_files(repo_id, target.parent) if target.parent else {}
    known = sum(one.num_bytes for one in local.files if one.is_shard and one.path in there)
    if known:
        progress.begin("compare with what is there", known)
    changes = compare(local, there, _fetcher(request, target.parent, there), progress.advance, repo_id)
    warned = [
        (
            "push.card_kept",
            runnable(
                f"{card} was edited on the Hub and stays; "
                f"`hf upload {repo_id} {Path(request.checkpoint) / card} {card}` replaces it"
            ),
        )
        for card in changes.kept_cards
    ]
    pushed = PushedReport(
        repo_id=repo_id,
        revision=request.revision or _MAIN,
        url=page_of(repo_id) + (f"/tree/{request.revision}" if request.revision else ""),
        same=list(changes.same),
        deleted=list(changes.delete),
        sent=[one.path for one in changes.send],
        bytes_sent=sum(one.num_bytes for one in changes.send),
    )
    if request.dry_run:
        return pushed, warned
    with hub_errors(repo_id, request.resumed):
        if not target.branch_exists:
            branch = request.revision or _MAIN
            ask_once(partial(api.create_branch, repo_id, branch=branch, revision=target.parent, exist_ok=True))
        if changes.send or changes.delete:
            pushed = pushed.model_copy(update=_commit(api, request, local, changes, target.parent, progress))
    return pushed, warned


def _commit(
    api: "HfApi",
    request: PushRequest,
    local: Publishable,
    changes: Changes,
    parent: str,
    progress: Progress,
) -> dict[str, Any]:
    """Send shard by shard, then all the small files, then commit; what the report says of the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    def send(additions: list[CommitOperationAdd]) -> None:
        # A .gitignore in the repo would leave files out without a word.
        call = partial(
            api.preupload_lfs_files,
            request.repo_id,
            additions,
            revision=request.revision,
            create_pr=request.create_pr,
            gitignore_content="",
        )
        watch.watched(call, watch.ANSWER_S, moved=watch.Traffic(), least=watch.LEAST_BYTES_SENT)

    if sends_by_xet():
        check_xet(request.repo_id, request.revision or _MAIN, create_pr=request.create_pr)
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
    what = "the new commit"
    with _maybe_made(request):
        done = ask_once(
            partial(
                api.create_commit,
                request.repo_id,
                operations,
                commit_message=request.message or f"Upload with mopt {__version__}",
                revision=request.revision,
                create_pr=request.create_pr,
                parent_commit=parent,
            )
        )
        commit = checked_commit(request.repo_id, what, done.oid)
        url = checked_url(request.repo_id, what, done.pr_url or done.commit_url)
    return {
        "commit": commit,
        "url": url,
        "pull_request": url if done.pr_url else None,
        "revision": done.pr_revision or request.revision or _MAIN,
    }


@contextmanager
def _maybe_made(request: PushRequest) -> Iterator[None]:
    """Whoever sends a commit and cannot read the answer does not know whether it was made."""
    try:
        with hub_errors(request.repo_id, request.resumed):
            yield
    except MoptError as error:
        if error.code in _UNKNOWN:
            error.hint = f"{error.hint}; the commit may have been made: {request.again}, which compares first"
        raise


def _target(request: PushRequest) -> _Target:
    revision = request.revision or _MAIN
    if revision.startswith("refs/pr/"):
        return _Target(find_commit(request.repo_id, revision), branch_exists=True)
    heads, tags = find_branches(request.repo_id)
    if revision in heads:
        return _Target(heads[revision], branch_exists=True)
    if revision in tags or _NO_BRANCH.match(revision):
        what = "a tag, and a tag does not move" if revision in tags else "a commit or a full reference, and no branch"
        raise InputError(
            f"hf://{request.repo_id}: {revision} is {what}",
            code="push.revision",
            path=f"hf://{request.repo_id}",
            hint="give --revision the name of a branch",
        )
    return _Target(checked_commit(request.repo_id, f"the branch {_MAIN}", heads.get(_MAIN)), branch_exists=False)


def _fetcher(request: PushRequest, commit: str, there: Mapping[str, HubFile]) -> Callable[[str], bytes]:
    def fetch(path: str) -> bytes:
        file, found = there[path], bytearray()
        if file.num_bytes > MAX_INDEX_BYTES:
            raise wrong(request.repo_id, path, f"at most {MAX_INDEX_BYTES} bytes", file.num_bytes)
        with hub_errors(request.repo_id, request.again):
            source = RangeSource(request.repo_id, commit, path, file, Outage())
            source.fetch(0, file.num_bytes, lambda chunk, _at: found.extend(chunk), threading.Event())
        return bytes(found)

    return fetch


def _load_command(pushed: PushedReport, local: Publishable) -> str:
    base = _known_base(local) or "BASE_MODEL"
    if local.is_pipeline and pushed.revision == _MAIN:
        return pipeline_command(pushed.repo_id, _known_model(local))
    if not local.components and pushed.revision == _MAIN:
        return load_command(pushed.repo_id, base, [])
    # An engine takes a repo's main branch alone, and its path to one of several transformers must be a folder.
    folder = pushed.repo_id.rpartition("/")[2]
    revision = [] if pushed.revision == _MAIN else ["--revision", pushed.revision]
    download = shlex.join(["hf", "download", pushed.repo_id, *revision, "--local-dir", folder])
    load = load_command(folder, base, local.components)
    return f"{download} && {pipeline_command(folder, _known_model(local)) if local.is_pipeline else load}"


def _known_base(local: Publishable) -> str | None:
    """The base's repo, as the record has it."""
    known = local.record.get("base_claimed") or local.record.get("base_repo")
    return None if known is None else str(known)


def _known_model(local: Publishable) -> str | None:
    """The repo by whose name an engine may know the model: the base's, else that of a preset that the user named."""
    preset = local.record.get("preset")
    name = preset.get("name") if isinstance(preset, dict) and "chosen_by" not in preset else None
    return _known_base(local) or (load_preset(name).preset.base_repo if name in preset_names() else None)


@contextmanager
def _quiet_client() -> Iterator[None]:
    """The client's own bars and warnings would be drawn over ours, and into logs; Xet is for a Hub that is trusted."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    before, verbosity, no_xet = are_progress_bars_disabled(), logging.get_verbosity(), constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = not sends_by_xet()
    disable_progress_bars()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = no_xet
        logging.set_verbosity(verbosity)
        if not before:
            enable_progress_bars()
