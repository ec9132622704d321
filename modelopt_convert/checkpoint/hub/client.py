"""The Hub's client: how it is called, and its failures in mopt's words, each with a code and what to run next."""

import errno
import importlib
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from modelopt_convert import __version__
from modelopt_convert.checkpoint.hub import watch
from modelopt_convert.run.errors import InputError, MoptError, RemoteError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # before each new attempt
BUSY = frozenset({408, 429, 500, 502, 503, 504})
NOT_CACHED = "run once without HF_HUB_OFFLINE and with --download"
_LIBRARY = "mopt"
_GUARDING = threading.Lock()
_LONGEST_PAUSE_S = 15.0
_SHOWN_CHARS = 60
_MAX_ANSWER_BYTES = 16 << 20
_T = TypeVar("_T")
_AGAIN = "run the same command again"
_OFFLINE = "HF_HUB_OFFLINE=1 uses the cache"
_CLIENT = ("huggingface_hub", "httpx")  # httpx2, too
_QUERY = re.compile(r"(https?://[^\s?'\"<>]*)\?[^\s'\"<>]*")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def hub_api() -> "HfApi":
    """The Hub's client, which tells the Hub that mopt calls."""
    from huggingface_hub import HfApi

    guard_token()
    return HfApi(library_name=_LIBRARY, library_version=__version__)


def http_library() -> Any:
    """The HTTP library of the client: httpx, and httpx2 from huggingface_hub 2 on. 1.30 does not name it yet."""
    from huggingface_hub import utils

    return getattr(utils, "httpx", None) or importlib.import_module("httpx")


def page_of(repo_id: str) -> str:
    """A repo's web page, at the endpoint in use."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo_id}"


def hub_headers() -> dict[str, str]:
    """Headers of a request to the Hub, with the token; only where time is bounded, since the client may ask the Hub."""
    from huggingface_hub.utils import build_hf_headers

    guard_token()
    return build_hf_headers(library_name=_LIBRARY, library_version=__version__)


def read_whole(response: Any) -> Any:
    """A response that was read, from one whose body has still to come; what is more than any answer has is left.

    Raises:
        InputError: ``hub.answer``.
    """
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > _MAX_ANSWER_BYTES:
            url = str(response.request.url).partition("?")[0]
            raise InputError(
                f"{url}: expected an answer of at most {_MAX_ANSWER_BYTES} bytes, found more",
                code="hub.answer",
                path=url,
                hint="a proxy, or the server that HF_ENDPOINT names, may have answered",
            )
    said = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
    return type(response)(response.status_code, headers=said, content=bytes(body), request=response.request)


def ask(call: Callable[[], _T]) -> _T:
    """What ``call`` returns, once the Hub is neither busy nor out of reach, and in ``ANSWER_S`` seconds.

    Raises:
        StalledError: It takes longer.
        OSError, HTTPError: The last of the client's exceptions.
    """
    return watch.watched(lambda: _retried(call), watch.ANSWER_S)


def ask_once(call: Callable[[], _T], seconds: float | None = None) -> _T:
    """What ``call`` returns in so many seconds; None for ``ANSWER_S``.

    Raises:
        StalledError: It takes longer.
    """
    return watch.watched(call, watch.ANSWER_S if seconds is None else seconds)


def _retried(call: Callable[[], _T]) -> _T:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    httpx = http_library()
    for pause in PAUSES_S:
        try:
            return call()
        except OfflineModeIsEnabled:
            raise
        except HfHubHTTPError as error:
            if error.response.status_code not in BUSY:
                raise
            asked = retry_after(error.response.headers)
            time.sleep(pause if asked is None else asked)
        except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError):
            time.sleep(pause)
    return call()


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a busy server asks to wait, within reason."""
    said = str(headers.get("Retry-After", ""))
    return min(float(said), _LONGEST_PAUSE_S) if said.isdecimal() else None


def guard_token() -> None:
    """Have mopt's requests take the access token to the endpoint alone: the client sends it wherever an answer says.

    An origin is scheme, host and port; to the client it is the host. The hook stays for the life of the process, since
    threads share one session, and lets requests of others pass.
    """
    from huggingface_hub.utils import _http, set_client_factory

    with _GUARDING:
        before = _http._GLOBAL_CLIENT_FACTORY
        if getattr(before, "func", None) is not _guarded:
            set_client_factory(partial(_guarded, before))  # the client makes a new session when a connection failed


def _guarded(make: Callable[[], Any]) -> Any:
    client = make()
    client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], _check_origin]}
    return client


