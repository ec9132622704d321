"""mopt: convert NVIDIA ModelOpt exports of diffusion transformers into repos that serving engines load right.

What this module gives is the public API; docs/api.md describes it. Everything else may change between releases.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from modelopt_convert.api import (
        build_nvfp4,
        convert_fp8,
        inspect,
        perform,
        presets,
        push,
        swap_nibbles,
        unswizzle_scales,
        verify,
    )
    from modelopt_convert.commands.requests import (
        BuildNvfp4Request,
        ConvertFp8Request,
        InspectRequest,
        PushRequest,
        SwapNibblesRequest,
        UnswizzleScalesRequest,
        VerifyRequest,
    )
    from modelopt_convert.preset.preset import LoadedPreset
    from modelopt_convert.report.inspect import InspectReport
    from modelopt_convert.report.report import Report
    from modelopt_convert.run.errors import (
        BackendError,
        CheckFailedError,
        InconclusiveError,
        InputError,
        InternalError,
        MoptError,
        OutputRefusedError,
        RemoteError,
        StorageError,
        UsageError,
    )
    from modelopt_convert.run.progress import Progress

__all__ = [
    "BackendError",
    "BuildNvfp4Request",
    "CheckFailedError",
    "ConvertFp8Request",
    "InconclusiveError",
    "InputError",
    "InspectReport",
    "InspectRequest",
    "InternalError",
    "LoadedPreset",
    "MoptError",
    "OutputRefusedError",
    "Progress",
    "PushRequest",
    "RemoteError",
    "Report",
    "StorageError",
    "SwapNibblesRequest",
    "UnswizzleScalesRequest",
    "UsageError",
    "VerifyRequest",
    "__version__",
    "build_nvfp4",
    "convert_fp8",
    "inspect",
    "perform",
    "presets",
    "push",
    "swap_nibbles",
    "unswizzle_scales",
    "verify",
]
# Where they are looked for when they are first asked for: a program pays for what it uses. Light ones first.
_HOMES = ("run.errors", "run.progress", "commands.requests", "api", "preset.preset", "report.report", "report.inspect")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            found = vars(import_module(f"{__name__}.{home}"))
            if name in found:
                return globals().setdefault(name, found[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
