"""A build whose result is published: rights first, then the build, then the push."""

from typing import Any

from modelopt_convert.checkpoint.hub.client import page_of
from modelopt_convert.commands.build.command import BuildCommand
from modelopt_convert.commands.push.access import check_access
from modelopt_convert.commands.push.command import PushCommand
from modelopt_convert.commands.requests import BuildRequest, PushRequest
from modelopt_convert.report.report import PushedReport, Report
from modelopt_convert.run.errors import MoptError
from modelopt_convert.run.progress import Progress


class PublishingBuild:
    """Build, and publish."""

    def __init__(self, request: BuildRequest) -> None:
        """Do nothing yet."""
        assert request.push_to is not None
        self._repo_id = request.push_to
        self._is_planned = request.dry_run
        self._serving: dict[str, Any] = {"engine": request.engine, "allow_known_broken": request.allow_known_broken}
        self._build = BuildCommand(request)
        self._push: PushCommand | None = None

    def run(self, progress: Progress) -> None:
        """Do both.

        Raises:
            MoptError: Of either; the checkpoint stands where the push alone failed.
        """
        # Rights are asked for first: hours of work that may not be published are hours lost.
        check_access(self._repo_id, create_pr=False, private=False, again="run the same command again")
        self._build.run(progress)
        if self._is_planned:
            return
        later = PushRequest(self._build.steps.output, self._repo_id, **self._serving)
        self._push = PushCommand(later)
        try:
            self._push.run(progress)
        except MoptError as error:
            stands = f"{later.checkpoint} stands; `{later.command_line()}` publishes it"
            if error.hint is None or later.command_line() not in error.hint:
                error.hint = f"{error.hint}; {stands}" if error.hint else stands
            raise

    def report(self, error: BaseException | None = None) -> Report:
        """What happened, also after a failure."""
        if self._push is not None:
            return self._push.added_to(self._build.report(error))
        report = self._build.report(error)
        if error is not None:
            return report
        pushed = PushedReport(repo_id=self._repo_id, revision="main", url=page_of(self._repo_id))
        return report.model_copy(update={"pushed": pushed})
