"""Where bytes go in and come out: resolve, the CDN, LFS uploads, and the Xet CAS."""

import hashlib
import urllib.parse
from pathlib import Path
from typing import Any

from loopback_hub.access import Access
from loopback_hub.records import HubError

_ID = r"([^/]+/[^/]+)"
_HASH = r"([0-9a-f]{64})"


class Files(Access):
    """The routes outside /api."""

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        """A small file itself; for a large one where it lies, under a link that can expire."""
        store = self.hub.store
        commit = store.commit(self.readable(repo_id), revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        entry = commit.tree.get(path)
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        etag = entry.etag
        if self.has_fault("other_etag"):
            etag = hashlib.sha256(etag.encode()).hexdigest()[: len(etag)]
        headers["ETag"] = f'"{etag}"'
        if entry.sha256 is None:
            return self.send_file(store.contents(entry), headers)
        headers |= {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{etag}"'}
        if (hashed := store.xet.hash_of(entry.sha256)) is not None:
            token = f"/api/models/{repo_id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": hashed, "X-Xet-Refresh-Route": token}
            headers["Link"] = f'<{self.hub.url}{token}>; rel="xet-auth"'
        place = f"{self.hub.cdn_url}/_cdn/{entry.sha256}/{urllib.parse.quote(path)}"
        headers["Location"] = f"{place}?sig={self.hub.sign_link()}"
        self.send_bytes(b"Found. Redirecting.", 302, headers)

    def cdn(self, sha256: str, _path: str) -> None:
        if not self.hub.link_is_valid(int(self.query.get("sig", 0))):
            raise HubError(403, "the link has expired")
        self.send_file(self.hub.store.object_file(sha256), {"ETag": f'"{sha256}"'})

    def lfs_batch(self, repo_id: str) -> None:
        """Where to put objects; none for those that are here already."""
        asked, store = self.body_json(), self.hub.store
        self.readable(repo_id)
        if self.user() is None:
            raise HubError(401, "Invalid username or password.")
        transfer, part = "basic", self.hub.multipart_over
        answers = []
        for item in asked["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"], "authenticated": True}
            if not store.has_object(item["oid"]):
                upload: dict[str, Any] = {"href": f"{self.hub.cdn_url}/_lfs/{item['oid']}"}
                if part and item["size"] > part and "multipart" in asked["transfers"]:
                    transfer = "multipart"
                    count = -(-item["size"] // part)
                    parts = {f"{number:05d}": f"{upload['href']}/part/{number}" for number in range(1, count + 1)}
                    upload["header"] = {"chunk_size": str(part), **parts}
                verify = {"href": f"{self.hub.url}/_lfs/{item['oid']}/verify", "header": {}}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        self.send_json({"transfer": transfer, "objects": answers})

    def lfs_upload(self, sha256: str) -> None:
        """A whole object, or the word that all its parts have been sent."""
        store = self.hub.store
        received = store.temporary()
        if self.command == "PUT":
            digest = self.body_to(received)
        else:
            numbers = [part["partNumber"] for part in self.body_json()["parts"]]
            content = b"".join(self._part(sha256, number).read_bytes() for number in numbers)
            received.write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
        if digest != sha256:
            raise HubError(400, "checksum mismatch")
        received.replace(store.root / "lfs" / sha256)
        self.send_json({"success": True})

    def lfs_part(self, sha256: str, number: str) -> None:
        digest = self.body_to(self._part(sha256, int(number)))
        self.send_bytes(headers={"ETag": f'"{digest}"'})

    def _part(self, sha256: str, number: int) -> Path:
        return self.hub.store.root / "parts" / f"{sha256}.{number}"

    def lfs_verify(self, sha256: str) -> None:
        stored = self.hub.store.root / "lfs" / sha256
        if not stored.exists() or stored.stat().st_size != self.body_json()["size"]:
            raise HubError(404, "object missing")
        self.send_json({"success": True})

    def xorb(self, hashed: str) -> None:
        stored = self.hub.store.xet.xorbs / hashed
        if self.command == "HEAD":
            return self.send_bytes(status=200 if stored.exists() else 404)
        new = not stored.exists()
        received = self.hub.store.temporary()
        received.write_bytes(self.body())
        received.replace(stored)
        self.send_json({"was_inserted": new})

    def shards(self) -> None:
        data = self.body()
        with self.hub.store.lock:
            self.hub.store.xet.add_shard(data)
        self.send_json({"result": 1})

    def reconstruction(self, hashed: str) -> None:
        self.send_json(self.hub.store.xet.reconstruction(hashed, self.request_log.range))

    def xorb_bytes(self, hashed: str) -> None:
        stored = self.hub.store.xet.xorbs / hashed
        if not stored.exists():
            raise HubError(404, "no such xorb")
        self.send_file(stored, {})

    def telemetry(self) -> None:
        self.send_json({})


ROUTES = {
    rf"/{_ID}/resolve/([^/]+)/(.+)": Files.resolve,
    rf"/_cdn/{_HASH}/(.+)": Files.cdn,
    rf"/{_ID}\.git/info/lfs/objects/batch": Files.lfs_batch,
    rf"/_lfs/{_HASH}": Files.lfs_upload,
    rf"/_lfs/{_HASH}/part/(\d+)": Files.lfs_part,
    rf"/_lfs/{_HASH}/verify": Files.lfs_verify,
    rf"/cas/v1/xorbs/default/{_HASH}": Files.xorb,
    r"/cas/v1/shards": Files.shards,
    rf"/cas/v1/reconstructions/{_HASH}": Files.reconstruction,
    rf"/cas/fetch/{_HASH}": Files.xorb_bytes,
    r"/cas/v1/telemetry": Files.telemetry,
}
