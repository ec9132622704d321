"""Inputs from a Hub that lies or stalls: a documented exit code, one line, an end, and nothing written elsewhere."""

import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile_hub import FEW, HEADERS, VALUES, Lies, elsewhere, inspect, share
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from support import Outcome, run_mopt

from modelopt_convert.checkpoint.hub import answers, client, range_source, watch
from modelopt_convert.run.errors import InputError

INFO = r"^/api/models/alice/base(/revision/[^/]+)?$"
TREE = r"^/api/models/alice/base/tree/"
RESOLVE, CDN = r"^/alice/base/resolve/", r"^/_cdn/"
WEIGHTS = 5  # of the listing: the first shard
FIELDS: tuple[tuple[str, tuple[str | int, ...]], ...] = (
    (INFO, ()),
    (INFO, ("sha",)),
    (TREE, ()),
    *(
        (TREE, (entry, *field))
        for entry in (0, -1)
        for field in ((), ("type",), ("path",), ("oid",), ("size",), ("lfs",), ("xetHash",))
    ),
    *((TREE, (WEIGHTS, *field)) for field in (("path",), ("size",), ("lfs",), ("lfs", "oid"), ("lfs", "size"))),
)
FIELD_IDS = [f"{'list' if match == TREE else 'info'}{list(field)}" for match, field in FIELDS]
NAMES = (
    "X-Repo-Commit", "ETag", "X-Linked-ETag", "X-Linked-Size", "Location", "Content-Length", "Content-Range",
    "Content-Encoding", "Content-Type", "Link", "X-Xet-Hash", "X-Error-Code", "X-Error-Message",
)  # fmt: skip


