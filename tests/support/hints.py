"""Whether what a hint says can be run: every option that it names is one of the command that it is about."""

import re

from typer.main import get_command

from modelopt_convert.cli import app

# What every command has, and flags of ModelOpt's quantize.py.
_ELSEWHERE = {"--help", "--format", "--quant-algo", "--block-size", "--quantized-torch-ckpt-save-path", "--compress"}
_COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
_QUOTED = re.compile(r"`([^`]*)`|\b(?=hf )([^`;]*)")
_MOPT = re.compile(r"\bmopt ([a-z][a-z0-9-]+)|\b(build)\b")
_OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z0-9-]*)(?:[ =]([\w-]+))?")


def _options(command: str) -> dict[str, list[str] | None]:
    """The options of a command, each with the values that it takes; None where any will do."""
    found: dict[str, list[str] | None] = {}
    for one in _COMMANDS[command].params:
        words = re.fullmatch(r"<(.*)>", one.metavar or "")
        found |= dict.fromkeys((*one.opts, *one.secondary_opts), words[1].split("|") if words else None)
    return found


_ALL = {name: _options(name) for name in _COMMANDS}
_CHOICES = {
    (option, word) for known in _ALL.values() for option, words in known.items() if words is not None for word in words
}


def is_an_option(option: str) -> bool:
    """Whether any command, of mopt or of ModelOpt, has it."""
    return option in _ELSEWHERE or any(option in known for known in _ALL.values())


def options_in(text: str) -> list[str]:
    """The options that a text names, but for those in what another program is called with."""
    return [option[1] for option in _of_mopt(text)]


def not_runnable(command: str, hint: str) -> list[str]:
    """Options and values in a hint that the command they are about does not have.

    Args:
        command: The command that gave the hint. Options are its own, unless a clause names another one before, or says
            ``build``.
        hint: What it says.
    """
    wrong: list[str] = []
    for option in _of_mopt(hint):
        if option[1] in _ELSEWHERE:
            continue
        named = _MOPT.findall(hint, max(hint.rfind(";", 0, option.start()), 0), option.start())
        about = next((name or "build-nvfp4" for name, build in reversed(named) if build or name in _ALL), command)
        known = _ALL.get(about, {})
        if option[1] not in known:
            wrong.append(f"{about} has no {option[1]}: {hint}")
        elif option[2] not in (known[option[1]] or [option[2]]) and (option[1], option[2]) in _CHOICES:
            wrong.append(f"{about} {option[1]} takes no {option[2]}: {hint}")
    return wrong


def _of_mopt(text: str) -> list[re.Match[str]]:
    foreign = [one.span() for one in _QUOTED.finditer(text) if not (one[1] or "").startswith(("mopt ", "--"))]
    return [one for one in _OPTION.finditer(text) if not any(begin <= one.start() < end for begin, end in foreign)]
