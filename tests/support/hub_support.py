"""One loopback Hub per process, in place of the real one for everything that tests start.

Importing this points the whole process at it, before anything can import huggingface_hub, which reads its endpoint
once. conftest.py does so first of all.
"""

import atexit
import os
import shutil
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from loopback_hub import LoopbackHub, XetMode

_FOLDER = Path(tempfile.mkdtemp(prefix="mopt-hub-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
HUB = LoopbackHub(_FOLDER / "hub")


def _take_over() -> None:
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_", "HUGGING_FACE_"))]:
        del os.environ[name]
    for name in ("TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE"):
        os.environ.pop(name, None)
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    os.environ |= {
        "HF_ENDPOINT": HUB.url,
        "HF_TOKEN": "hf_owner",
        "HF_HOME": str(_FOLDER / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_XET_TELEMETRY_ENABLED": "false",
    }


_take_over()


_left: set[threading.Thread] = set()


def _end_calls() -> None:
    """What an earlier test gave up must not go on with the next test's Hub: its next attempt succeeds."""
    HUB.forget_faults()
    HUB.over.set()
    for thread in threading.enumerate():
        if thread.name == "hub-call" and thread not in _left:
            thread.join(3)
            _left.add(thread)  # one that goes on all the same is not waited for again


def start_afresh(root: Path, monkeypatch: pytest.MonkeyPatch, xet: XetMode) -> LoopbackHub:
    """The Hub with nothing in it, and a client that has never seen it: no cache, no tokens, no waiting."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _cache_assets, _cache_manager, _http, _xet

    from modelopt_convert.checkpoint.hub import answers

    assert HUB.url == constants.ENDPOINT, "huggingface_hub was imported before hub_support"
    _end_calls()
    HUB.reset(root / "_hub", xet)
    home = root / "_home"
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    for name, folder in {"HUB": "hub", "ASSETS": "assets"}.items():
        monkeypatch.setattr(constants, f"HF_{name}_CACHE", str(home / folder))
        monkeypatch.setattr(constants, f"HUGGINGFACE_{name}_CACHE", str(home / folder))
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(home / "xet"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    # The two modules that keep a copy; all others ask constants when they are called.
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(home / "assets"))
    monkeypatch.setattr(_cache_manager, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", xet == "off")
    if xet == "off":
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(answers, "TRUSTED", (HUB.url,))  # as huggingface.co is
    # Tokens and the cache folder that hf_xet took from the environment of an earlier test.
    monkeypatch.setattr(_xet, "XET_CONNECTION_INFO_CACHE", {})
    monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())
    # The client waits a second or more before it tries again.
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _seconds: None))
    return HUB


def hub_environment(hub: LoopbackHub) -> dict[str, str]:
    """Variables for a process that uses this Hub, with a cache of its own that is empty."""
    variables = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": tempfile.mkdtemp(prefix="home-", dir=hub.root)}
    variables.pop("HF_HUB_DISABLE_XET", None)
    return variables if hub.xet != "off" else variables | {"HF_HUB_DISABLE_XET": "1"}
