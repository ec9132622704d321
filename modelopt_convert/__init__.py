"""mopt: convert NVIDIA ModelOpt exports of diffusion transformers into repos that serving engines load right.

What this module gives is the public API; docs/api.md describes it. Everything else may change between releases.
"""

from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from modelopt_convert.api import *  # noqa: F403 - its __all__ is what type checkers see
    from modelopt_convert.api import __all__ as __all__
else:
    # A program pays for what it uses: names of the API are looked for when they are first asked for.

    def __getattr__(name):
        if name == "__all__" or not name.startswith("_"):
            from importlib import import_module

            api = import_module(f"{__name__}.api")
            if name == "__all__":
                return ["__version__", *api.__all__]
            if name in api.__all__:
                return globals().setdefault(name, getattr(api, name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
