"""A request in words. No torch."""

import shlex
from dataclasses import fields
from typing import Any

from modelopt_convert.commands.flags import Request


def command_line(request: Request[Any]) -> str:
    """What was asked for, as the command line spells it, without what is as it would be anyway."""
    words = ["mopt", request.command]
    for one in fields(request):
        value = getattr(request, one.name)
        if one.name == "progress" or value == one.default:
            continue
        flag = [request.spelled(one.name)] if one.kw_only else []
        if isinstance(value, tuple):
            words += [word for each in value for word in (*flag, str(each))]
        else:
            words += flag if value is True else [*flag, str(value)]
    return shlex.join(words)