def _check_origin(request: Any) -> None:
    """Refuse a request, also one that follows a redirect, before it takes the token elsewhere.

    Raises:
        InputError: ``hub.answer``.
    """
    from huggingface_hub import constants

    is_ours = request.headers.get("user-agent", "").startswith(f"{_LIBRARY}/")
    if is_ours and "authorization" in request.headers and not is_endpoint(request.url):
        where = first_line(Exception(str(request.url)))
        raise InputError(
            f"an answer names {where} for a request that has the access token, expected {constants.ENDPOINT}",
            code="hub.answer",
            path=where,
            hint="nothing was sent there; give the Hub that you trust as HF_ENDPOINT, or unset HF_TOKEN",
        )


def is_endpoint(url: Any) -> bool:
    """Whether an address has the scheme, the host and the port of the endpoint."""
    from huggingface_hub import constants

    asked, endpoint = map(http_library().URL, (url, constants.ENDPOINT))
    return bool((asked.scheme, asked.host, asked.port) == (endpoint.scheme, endpoint.host, endpoint.port))


@contextmanager
def hub_errors(repo_id: str, again: str | None = None) -> Iterator[None]:
    """Turn what the client raises into one line: InputError where the user must act, RemoteError to try again.

    Args:
        repo_id: The repo that is asked.
        again: How to try again, for hints; None for a command that only reads: the cache may serve such a command.

    Raises:
        MoptError: With a ``hub.*`` code.
    """
    from huggingface_hub.errors import HFValidationError

    httpx = http_library()
    try:
        yield
    except MoptError:
        raise
    except watch.StalledError as error:
        what = f"stalled: {error}"
        raise _error(RemoteError, repo_id, "stalled", what, again or f"{_AGAIN}; {_OFFLINE}") from error
    except (OSError, httpx.HTTPError, HFValidationError) as error:
        raise _explained(error, repo_id, again) from error
    except Exception as error:
        if isinstance(error.__cause__, MoptError):
            raise error.__cause__ from error
        if isinstance(error, UnicodeEncodeError) and _is_token_malformed():
            what = "the access token is malformed: it holds what is not ASCII"
            raise _error(InputError, repo_id, "token", what, "correct HF_TOKEN, or `hf auth login`") from error
        if isinstance(error.__cause__, OSError | httpx.HTTPError):  # the cause says why an upload failed
            raise _explained(error.__cause__, repo_id, again) from error
        if _is_xet_error(error):
            raise _transfer_error(error, repo_id, again or _AGAIN) from error
        if _is_of_the_client(error):
            # The client refuses a card or a file by itself, or the answer is none that the Hub gives.
            hint = f"see {page_of(repo_id)}; a proxy, or the server that HF_ENDPOINT names, may have answered"
            if isinstance(error, LookupError | AttributeError | TypeError | NameError):
                what = f"an answer has another form than the client takes: {type(error).__name__}: {first_line(error)}"
                raise _error(InputError, repo_id, "answer", what, hint) from error
            what = f"the client gave up: {first_line(error)}"
            raise _error(InputError, repo_id, "refused", what, hint) from error
        raise


def _is_token_malformed() -> bool:
    from huggingface_hub import get_token

    return not (get_token() or "").isascii()


