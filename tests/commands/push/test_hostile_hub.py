"""mopt push to a Hub that lies or stalls: a documented exit code, one line, an end, and nothing written elsewhere."""

import logging
import time
from pathlib import Path
from typing import Any

import pytest
from hostile_hub import FEW, VALUES, Lies, elsewhere, put, share
from huggingface_hub import constants
from huggingface_hub.utils import _http, get_session, set_client_factory
from loopback_hub import LoopbackHub
from push_support import REPO, contents, published, push

from modelopt_convert.checkpoint.hub import answers, client, watch
from modelopt_convert.commands.push.command import PushCommand

WHO, REFS, TREE = "/whoami", "/api/models/alice/flux/refs", "/api/models/alice/flux/tree/"
PREUPLOAD, BATCH, COMMIT, CARD = "/preupload/", "/info/lfs/objects/batch", "/commit/main", "/validate-yaml"
FIELDS: tuple[tuple[str, tuple[str | int, ...]], ...] = (
    *((WHO, field) for field in ((), ("name",), ("orgs",), ("auth",), ("auth", "accessToken"))),
    (WHO, ("auth", "accessToken", "role")),
    *((REFS, field) for field in ((), ("branches",), ("branches", 0), ("branches", 0, "name"), ("tags",))),
    (REFS, ("branches", 0, "targetCommit")),
    *((TREE, field) for field in ((), (0,), (0, "type"), (0, "path"), (0, "oid"), (0, "size"))),
    *((PREUPLOAD, field) for field in ((), ("files",), ("files", 0), ("files", 0, "path"), ("files", 0, "uploadMode"))),
    *((BATCH, field) for field in ((), ("transfer",), ("objects",), ("objects", 0), ("objects", 0, "oid"))),
    *((BATCH, ("objects", 0, *field)) for field in (("size",), ("actions",), ("actions", "upload"))),
    *((BATCH, ("objects", 0, "actions", *field)) for field in (("upload", "href"), ("upload", "header"), ("verify",))),
    *((COMMIT, field) for field in ((), ("commitOid",), ("commitUrl",), ("pullRequestUrl",))),
    *((CARD, field) for field in ((), ("errors",))),
    ("/api/repos/create", ()),
    ("/api/repos/create", ("url",)),
    ("/api/models/alice/flux$", ("private",)),
)


@pytest.fixture
def lies(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lies:
    """Limits of time that tests can wait for; what is pushed was verified."""
    for name, seconds in (("ANSWER_S", 5.0), ("STALL_S", 5.0), ("PATIENCE_S", 2.0)):
        monkeypatch.setattr(watch, name, seconds)
    # A call that was given up goes on, and the client logs to a stream of a test that is over.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setattr(PushCommand, "_verify", lambda _self, _progress: None)
    return Lies(hub, tmp_path)


def afresh(lies: Lies) -> None:
    lies.hub.reset(lies.outside / "_hub" / str(lies.cases))


@pytest.mark.parametrize(("match", "field"), FIELDS, ids=[f"{match}{list(field)}" for match, field in FIELDS])
def test_no_field_leads_a_push_astray(lies: Lies, built: Path, match: str, field: tuple[str | int, ...]) -> None:
    more = ("--private",) if "private" in field else ()
    for name in share((*FEW, "gone", "zero", "newline", "deep", "file"), match, field):
        afresh(lies)
        if more:
            lies.hub.store.create(REPO, "alice", private=True)
        lies.json(match, field, VALUES[name], lambda: push(built, REPO, *more))


@pytest.mark.parametrize("match", [WHO, REFS, TREE, PREUPLOAD, BATCH, COMMIT, CARD, "/_lfs/", "/auth-check"])
@pytest.mark.parametrize("fault", [{"kind": "drip"}, {"kind": "drip_headers"}, {"stall": 30}], ids=str)
def test_a_push_that_stalls_ends(
    lies: Lies, built: Path, match: str, fault: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if match == "/auth-check" and fault.get("kind") == "drip":
        match = "/validate-yaml"  # the former has no body
    monkeypatch.setattr(watch, "ANSWER_S", 1.5)
    lies.hub.fault(match, times=10_000, **fault)
    begun = time.monotonic()
    outcome = lies.hold(lambda: push(built))
    assert time.monotonic() - begun < 20
    assert (outcome.exit_code, outcome.error_code) == (5, "hub.stalled"), outcome.stdout
    assert " in 2 s" in outcome.message and f"mopt push {built} {REPO}" in outcome.message


def test_an_upload_that_moves_is_no_stall(lies: Lies, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take longer than an answer."""
    monkeypatch.setattr(watch, "LEAST_BYTES_SENT", 1)
    monkeypatch.setattr(watch, "ANSWER_S", 1.5)
    real = watch.Traffic.__call__
    monkeypatch.setattr(watch.Traffic, "__call__", lambda self: real(self) + int(time.monotonic() * 10))
    lies.hub.fault("/_lfs/", method="PUT", stall=3)
    assert push(built).exit_code == 0


def test_xet_is_no_place_on_this_disk(xet_hub: LoopbackHub, built: Path, tmp_path: Path) -> None:
    """hf_xet itself would write what is sent to the place that the Hub names."""
    lies = Lies(xet_hub, tmp_path)
    xet_hub.twist("/xet-write-token/", lambda content: content | {"casUrl": f"local://{tmp_path}/escaped"})
    outcome = lies.hold(lambda: push(built))
    assert (outcome.exit_code, outcome.error_code) == (3, "hub.answer") and "casUrl" in outcome.message


@pytest.mark.parametrize("trusted", [True, False])
def test_xet_is_for_a_hub_that_is_trusted(
    xet_hub: LoopbackHub, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    """hf_xet asks for itself where to send: a Hub may tell mopt an address, and hf_xet a folder."""
    if not trusted:
        monkeypatch.setattr(answers, "TRUSTED", ("https://huggingface.co",))
        xet_hub.twist("/xet-write-token/", lambda content: content | {"casUrl": f"local://{tmp_path}/escaped"})
    before = constants.HF_HUB_DISABLE_XET
    assert push(built).exit_code == 0 and published(xet_hub) == contents(built)
    assert bool(xet_hub.requests("/xet-write-token/")) == bool(xet_hub.requests("/xorbs/")) == trusted
    assert not (tmp_path / "escaped").exists() and before == constants.HF_HUB_DISABLE_XET


@pytest.mark.parametrize(("action", "scheme"), [("verify", "http"), ("verify", "https"), ("upload", "http")])
def test_the_token_goes_to_the_endpoint_alone(lies: Lies, built: Path, action: str, scheme: str) -> None:
    """An LFS upload goes wherever the Hub says, as to the storage of a cloud; what has the token does not."""
    with elsewhere() as (port, heard):
        there = f"{scheme}://127.0.0.1:{port}/evil"
        lies.hub.twist(BATCH, lambda content: put(content, ("objects", 0, "actions", action), {"href": there}))
        outcome = lies.hold(lambda: push(built))
    assert all("authorization" not in headers for headers in heard), heard
    if action == "verify":
        assert (outcome.exit_code, outcome.error_code) == (3, "hub.answer"), outcome.stderr
        assert there in outcome.message and heard == []


def test_the_client_is_guarded() -> None:
    """Its first request is made with nothing but the client."""
    before = _http._GLOBAL_CLIENT_FACTORY
    set_client_factory(_http.default_client_factory)
    try:
        client.hub_api()
        assert len(get_session().event_hooks["request"]) == 2
    finally:
        set_client_factory(before)
