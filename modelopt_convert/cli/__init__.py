"""The command line: flags, streams and exit codes, made from the requests.

Nothing here imports torch, so that help, usage errors and refusals are fast. What a command does is not known here, and
no room imports this one.
"""

import contextlib
import os
import resource
import sys
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

import typer

from modelopt_convert import __version__
from modelopt_convert.cli._console import close_streams, open_streams
from modelopt_convert.cli._usage import Group
from modelopt_convert.run.boundary import last_words
from modelopt_convert.run.errors import ExitCode


def _commands() -> dict[str, Callable[..., None]]:
    """``COMMANDS`` of every module of this room that has commands: its name begins with no underscore."""
    found: dict[str, Callable[..., None]] = {}
    for name in [one.name for one in iter_modules(__path__) if not one.name.startswith("_")]:
        found |= import_module(f"{__name__}.{name}").COMMANDS
    return dict(sorted(found.items()))


_COMMANDS = _commands()
# Typer's own flags have no default, and for any option without a value Typer imports pydantic, which takes longer than
# all the rest of its start-up. With these they are off by default, and the help of a command costs no more than mopt's.
_FLAGS_OFF: dict[str, object] = {"install_completion": False, "show_completion": False, "help": False}

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "default_map": {name: {"help": False} for name in _COMMANDS} | _FLAGS_OFF,
    },
)
for _name, _command in _COMMANDS.items():
    # The whole first line: left to itself Typer cuts it.
    app.command(_name, short_help=(_command.__doc__ or "").partition("\n")[0])(_command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mopt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", "-V", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Convert NVIDIA ModelOpt exports of diffusion transformers into repos that serving engines load right.

    \b
    Examples:
      mopt build-nvfp4 --preset flux1-dev --export EXPORT --base BASE
      mopt convert-fp8 --preset flux1-dev --export EXPORT --base BASE
      mopt verify OUT --base BASE
      mopt inspect CHECKPOINT --base BASE
      mopt unswizzle-scales CHECKPOINT OUTPUT --base BASE
      mopt push OUT ORGANIZATION/NAME
      mopt presets flux1-dev
      mopt demo
      mopt doctor

    \b
    Exit codes: 0 done; 1 a check failed; 2 usage; 3 bad input or preset;
    4 output refused or busy; 5 storage failed; 6 inconclusive;
    7 a backend is broken; 70 a bug in mopt; 129, 130 and 143 interrupted.
    Treat any other code as failure.
    """


def main() -> None:
    """Entry point: whatever nobody foresaw ends with exit code 70, since Python's own 1 means a failed check here."""
    open_streams()
    _allow_open_files()
    # Else pydantic reads the metadata of every installed package in search of plugins, and runs what it finds.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        app()
    except SystemExit as ended:
        # So Typer ends where whoever read the help has left.
        if isinstance(ended.__context__, BrokenPipeError):
            sys.exit(ExitCode.OK)
        raise
    except Exception as error:
        usage = getattr(error.__context__, "exit_code", None)
        if isinstance(error, OSError) and isinstance(usage, int):  # a usage error that could not be told
            sys.exit(usage)
        sys.exit(last_words(error, where="the result could not be printed"))
    finally:
        close_streams()


def _allow_open_files() -> None:
    """As many as the system lets us: every shard is held open, and 1,024 is a habit and not a need."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
