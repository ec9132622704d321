"""The Hub of the tests is what the real client takes it for, over LFS and over Xet."""

import hashlib
import os
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import huggingface_hub
import pytest
from hub_support import HUB, hub_environment, start_afresh
from huggingface_hub import CommitOperationAdd, HfApi, errors, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.utils import get_session, http_backoff
from huggingface_hub.utils import httpx as http
from loopback_hub import LoopbackHub, XetMode
from packaging.requirements import Requirement
from packaging.version import Version

REPO = "alice/model"
WEIGHTS = "transformer/weights.safetensors"
# Compresses in part, so that Xet's chunks differ in how they are packed; several chunks long.
PAYLOAD = b"".join(hashlib.sha256(number.to_bytes(4, "little")).digest() + bytes(8) for number in range(12_000))
FILES = {"README.md": b"---\nlicense: mit\ntags:\n- nvfp4\n---\n# A model\n", "config.json": b"{}", WEIGHTS: PAYLOAD}


@pytest.fixture(params=["off", "http", "local"])
def any_hub(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    mode: XetMode = request.param
    return start_afresh(tmp_path, monkeypatch, mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "model"


@pytest.fixture
def api() -> HfApi:
    return HfApi(library_name="mopt", library_version="0")


def without_attributes(tree: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in tree.items() if path != ".gitattributes"}


def location(api: HfApi, revision: str = "main") -> str:
    return get_hf_file_metadata(hf_hub_url(REPO, WEIGHTS, revision=revision)).location


def ranged(url: str, low: int, high: int) -> http.Response:
    return get_session().get(url, headers={"Range": f"bytes={low}-{high}"})


def test_the_client_is_of_the_major_version_that_was_asked_for() -> None:
    # `make test` runs these tests once more with the next major version in front of the installed one.
    assert huggingface_hub.__version__ == version("huggingface_hub")
    assert Version(huggingface_hub.__version__).major == int(os.environ.get("MOPT_TEST_HUB", "1"))


def test_the_client_has_what_it_asks_for() -> None:
    # constraints-hub2.txt is installed without dependencies.
    seen, names = set(), ["huggingface_hub"]
    while names:
        seen.add(name := names.pop())
        for wanted in map(Requirement, requires(name) or []):
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                assert wanted.specifier.contains(version(wanted.name)), (name, wanted)
                names += {wanted.name} - seen


def test_nothing_here_knows_the_real_hub(hub: LoopbackHub) -> None:
    assert hub is HUB and HfApi().endpoint == hub.url
    assert HfApi().whoami()["name"] == "alice"
    script = (
        "import huggingface_hub as h; print(h.HfApi().endpoint, h.constants.HF_HUB_CACHE, h.HfApi().whoami()['name'])"
    )
    variables = hub_environment(hub)
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [hub.url, f"{variables['HF_HOME']}/hub", "alice"]


def test_upload_and_download(any_hub: LoopbackHub, api: HfApi, folder: Path) -> None:
    assert api.create_repo(REPO) == f"{any_hub.url}/{REPO}"
    assert api.create_repo(REPO, exist_ok=True) == f"{any_hub.url}/{REPO}"
    with pytest.raises(errors.HfHubHTTPError, match="already created"):
        api.create_repo(REPO)
    head = api.upload_folder(repo_id=REPO, folder_path=folder).oid
    assert head == any_hub.head(REPO)
    assert without_attributes(any_hub.tree(REPO)) == FILES

    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == head and info.tags == ["nvfp4"] and not info.private
    weights = next(file for file in info.siblings or [] if file.rfilename == WEIGHTS)
    assert weights.lfs is not None and weights.size == len(PAYLOAD)
    assert weights.lfs.sha256 == hashlib.sha256(PAYLOAD).hexdigest()
    listed = {file.path: file for file in api.list_repo_tree(REPO, recursive=True, revision=head)}
    assert listed.keys() == {".gitattributes", "transformer", *FILES}
    assert (getattr(listed[WEIGHTS], "xet_hash", None) is not None) == (any_hub.xet != "off")
    (again,) = api.get_paths_info(REPO, [WEIGHTS])
    assert again == listed[WEIGHTS]

    there = Path(snapshot_download(REPO))
    assert there.name == head
    assert {name: (there / name).read_bytes() for name in FILES} == FILES
    assert {request.user_agent.split(";")[0] for request in any_hub.requests(r"/commit/")} == {"mopt/0"}


def test_commits_and_pull_requests(any_hub: LoopbackHub, api: HfApi) -> None:
    api.create_repo(REPO)
    first = any_hub.head(REPO)
    adds = [CommitOperationAdd(WEIGHTS, PAYLOAD), CommitOperationAdd("README.md", FILES["README.md"])]
    second = api.create_commit(REPO, adds, commit_message="weights", parent_commit=first).oid
    assert [commit.title for commit in any_hub.commits(REPO)] == ["weights", "initial commit"]
    add = CommitOperationAdd("late.json", b"{}")
    with pytest.raises(errors.HfHubHTTPError) as stale:
        api.create_commit(REPO, [add], commit_message="late", parent_commit=first)
    assert stale.value.response.status_code == 412
    assert any_hub.head(REPO) == second

    late = CommitOperationAdd("late.json", b"{}")
    made = api.create_commit(REPO, [late], commit_message="late", create_pr=True, parent_commit=second)
    assert (made.pr_revision, made.pr_url) == ("refs/pr/1", f"{any_hub.url}/{REPO}/discussions/1")
    assert any_hub.head(REPO) == second and any_hub.head(REPO, "refs/pr/1") == made.oid
    assert any_hub.tree(REPO, "refs/pr/1") == any_hub.tree(REPO) | {"late.json": b"{}"}
    more = CommitOperationAdd("more.safetensors", PAYLOAD[::-1])
    api.create_commit(REPO, [more], commit_message="more", revision="refs/pr/1")
    api.merge_pull_request(REPO, 1)
    assert any_hub.tree(REPO).keys() == {".gitattributes", "README.md", "late.json", "more.safetensors", WEIGHTS}


def test_a_folder_as_a_pull_request_on_a_branch(any_hub: LoopbackHub, api: HfApi, folder: Path) -> None:
    any_hub.seed(REPO, folder)
    (folder / "config.json").write_text('{"changed": true}')
    made = api.upload_folder(repo_id=REPO, folder_path=folder, create_pr=True)
    assert made.pr_num == 1
    assert any_hub.tree(REPO, "refs/pr/1") == any_hub.tree(REPO) | {"config.json": b'{"changed": true}'}
    if any_hub.xet == "off":
        # Over Xet the client sends again what its own cache does not know: this Hub answers no global deduplication.
        assert not any_hub.requests("/_lfs/")
    api.create_branch(REPO, branch="next", revision="refs/pr/1")
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [branch.name for branch in refs.branches] == ["main", "next"]
    assert [pull.ref for pull in refs.pull_requests or []] == ["refs/pr/1"]
    assert any_hub.head(REPO, "next") == any_hub.head(REPO, "refs/pr/1")


@pytest.mark.parametrize("multipart_over", [0, 100_000])
def test_what_is_uploaded_ahead_is_not_sent_again(hub: LoopbackHub, api: HfApi, multipart_over: int) -> None:
    hub.multipart_over = multipart_over
    _upload_ahead(hub, api)
    assert hub.bytes_in("/_lfs/[0-9a-f]*(/part/.*)?$") >= len(PAYLOAD)
    assert len(hub.requests("/part/", "PUT")) == (5 if multipart_over else 0)


def test_what_is_uploaded_ahead_is_not_sent_again_with_xet(xet_hub: LoopbackHub, api: HfApi) -> None:
    _upload_ahead(xet_hub, api)
    assert xet_hub.bytes_in("/cas/v1/xorbs/") > 0 == xet_hub.bytes_in("/_lfs/")


def _upload_ahead(hub: LoopbackHub, api: HfApi) -> None:
    api.create_repo(REPO)
    add = CommitOperationAdd(WEIGHTS, PAYLOAD)
    api.preupload_lfs_files(REPO, [add])
    assert hub.tree(REPO).keys() == {".gitattributes"}
    sent = hub.bytes_in("/_lfs/|/cas/")
    api.create_commit(REPO, [add], commit_message="weights")
    assert hub.bytes_in("/_lfs/|/cas/") == sent
    assert hub.tree(REPO)[WEIGHTS] == PAYLOAD


def test_ranges_come_from_another_host_that_gets_no_token(any_hub: LoopbackHub, api: HfApi, folder: Path) -> None:
    head = any_hub.seed(REPO, folder)
    assert any_hub.log == []
    metadata = get_hf_file_metadata(hf_hub_url(REPO, WEIGHTS))
    assert (metadata.commit_hash, metadata.size) == (head, len(PAYLOAD))
    assert metadata.etag == hashlib.sha256(PAYLOAD).hexdigest()
    assert (metadata.xet_file_data is not None) == (any_hub.xet != "off")
    answer = ranged(metadata.location, 1000, 1999)
    assert (answer.status_code, answer.headers["Content-Range"]) == (206, f"bytes 1000-1999/{len(PAYLOAD)}")
    assert answer.content == PAYLOAD[1000:2000]
    followed = http_backoff(
        "GET",
        hf_hub_url(REPO, WEIGHTS),
        headers={"Range": "bytes=-100", "Authorization": "Bearer hf_owner"},
        follow_redirects=True,
    )
    assert followed.content == PAYLOAD[-100:]
    resolved, cdn = any_hub.requests("/resolve/"), any_hub.requests("/_cdn/")
    assert [request.authorized for request in resolved] == [True, True]
    assert [(request.authorized, request.num_out, request.range) for request in cdn] == [
        (False, 1000, "bytes=1000-1999"),
        (False, 100, "bytes=-100"),
    ]
    assert not {request.host for request in resolved} & {request.host for request in cdn}
    small = ranged(hf_hub_url(REPO, "config.json"), 1, 5)
    assert (small.status_code, small.content) == (206, b"}")
    assert ranged(metadata.location, len(PAYLOAD), len(PAYLOAD) + 1).status_code == 416


def test_links_expire(hub: LoopbackHub, api: HfApi, folder: Path) -> None:
    hub.seed(REPO, folder)
    old = location(api)
    assert ranged(old, 0, 9).status_code == 206
    hub.expire_links()
    assert ranged(old, 0, 9).status_code == 403
    assert ranged(location(api), 0, 9).content == PAYLOAD[:10]
    assert get_session().get(old.partition("?")[0]).status_code == 403


def test_the_client_reads_a_range_through_xet(xet_hub: LoopbackHub, folder: Path) -> None:
    import hf_xet

    xet_hub.seed(REPO, folder)
    (file,) = HfApi().get_paths_info(REPO, [WEIGHTS])
    url = f"{xet_hub.url}/api/models/{REPO}/xet-read-token/main"
    authorization = {"Authorization": "Bearer hf_owner"}
    group = hf_xet.XetSession().new_download_stream_group(token_refresh_url=url, token_refresh_headers=authorization)
    info = hf_xet.XetFileInfo(file.xet_hash, file.size)
    for low, high in [(0, 10), (200_000, 300_000), (len(PAYLOAD) - 5, len(PAYLOAD))]:
        assert b"".join(group.download_stream(info, low, high)) == PAYLOAD[low:high]
    assert 0 < xet_hub.bytes_out("/cas/fetch/") < len(PAYLOAD)


def test_refusals_are_the_clients_own_errors(hub: LoopbackHub, folder: Path) -> None:
    owner, reader, nobody = HfApi(), HfApi(token="hf_reader"), HfApi(token=False)
    hub.seed(REPO, folder)
    hub.seed("alice/gated", folder, gated=True)
    hub.seed("alice/private", folder, private=True)
    for api in (reader, nobody):
        with pytest.raises(errors.GatedRepoError):
            api.auth_check("alice/gated")
        with pytest.raises(errors.GatedRepoError):
            api.hf_hub_download("alice/gated", "config.json")
        assert api.model_info("alice/gated").gated == "auto"
        for name in ("alice/private", "alice/missing"):
            with pytest.raises(errors.RepositoryNotFoundError) as error:
                api.model_info(name)
            assert not isinstance(error.value, errors.GatedRepoError)
    with pytest.raises(errors.RevisionNotFoundError):
        owner.model_info(REPO, revision="missing")
    with pytest.raises(errors.RemoteEntryNotFoundError):
        owner.hf_hub_download(REPO, "missing.json")
    with pytest.raises(errors.HfHubHTTPError) as error:
        HfApi(token="hf_wrong").model_info(REPO)
    assert type(error.value) is errors.HfHubHTTPError and error.value.response.status_code == 401
    owner.auth_check(REPO, write=True)
    with pytest.raises(errors.HfHubHTTPError) as error:
        reader.auth_check(REPO, write=True)
    assert error.value.response.status_code == 403
    with pytest.raises(errors.HfHubHTTPError, match="write access"):
        reader.create_commit(REPO, [CommitOperationAdd("a", b"a")], commit_message="a")
    with pytest.raises(errors.HfHubHTTPError, match="rights to create"):
        reader.create_repo("alice/another")
    add = CommitOperationAdd(WEIGHTS, b"\0better")
    assert reader.create_commit(REPO, [add], commit_message="better", create_pr=True).pr_num == 1
    with pytest.raises((errors.BadRequestError, ValueError), match="base_model_relation"):
        card = b"---\nbase_model_relation: cousin\n---\n"
        owner.create_commit(REPO, [CommitOperationAdd("README.md", card)], commit_message="card")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_the_client_tries_again(hub: LoopbackHub, folder: Path, status: int) -> None:
    hub.seed(REPO, folder)
    hub.fault("/_cdn/", status=status, times=2)
    url = hf_hub_url(REPO, WEIGHTS)
    assert http_backoff("GET", url, follow_redirects=True).content == PAYLOAD
    assert [request.status for request in hub.requests("/_cdn/")] == [status, status, 200]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_planted_status(hub: LoopbackHub, api: HfApi, status: int) -> None:
    api.create_repo(REPO)
    hub.fault("/api/models/", method="GET", status=status, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(errors.GatedRepoError):
        api.model_info(REPO)
    assert api.model_info(REPO).id == REPO


def test_a_body_that_is_cut(hub: LoopbackHub, api: HfApi, folder: Path) -> None:
    hub.seed(REPO, folder)
    url = location(api)
    hub.fault("/_cdn/", cut=5000)
    with pytest.raises(http.RemoteProtocolError):
        get_session().get(url)
    assert hub.bytes_out("/_cdn/") == 5000
    hub.fault("/_cdn/", cut=5000)
    assert Path(api.hf_hub_download(REPO, WEIGHTS)).read_bytes() == PAYLOAD
    assert [request.num_out for request in hub.requests("/_cdn/")] == [5000, 5000, len(PAYLOAD)]


def test_faults_in_ranges(hub: LoopbackHub, api: HfApi, folder: Path) -> None:
    hub.seed(REPO, folder)
    url, end = location(api), len(PAYLOAD) - 1
    hub.fault("weights", kind="ignore_range")
    assert get_session().get(url).content == PAYLOAD
    whole = ranged(url, 10, 19)
    assert (whole.status_code, whole.content, "Content-Range" in whole.headers) == (200, PAYLOAD, False)
    hub.fault("weights", kind="wrong_range", times=2)
    for asked, given in [((10, 19), (11, 20)), ((end - 9, end), (end - 10, end - 1))]:
        wrong = ranged(url, *asked)
        assert (wrong.status_code, wrong.content) == (206, PAYLOAD[given[0] : given[1] + 1])
        assert wrong.headers["Content-Range"] == f"bytes {given[0]}-{given[1]}/{len(PAYLOAD)}"
    hub.fault("weights", kind="short")
    short = ranged(url, 10, 19)
    assert (short.status_code, short.content, short.headers["Content-Length"]) == (206, PAYLOAD[10:15], "5")
    assert ranged(url, 10, 19).content == PAYLOAD[10:20]


def test_another_etag_and_a_stall(hub: LoopbackHub, folder: Path) -> None:
    hub.seed(REPO, folder)
    url = hf_hub_url(REPO, WEIGHTS)
    right = get_hf_file_metadata(url)
    hub.fault("/resolve/", kind="other_etag")
    other = get_hf_file_metadata(url)
    assert other.etag != right.etag and len(other.etag or "") == 64 and other.commit_hash == right.commit_hash
    assert get_hf_file_metadata(url).etag == right.etag
    hub.fault("/_cdn/", stall=0.3)
    with pytest.raises(http.ReadTimeout):
        get_session().get(right.location, timeout=0.1)
    assert get_session().get(right.location, timeout=10).content == PAYLOAD