def _is_of_the_client(error: Exception) -> bool:
    """Whether the client raised the error, or what it calls: an error that our own code raises is our bug."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith(_CLIENT) for frame, _ in frames)


def _transfer_error(error: Exception, repo_id: str, again: str) -> MoptError:
    said = str(error)
    if "No space left" in said or "os error 28" in said:
        return _disk_full(repo_id)
    return _error(RemoteError, repo_id, "transfer", f"the transfer failed: {first_line(error)}", again)


def _disk_full(repo_id: str) -> MoptError:
    return _error(RemoteError, repo_id, "disk_full", "the disk is full", "free some space; HF_HOME moves the cache")


def _is_xet_error(error: Exception) -> bool:
    """Whether hf_xet raised the error: RuntimeError for most failures, classes of its own for others."""
    return isinstance(error, RuntimeError) or type(error).__module__.partition(".")[0] in ("hf_xet", "builtins.hf_xet")


def _explained(error: Exception, repo_id: str, again: str | None) -> MoptError:
    """The client's exception in mopt's words, the special before the general: a gated repo is a missing one, too."""
    from huggingface_hub import errors as hub
    from huggingface_hub import get_token

    page = page_of(repo_id)
    later = again or f"{_AGAIN}; {_OFFLINE}"
    no_way = f"check the network and HF_ENDPOINT; {later}"
    again = again or _AGAIN
    login = "`hf auth whoami` says who you are, `hf auth login` or HF_TOKEN changes it"
    if isinstance(error, hub.GatedRepoError):
        hint = f"accept its terms at {page}" + ("" if get_token() else ", then `hf auth login`") + "; " + again
        return _error(InputError, repo_id, "gated", "the repo is gated, and this account was not let in", hint)
    if isinstance(error, hub.RepositoryNotFoundError) and not _bad_token(error):
        hint = f"check the name; {login}"
        return _error(
            InputError, repo_id, "no_repo", "no such repo, or a private one that this account cannot see", hint
        )
    if isinstance(error, hub.RevisionNotFoundError):
        hint = f"branches and tags are listed at {page}"
        return _error(InputError, repo_id, "no_revision", "the repo has no such revision", hint)
    if isinstance(error, hub.DisabledRepoError):
        return _error(InputError, repo_id, "disabled", "the Hub has disabled this repo", f"see {page}")
    if isinstance(error, hub.LocalEntryNotFoundError):
        what = "not in the cache, and the Hub may not be asked"
        return _error(InputError, repo_id, "not_cached", what, NOT_CACHED)
    if isinstance(error, hub.EntryNotFoundError):
        return _error(InputError, repo_id, "no_file", "the repo has no such file or folder", f"see {page}/tree/main")
    if isinstance(error, hub.OfflineModeIsEnabled):
        return _error(InputError, repo_id, "offline", "HF_HUB_OFFLINE is set", "unset it, and " + again)
    if isinstance(error, hub.HFValidationError):
        return _error(InputError, repo_id, "repo_id", "not a repo name", "names are ORGANIZATION/NAME")
    if isinstance(error, hub.HfHubHTTPError):
        return _http_error(error, error.response.status_code, repo_id, login, again)
    if isinstance(error, hub.FileMetadataError):
        hint = "a mirror or proxy left out the Hub's headers; use another HF_ENDPOINT"
        return _error(InputError, repo_id, "headers", first_line(error), hint)
    if isinstance(error, hub.LocalTokenNotFoundError):
        return _error(InputError, repo_id, "token", "there is no access token", f"`hf auth login`; {again}")
    if isinstance(error, OSError) and error.errno in _FULL:
        return _disk_full(repo_id)
    if isinstance(error, http_library().UnsupportedProtocol):
        hint = "a proxy, or the server that HF_ENDPOINT names, may have answered"
        return _error(InputError, repo_id, "answer", f"an answer leads to no address: {first_line(error)}", hint)
    if isinstance(error, http_library().TimeoutException):
        return _error(RemoteError, repo_id, "unreachable", "no answer in time", no_way)
    return _error(RemoteError, repo_id, "unreachable", first_line(error), no_way)


def _bad_token(error: Exception) -> bool:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None) == 401 and "nvalid" in _said(error)


def _http_error(error: Exception, status: int, repo_id: str, login: str, again: str) -> MoptError:
    said = _said(error)
    if status == 401:
        return _error(InputError, repo_id, "token", "the Hub does not know this token", login)
    if status == 403:
        hint = f"ask its owner, or take a token with write access; {login}"
        return _error(InputError, repo_id, "forbidden", f"this account may not do that: {said}", hint)
    if status == 412:
        hint = f"someone else committed meanwhile: start from what is there now; {again}"
        return _error(InputError, repo_id, "stale_parent", "the repo changed since this push began", hint)
    if status == 429:
        return _error(
            RemoteError, repo_id, "rate_limited", "the Hub asks to slow down", f"wait a few minutes, then {again}"
        )
    if status >= 500:
        return _error(RemoteError, repo_id, "server", f"the Hub failed with status {status}", again)
    return _error(InputError, repo_id, "refused", f"the Hub answered {status}: {said}", f"see {page_of(repo_id)}")


def _said(error: Exception) -> str:
    said = getattr(error, "server_message", None)
    return first_line(Exception(said)) if said else first_line(error)


def first_line(error: Exception) -> str:
    """What an exception says, in one line, without the signatures of links: a signature opens the file to anybody."""
    lines = _QUERY.sub(r"\1", str(error).strip()).splitlines()
    return "".join(char if char.isprintable() else "?" for char in lines[0][:200]) if lines else type(error).__name__


def shown(found: object) -> str:
    """A part of an answer as a message may hold it: short, and nothing that a terminal obeys."""
    text = ascii(found) if isinstance(found, str | int | float | None) else type(found).__name__
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _error(kind: type[MoptError], repo_id: str, code: str, what: str, hint: str) -> MoptError:
    return kind(f"hf://{repo_id}: {what}", code=f"hub.{code}", path=f"hf://{repo_id}", hint=hint)