@pytest.fixture
def lies(hub: LoopbackHub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> Lies:
    """A Hub with a base, and limits of time that tests can wait for."""
    for name, seconds in (("ANSWER_S", 5.0), ("STALL_S", 5.0), ("PATIENCE_S", 2.0)):
        monkeypatch.setattr(watch, name, seconds)
    hub.seed("alice/base", base)
    return Lies(hub, tmp_path)


def fresh(lies: Lies, *more: str) -> Outcome:
    """``inspect`` with an empty cache."""
    shutil.rmtree(lies.outside / "_home", ignore_errors=True)
    return inspect(*more)


def test_the_listing_has_what_is_lied_about(lies: Lies) -> None:
    """Else the cases below would change nothing."""
    found = []
    lies.hub.twist(TREE, lambda content: found.append(content) or content)  # type: ignore[func-returns-value]
    assert inspect().exit_code == 0
    assert "lfs" in found[0][WEIGHTS] and found[0][0]["type"] == "file"


@pytest.mark.parametrize("more", [(), ("--download",)], ids=["ranges", "download"])
@pytest.mark.parametrize(("match", "field"), FIELDS, ids=FIELD_IDS)
def test_no_field_leads_astray(lies: Lies, match: str, field: tuple[str | int, ...], more: tuple[str, ...]) -> None:
    told = share(VALUES.values(), match, field, more)
    for value in told:
        lies.json(match, field, value, lambda: fresh(lies, *more))
    assert lies.cases == len(told) > 0


@pytest.mark.parametrize("match", [INFO, TREE, RESOLVE, CDN], ids=["info", "tree", "resolve", "bytes"])
@pytest.mark.parametrize("name", NAMES)
def test_no_header_leads_astray(lies: Lies, match: str, name: str) -> None:
    told = share(HEADERS.values(), match, name)
    for value in told:
        lies.header(match, name, value, lambda: fresh(lies))
    if match in (RESOLVE, CDN):
        for value in share(("digits", "up", "quoted up", "zeros"), match, name):
            lies.header(match, name, HEADERS[value], lambda: fresh(lies, "--download"))
    assert lies.cases >= len(told) > 0


@pytest.mark.parametrize("match", [INFO, TREE, RESOLVE, CDN], ids=["info", "tree", "resolve", "bytes"])
@pytest.mark.parametrize("status", [200, 204, 302, 304, 401, 403, 404, 416, 418, 429, 503])
def test_no_status_leads_astray(lies: Lies, match: str, status: int) -> None:
    answers = itertools.product(("Location", "Retry-After", "X-Error-Code"), ("", "http://[::1", "9" * 30))
    for name, value in share(answers, match, status):
        lies.header(match, name, value, lambda: fresh(lies), status=status)


BUILD = ("build-nvfp4", "--preset", "flux1-dev")
COMMANDS: dict[str, Callable[[Path, Path], Outcome]] = {
    "dry run": lambda out, _: run_mopt(*BUILD, "--base", "hf://alice/base", "--output", out, "--dry-run"),
    "build": lambda out, _: run_mopt(*BUILD, "--base", "hf://alice/base", "--output", out, "--overwrite"),
    "verify": lambda _, built: run_mopt("verify", built, "--base", "hf://alice/base"),
    "checkpoint": lambda out, export: run_mopt(
        "convert-fp8", "--preset", "flux1-dev", "--export", export, "--checkpoint", "hf://alice/base/old.pt",
        "--output", out, "--overwrite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_no_field_leads_a_command_astray(
    lies: Lies, command: str, built_nvfp4: Path, fp8: Path, old: Path, good: Path, base: Path, tmp_path: Path
) -> None:
    del base
    beside = tmp_path / "_hub" / "pickle"
    beside.mkdir()
    (beside / "old.pt").write_bytes(good.read_bytes())
    lies.hub.seed("alice/base", beside)
    given = old if command == "checkpoint" else built_nvfp4
    one = COMMANDS[command]
    for (match, field), name in share(itertools.product(FIELDS, FEW), command):
        lies.json(match, field, VALUES[name], lambda: one(tmp_path / "out", given))
    for header, value in share(itertools.product(NAMES, ("up", "digits")), command):
        lies.header(RESOLVE, header, HEADERS[value], lambda: one(tmp_path / "out", given))


@pytest.mark.parametrize("match", [INFO, TREE, RESOLVE, CDN], ids=["info", "tree", "resolve", "bytes"])
@pytest.mark.parametrize("fault", [{"kind": "drip"}, {"kind": "drip_headers"}, {"stall": 30}], ids=str)
@pytest.mark.parametrize("more", [(), ("--download",)], ids=["ranges", "download"])
def test_what_stalls_or_trickles_ends(
    lies: Lies, match: str, fault: dict[str, Any], more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if match == RESOLVE and fault.get("kind") == "drip":
        match = RESOLVE + ".*json"  # those of shards have no body
    for name, seconds in (("ANSWER_S", 1.0), ("STALL_S", 1.0), ("PATIENCE_S", 1.5)):
        monkeypatch.setattr(watch, name, seconds)
    monkeypatch.setattr(range_source, "PAUSES_S", (0.0,) * 50)  # time ends it, and not their number
    lies.hub.fault(match, times=10_000, **fault)
    begun = time.monotonic()
    outcome = lies.hold(lambda: fresh(lies, *more))
    assert time.monotonic() - begun < 12
    assert (outcome.exit_code, outcome.error_code) == (5, "hub.stalled"), outcome.stdout
    assert " in 1 s" in outcome.message and "again" in outcome.message


def test_the_limits_make_less_than_two_minutes() -> None:
    """A range: what may pass before the last attempt, the last pause, and the last attempt."""
    assert watch.ANSWER_S < 120
    assert watch.PATIENCE_S + watch.STALL_S + client._LONGEST_PAUSE_S < 120
    assert max(client.PAUSES_S) <= client._LONGEST_PAUSE_S


def test_a_server_that_asks_to_wait_long_is_not_heeded_for_ever() -> None:
    assert client.retry_after({"Retry-After": "9" * 400}) == client._LONGEST_PAUSE_S


def test_what_the_hub_says_is_one_line_that_no_terminal_obeys() -> None:
    assert client.first_line(ValueError("a\x1b[31m\x9bb\u202ec\nd")) == "a?[31m?b?c"
    assert client.shown("\x1b" * 100) == "'" + "\\x1b" * 14 + "\\x1..."
    assert client.shown([]) == "list"


def test_a_list_without_end_ends(lies: Lies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_MAX_FILES", 50)
    lies.hub.fault(TREE, headers={"Link": f'<{lies.hub.url}/x?recursive=true&cursor=0>; rel="next"'}, times=10_000)
    outcome = lies.hold(lambda: fresh(lies))
    assert (outcome.exit_code, outcome.error_code) == (3, "hub.answer")


def test_the_next_page_is_asked_of_the_same_hub(lies: Lies) -> None:
    """The request holds the token."""
    lies.hub.fault(TREE, headers={"Link": '<http://127.0.0.1:9/elsewhere?cursor=1000>; rel="next"'}, times=1)
    lies.hold(lambda: fresh(lies))
    assert lies.hub.requests("/tree/.*cursor=1000")


@pytest.mark.parametrize("status", [302, 307, 308])
@pytest.mark.parametrize("to", ["http://127.0.0.1:{port}", "//127.0.0.1:{port}", "https://127.0.0.1:{hub}"])
def test_no_redirect_takes_the_token_elsewhere(lies: Lies, to: str, status: int) -> None:
    """To huggingface_hub 1 the same host is the same Hub, whatever port and scheme; 2 itself goes no further."""
    with elsewhere() as (port, heard):
        there = to.format(port=port, hub=lies.hub.url.rpartition(":")[2])
        for more in ((), ("--download",)):
            lies.hub.fault(RESOLVE, method="HEAD", status=status, headers={"Location": f"{there}/x"}, times=10_000)
            outcome = lies.hold(lambda more=more: fresh(lies, *more))  # type: ignore[misc]
            assert outcome.exit_code == 3 and heard == [], outcome.stderr
            assert outcome.error_code == "hub.changed" or (
                outcome.error_code == "hub.answer" and there.removeprefix("//") in outcome.message
            )


def test_the_token_stays_with_scheme_host_and_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx itself takes a token from http to https; requests of others in the process are none of our business."""
    httpx = client.http_library()
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.test")
    to = ""

    def answer(asked: Any) -> Any:
        return httpx.Response(200) if asked.url.path == "/x" else httpx.Response(302, headers={"Location": to})

    transport = httpx.MockTransport(answer)
    with client._guarded(lambda: httpx.Client(transport=transport, follow_redirects=True)) as session:
        for place in ("https://hub.test/x", "https://hub.test:443/x"):
            to = place
            with pytest.raises(InputError) as caught:
                session.get("http://hub.test", headers=client.hub_headers() | {"authorization": "Bearer x"})
            assert caught.value.code == "hub.answer"
            assert session.get("http://hub.test", headers={"authorization": "Bearer x"}).status_code == 200
        to = "http://hub.test:80/x"
        assert session.get("http://hub.test", headers={**client.hub_headers(), "authorization": "x"}).status_code == 200


def test_an_answer_without_end_is_not_kept(lies: Lies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_MAX_ANSWER_BYTES", 1000)
    outcome = lies.hold(lambda: fresh(lies))
    assert (outcome.exit_code, outcome.error_code) == (3, "hub.answer")


def test_a_commit_that_was_asked_for_is_the_one_that_is_read(lies: Lies) -> None:
    asked = lies.hub.head("alice/base")
    lies.hub.twist(INFO, lambda content: content | {"sha": "0" * 40})
    outcome = lies.hold(lambda: run_mopt("inspect", f"hf://alice/base@{asked}"))
    assert (outcome.exit_code, outcome.error_code) == (3, "hub.answer") and asked in outcome.message


def test_downloaded_bytes_are_those_of_the_listing(lies: Lies) -> None:
    """Of the right length, at the right link, and others."""
    shard = next(path for path in (lies.hub.root / "lfs").iterdir())
    shard.write_bytes(bytes(shard.stat().st_size))
    outcome = lies.hold(lambda: fresh(lies, "--download"))
    assert (outcome.exit_code, outcome.error_code) == (3, "hub.answer") and "digest" in outcome.message
    assert not list((lies.outside / "_home").rglob("*incomplete"))


def test_a_list_of_files_without_end_ends(lies: Lies, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page comes soon, with a path that no page had before, and names another."""
    monkeypatch.setattr(watch, "ANSWER_S", 1.0)
    monkeypatch.setattr(answers, "_MAX_FILES", 100)  # else it would end with this, after hours
    numbers = itertools.count()
    lies.hub.twist(TREE, lambda content: [content[0] | {"path": f"file{next(numbers)}"}])
    lies.hub.fault(TREE, headers={"Link": f'<{lies.hub.url}/x?cursor=1>; rel="next"'}, times=10_000, stall=0.1)
    begun = time.monotonic()
    outcome = lies.hold(inspect)
    assert time.monotonic() - begun < 20
    assert (outcome.exit_code, outcome.error_code) == (5, "hub.stalled"), outcome.stdout


@pytest.mark.parametrize("revision", ["..", ".", "..%2Fx", "a%2F..%2F..%2Fx"])
def test_no_revision_leads_out_of_the_cache(lies: Lies, revision: str) -> None:
    outcome = run_mopt("inspect", f"hf://alice/base@{revision}", "--download")
    assert outcome.exit_code == 2 and not list((lies.outside / "_home").rglob("refs"))


def test_xet_is_no_place_on_this_disk(
    xet_hub: LoopbackHub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf_xet itself makes folders at the place that the Hub names."""
    monkeypatch.setattr(range_source, "XET_BYTES", 1 << 10)
    xet_hub.seed("alice/base", base)
    lies = Lies(xet_hub, tmp_path)
    token = "/xet-read-token/"
    for value in VALUES.values():
        for field in ((), ("casUrl",), ("accessToken",), ("exp",)):
            lies.json(token, field, value, lambda: fresh(lies, "--download"))
    xet_hub.twist(token, lambda content: content | {"casUrl": f"local://{tmp_path}/escaped"})
    outcome = lies.hold(lambda: fresh(lies, "--download"))
    assert (outcome.exit_code, outcome.error_code) == (3, "hub.answer") and "casUrl" in outcome.message
