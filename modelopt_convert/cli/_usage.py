"""Usage errors under ``--json``: one document on stdout, as for every other outcome."""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from modelopt_convert.cli._console import reader_may_leave
from modelopt_convert.run.errors import ExitCode
from modelopt_convert.run.text import nearest, shown

_WORDS = "command line"
_BESIDE = ("help", "version")


class Group(TyperGroup):
    """The commands; what cannot be parsed is told on stderr by Typer, and here on stdout where ``--json`` is given."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse what stands before the command; `mopt help COMMAND` and `mopt version` are understood, as elsewhere."""
        if args[:1] == ["help"]:
            if len(args) > 2:
                with _told(self.commands, args):
                    raise typer.BadParameter("takes the name of one command, and nothing else", param_hint="help")
            args = [*(one for one in args[1:2] if one not in _BESIDE), "--help"]
        elif args[:1] == ["version"]:
            if any(not word.startswith("-") for word in args[1:]):
                with _told(self.commands, args):
                    raise typer.BadParameter("takes nothing else", param_hint="version")
            args = ["--version", *args[1:]]
        words = tuple(args)  # a parser takes what it knows off the list
        with _told(self.commands, words):
            context = super().make_context(info_name, args, parent, **extra)
        context.meta[_WORDS] = words
        return context

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; for a misspelt one the words that are understood beside the commands are offered, too."""
        if args and args[0] not in self.commands and (near := nearest(args[0], [*self.commands, *_BESIDE])) in _BESIDE:
            ctx.fail(f"No such command {shown(args[0])}. Did you mean {near!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Parse what stands after the command, and run it."""
        with _told(self.commands, ctx.meta[_WORDS]):
            return super().invoke(ctx)


@contextmanager
def _told(known: Container[str], words: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except typer.TyperException as error:
        if "--json" in words and error.exit_code == ExitCode.USAGE:
            _tell(words[0] if words[0] in known else "", " ".join(error.format_message().split()))
        raise


def _tell(command: str, message: str) -> None:
    from modelopt_convert.report.advice import AdviceReport
    from modelopt_convert.report.fidelity import FidelityReport
    from modelopt_convert.report.inspect import InspectReport
    from modelopt_convert.report.report import ErrorReport, OutputReport, Report
    from modelopt_convert.run.text import printable

    hint = f"`{f'mopt {command}'.strip()} --help` says what it takes"
    error = ErrorReport(code="usage", message=printable(message), hint=printable(hint), path=None)
    ended: dict[str, Any] = {"status": "refused", "exit_code": int(ExitCode.USAGE), "error": error}
    own = {"advise": AdviceReport, "compare": FidelityReport, "inspect": InspectReport}.get(command)
    report = own(**ended) if own is not None else Report(command=command, output=OutputReport(path=""), **ended)
    with reader_may_leave():
        typer.echo(report.to_json())
