"""What the client asks before it moves any bytes: repos, revisions, listings, tokens, pull requests."""

import base64
import hashlib
import json
import re
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

import yaml

from loopback_hub.access import Access
from loopback_hub.records import HubError
from loopback_hub.store import Commit, Entry, Pull, Repo, is_lfs

RELATIONS = ("finetune", "quantized", "merge", "adapter")
PAGE = 1000
PAGE_EXPANDED = 50
_ID = r"([^/]+/[^/]+)"


class Api(Access):
    """The routes below /api."""

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write" if user == "alice" else "read"}
        known = {"type": "user", "id": user, "name": user, "fullname": user, "isPro": False, "orgs": []}
        self.send_json(known | {"auth": {"type": "access_token", "accessToken": token}})

    def agents(self) -> None:
        self.send_json({"standardEnvVars": [], "harnesses": {}})

    def create_repo(self) -> None:
        asked, user = self.body_json(), self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        namespace = asked.get("organization") or user
        if user not in ("alice", namespace):
            raise HubError(403, "You don't have the rights to create a model under this namespace")
        repo_id = f"{namespace}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": _identity(repo_id)}
        with self.hub.store.lock:
            if repo_id in self.hub.store.repos:
                error = "You already created this model repo"
                return self.send_json(answer | {"error": error}, 409, {"X-Error-Message": error})
            self.hub.store.create(repo_id, user, private=asked.get("visibility") == "private")
        self.send_json(answer)

    def validate_yaml(self) -> None:
        match = re.match(r"\s*---\n(.*?)\n---", self.body_json()["content"], re.DOTALL)
        errors, warnings = [], []
        if match is None:
            warnings.append({"message": "empty or missing yaml metadata in repo card"})
        else:
            try:
                card = yaml.safe_load(match[1]) or {}
            except yaml.YAMLError as error:
                errors.append({"message": str(error)})
            else:
                if card.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
                    errors.append({"message": f'"base_model_relation" must be one of {", ".join(RELATIONS)}'})
        self.send_json({"warnings": warnings, "errors": errors}, 400 if errors else 200)

    def auth_check(self, repo_id: str, write: str | None) -> None:
        self.readable(repo_id)
        if write is not None:
            self.writable(repo_id)
        self.send_bytes()

    def info(self, repo_id: str, revision: str | None) -> None:
        repo, store = self.repo(repo_id), self.hub.store
        commit = store.commit(repo, revision or "main")
        card = store.card(commit.tree)
        bases = card.get("base_model") or []
        bases = [bases] if isinstance(bases, str) else bases
        relation = card.get("base_model_relation", "finetune")
        tags = [*card.get("tags", []), *(f"base_model:{base}" for base in bases)]
        tags += [f"base_model:{relation}:{base}" for base in bases]
        self.send_json(
            {
                "_id": _identity(repo_id),
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.split("/")[0],
                "sha": commit.oid,
                "lastModified": commit.date,
                "createdAt": repo.created,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": tags,
                "library_name": card.get("library_name"),
                "pipeline_tag": card.get("pipeline_tag"),
                "cardData": card or None,
                "siblings": [
                    _sibling(path, entry, "blobs" in self.query) for path, entry in sorted(commit.tree.items())
                ],
                "usedStorage": sum(entry.size for entry in commit.tree.values()),
            }
        )

    def tree(self, repo_id: str, revision: str, folder: str | None) -> None:
        store, repo = self.hub.store, self.repo(repo_id)
        commit = store.commit(repo, revision)
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        inside = {path: entry for path, entry in commit.tree.items() if path.startswith(prefix)}
        if folder and not inside:
            raise HubError(404, f'{folder} does not exist on "{revision}"', "EntryNotFound")
        recursive, expand = (self.query.get(name, "").lower() == "true" for name in ("recursive", "expand"))
        nodes: dict[str, dict[str, Any]] = {}
        for path, entry in inside.items():
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                above = prefix + "/".join(parts[:depth])
                nodes[above] = _folder(above)
            if recursive or len(parts) == 1:
                nodes[path] = self._node(path, entry)
                if expand:
                    nodes[path]["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": commit.date}
        items = [node for _, node in sorted(nodes.items())]
        limit = min(int(self.query.get("limit", PAGE)), PAGE_EXPANDED if expand else PAGE)
        start = int(self.query.get("cursor", 0))
        headers = {}
        if start + limit < len(items):
            query = urllib.parse.urlencode({**self.query, "cursor": start + limit})
            headers["Link"] = f'<{self.hub.url}{self.path.partition("?")[0]}?{query}>; rel="next"'
        self.send_json(items[start : start + limit], headers=headers)

    def paths_info(self, repo_id: str, revision: str) -> None:
        tree = self.hub.store.commit(self.repo(repo_id), revision).tree
        raw = self.body().decode()
        paths = json.loads(raw)["paths"] if raw.startswith("{") else urllib.parse.parse_qs(raw)["paths"]
        found = []
        for path in paths:
            if path in tree:
                found.append(self._node(path, tree[path]))
            elif any(other.startswith(f"{path.rstrip('/')}/") for other in tree):
                found.append(_folder(path))
        self.send_json(found)

    def _node(self, path: str, entry: Entry) -> dict[str, Any]:
        node: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
        if entry.sha256 is not None:
            node["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        if (hashed := self.hub.store.xet.hash_of(entry.sha256)) is not None:
            node["xetHash"] = hashed
        return node

    def refs(self, repo_id: str) -> None:
        refs = self.repo(repo_id).refs
        pulls = [_ref(name, name, oid) for name, oid in refs.items() if name.startswith("refs/pr/")]
        branches = [_ref(name, f"refs/heads/{name}", oid) for name, oid in refs.items() if not name.startswith("refs/")]
        self.send_json({"branches": branches, "converts": [], "tags": [], "pullRequests": pulls})

    def commits(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id)
        self.send_json([_history_line(repo, commit) for commit in self.hub.store.history(repo, revision)])

    def branch(self, repo_id: str, name: str) -> None:
        repo, asked = self.writable(repo_id), self.body_json()
        with self.hub.store.lock:
            if self.command == "DELETE":
                del repo.refs[name]
            elif name in repo.refs:
                raise HubError(409, "Reference already exists")
            else:
                repo.refs[name] = self.hub.store.commit(repo, asked.get("startingPoint") or "main").oid
        self.send_bytes()

    def xet_token(self, repo_id: str, kind: str, revision: str) -> None:
        if kind == "write":
            self.writable(repo_id, revision)
        else:
            self.readable(repo_id)
        url, token, until = self.hub.store.xet.cas_url, f"xet-{kind}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until)}
        self.send_json({"accessToken": token, "exp": until, "casUrl": url}, headers=headers)

    def preupload(self, repo_id: str, revision: str) -> None:
        repo = self.writable(repo_id, revision)
        commit = self.hub.store.commit(repo, revision)
        answers = []
        for file in self.body_json()["files"]:
            lfs = is_lfs(file["path"], file["size"], base64.b64decode(file.get("sample") or ""))
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if (entry := commit.tree.get(file["path"])) is not None:
                answer["oid"] = entry.etag
            answers.append(answer)
        self.send_json({"files": answers, "commitOid": commit.oid})

    def commit(self, repo_id: str, revision: str) -> None:
        repo, store = self.writable(repo_id, revision), self.hub.store
        header, *operations = [json.loads(line) for line in self.body().splitlines() if line.strip()]
        asked = header["value"]
        with store.lock:
            store.xet.scan()
            parent = store.commit(repo, revision)
            if not parent.oid.startswith(asked.get("parentCommit") or ""):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(parent.tree)
            for operation in operations:
                self._apply(tree, operation["key"], operation["value"])
            made = store.add_commit(parent.oid, asked["summary"], tree, asked.get("description", ""))
            answer = {
                "success": True,
                "commitOid": made.oid,
                "commitUrl": f"{self.hub.url}/{repo_id}/commit/{made.oid}",
            }
            if "create_pr" in self.query:
                pull = repo.open_pull(made.title, made.description, "open", made.oid)
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{pull.number}"
            else:
                repo.refs[revision.removeprefix("refs/heads/")] = made.oid
        self.send_json(answer)

    def _apply(self, tree: dict[str, Entry], key: str, value: Mapping[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            tree[path] = self.hub.store.put_blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            tree[path] = self.hub.store.lfs_entry(path, value["oid"])
        elif key == "deletedFile":
            if tree.pop(path, None) is None:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        elif key == "deletedFolder":
            for inside in [other for other in tree if other.startswith(f"{path.rstrip('/')}/")]:
                del tree[inside]
        else:
            raise HubError(400, f"unknown operation {key}")

    def open_discussion(self, repo_id: str) -> None:
        repo, asked = self.readable(repo_id), self.body_json()
        start = repo.refs["main"] if asked.get("pullRequest") else None
        with self.hub.store.lock:
            status = "open" if start is None else "draft"
            pull = repo.open_pull(asked["title"], asked.get("description", ""), status, start)
        self.send_json({"num": pull.number, "pullRequest": pull.is_pull})

    def discussion(self, repo_id: str, number: str) -> None:
        repo = self.readable(repo_id)
        self.send_json(_details(repo, repo.pulls[int(number) - 1]))

    def merge(self, repo_id: str, number: str) -> None:
        repo = self.writable(repo_id)
        with self.hub.store.lock:
            pull = repo.pulls[int(number) - 1]
            repo.refs["main"], pull.status = repo.refs[f"refs/pr/{number}"], "merged"
        self.send_json({"newStatus": pull.status})


def _identity(repo_id: str) -> str:
    return hashlib.md5(repo_id.encode()).hexdigest()[:24]


def _sibling(path: str, entry: Entry, blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if blobs:
        sibling |= {"size": entry.size, "blobId": entry.oid}
        if entry.sha256 is not None:
            sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return sibling


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}


def _ref(name: str, ref: str, oid: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": oid}


def _history_line(repo: Repo, commit: Commit) -> dict[str, Any]:
    line = {"id": commit.oid, "title": commit.title, "message": commit.description, "date": commit.date}
    return line | {"authors": [{"user": repo.owner}]}


def _details(repo: Repo, pull: Pull) -> dict[str, Any]:
    said = {"edited": False, "hidden": False, "latest": {"raw": pull.description}}
    author = {"name": repo.owner}
    return {
        "title": pull.title,
        "num": pull.number,
        "author": author,
        "createdAt": pull.created,
        "status": pull.status,
        "repo": {"name": repo.id, "type": "model"},
        "isPullRequest": pull.is_pull,
        "changes": {"base": "refs/heads/main"},
        "filesWithConflicts": [],
        "events": [{"id": "0" * 24, "type": "comment", "createdAt": pull.created, "author": author, "data": said}],
        "diff": "",
    }


ROUTES = {
    r"/api/whoami-v2": Api.whoami,
    r"/api/agent-harnesses": Api.agents,
    r"/api/repos/create": Api.create_repo,
    r"/api/validate-yaml": Api.validate_yaml,
    rf"/api/models/{_ID}/auth-check(/write)?": Api.auth_check,
    rf"/api/models/{_ID}(?:/revision/([^/]+))?": Api.info,
    rf"/api/models/{_ID}/tree/([^/]+)(?:/(.*))?": Api.tree,
    rf"/api/models/{_ID}/paths-info/([^/]+)": Api.paths_info,
    rf"/api/models/{_ID}/refs": Api.refs,
    rf"/api/models/{_ID}/commits/([^/]+)": Api.commits,
    rf"/api/models/{_ID}/branch/(.+)": Api.branch,
    rf"/api/models/{_ID}/xet-(read|write)-token/(.+)": Api.xet_token,
    rf"/api/models/{_ID}/preupload/([^/]+)": Api.preupload,
    rf"/api/models/{_ID}/commit/([^/]+)": Api.commit,
    rf"/api/models/{_ID}/discussions": Api.open_discussion,
    rf"/api/models/{_ID}/discussions/(\d+)": Api.discussion,
    rf"/api/models/{_ID}/discussions/(\d+)/merge": Api.merge,
}
