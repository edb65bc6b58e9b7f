"""Every request that the clients make, and its answer."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_server.metadata import faults_of
from hub_server.repos import DATE, File, Refused, Repo, entries, is_large

if TYPE_CHECKING:
    from hub_server.server import HubServer

ID = r"(?P<id>[^/]+/[^/]+|[^/]+)"
API = rf"/api/(?P<kind>model|dataset|space)s/{ID}"
PAGE = rf"/(?:(?P<kind>dataset|space)s/)?{ID}"
ROUTES = [  # method, path, name of the method of Handler that answers; groups of the pattern are its arguments
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("DELETE", r"/api/repos/delete", "delete_repo"),
    ("PUT", rf"{API}/settings", "settings"),
    ("GET", rf"{API}/auth-check(?P<write>/write)?", "auth_check"),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET", rf"{API}/refs", "list_refs"),
    ("GET", rf"{API}/commits/(?P<revision>[^/]+)", "list_commits"),
    ("POST", rf"{API}/(?P<what>branch|tag)/(?P<name>[^/]+)", "create_ref"),
    ("DELETE", rf"{API}/(?:branch|tag)/(?P<name>[^/]+)", "delete_ref"),
    ("POST", rf"{API}/discussions", "create_pull_request"),
    ("GET", rf"{API}/discussions", "list_pull_requests"),
    ("GET", rf"{API}/xet-(?P<access>read|write)-token/[^/]+", "xet_token"),
    ("GET", rf"{API}(?:/revision/(?P<revision>[^/]+))?", "repo_info"),
    ("GET", rf"{PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("POST", rf"{PAGE}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?", "lfs_put"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_complete"),
    ("POST", r"/v1/xorbs/default/(?P<xorb>[0-9a-f]{64})", "xet_put_xorb"),
    ("GET", r"/v1/xorbs/default/(?P<xorb>[0-9a-f]{64})", "xet_get_xorb"),
    ("POST", r"/v1/shards", "xet_put_shard"),
    ("GET", r"/v1/reconstructions/(?P<file>[0-9a-f]{64})", "xet_reconstruction"),
]


class Handler(BaseHTTPRequestHandler):
    """Finds the route, plays the faults, and answers. `HEAD` is `GET` without the body."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        self.body = self.read_body()
        request = f"{self.command} {self.path}"
        self.hub.requests.append(request)
        fault = self.hub.next_fault(request)
        if fault and fault.is_instead_of_an_answer(self.wfile, self.hub.stopping):
            self.close_connection = True
            return
        try:
            if fault and fault.kind == "status":
                raise Refused(fault.status, f"planted {fault.status}", headers=fault.headers)
            if fault and fault.kind == "page":
                status, body, headers = 200, b"<html>Please log in</html>", {"Content-Type": "text/html"}
            else:
                status, body, headers = self.route()
        except Refused as refused:
            status, body, headers = refused.status, {"error": str(refused)}, {"X-Error-Message": str(refused)}
            headers |= refused.headers | ({"X-Error-Code": refused.code} if refused.code else {})
        if fault and fault.kind == "lose":
            self.close_connection = True
            return
        self.send(status, body, headers, cut=bool(fault and fault.kind == "cut"))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def route(self) -> tuple[int, Any, dict[str, str]]:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        for method, pattern, name in ROUTES:
            found = re.fullmatch(pattern, url.path) if method == self.command.replace("HEAD", "GET") else None
            if found:
                groups = {key: unquote(value) if value else value for key, value in found.groupdict().items()}
                answer: Callable[..., Any] = getattr(self, name)
                with self.hub.lock:
                    result = answer(**groups)
                return result if isinstance(result, tuple) else (200, result, {})
        raise Refused(404, f"no such page: {self.command} {url.path}")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, status: int, body: Any, headers: dict[str, str], cut: bool = False) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/octet-stream" if data is body else "application/json"} | headers
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal: `HubServer.requests` is the log."""

    # Who asks, and what they may do

    def role(self) -> str | None:
        """`write`, `read`, or None for nobody."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        roles = {"": None, self.hub.token: "write", self.hub.read_token: "read", self.hub.team_token: "fineGrained"}
        if given not in roles:
            raise Refused(401, "Invalid credentials in Authorization header")
        return roles[given]

    def repo(self, kind: str | None, id: str, write: bool = False) -> Repo:
        role, repo = self.role(), self.hub.repos.get((kind or "model", id))
        if repo is None or (repo.private and not role):
            raise Refused(404 if role else 401, "Repository not found", "RepoNotFound")
        if write:
            self.check_write(id)
        return repo

    def check_write(self, id: str) -> None:
        role = self.role()
        if role is None:
            raise Refused(401, "Invalid username or password.")
        owner = id.split("/")[0]
        allowed = {"write": (self.hub.user, self.hub.organisation), "fineGrained": (self.hub.organisation,)}
        if owner not in allowed.get(role, ()):
            raise Refused(403, f'You don\'t have the rights to write under the namespace "{owner}"')

    def whoami(self) -> Any:
        role = self.role()
        if role is None:
            raise Refused(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": self.hub.organisation, "roleInOrg": "write"}]
        told: dict[str, Any] = {"displayName": "tests", "role": role}
        if role == "fineGrained":
            scope = {"entity": {"type": "org", "name": self.hub.organisation}, "permissions": ["repo.write"]}
            told["fineGrained"] = {"global": [], "scoped": [scope]}
        token = {"type": "access_token", "accessToken": told}
        return {"type": "user", "id": "1", "name": self.hub.user, "fullname": "Me", "orgs": orgs, "auth": token}

    def auth_check(self, kind: str, id: str, write: str | None) -> Any:
        self.repo(kind, id, write=bool(write))
        return {}

    # Repositories

    def create_repo(self) -> Any:
        asked = json.loads(self.body)
        kind, id = asked.get("type") or "model", f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        self.check_write(id)
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{id}"
        if (kind, id) in self.hub.repos:
            return 409, {"error": "You already created this repo", "url": url}, {}
        self.hub.add_repo(kind, id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return {"url": url, "name": id}

    def delete_repo(self) -> Any:
        asked = json.loads(self.body)
        kind, id = asked.get("type") or "model", f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        self.repo(kind, id, write=True)
        del self.hub.repos[kind, id]
        return {}

    def settings(self, kind: str, id: str) -> Any:
        repo, asked = self.repo(kind, id, write=True), json.loads(self.body)
        repo.private = asked.get("private", asked.get("visibility") == "private")
        return {"private": repo.private}

    def repo_info(self, kind: str, id: str, revision: str | None) -> Any:
        repo = self.repo(kind, id)
        commit = repo.at(revision or "main")
        siblings = [{"rfilename": path, "size": len(file.content)} for path, file in sorted(commit.files.items())]
        info = {"_id": "1", "id": id, "author": id.split("/")[0], "sha": commit.oid, "private": repo.private}
        info |= {"lastModified": DATE, "createdAt": DATE, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        return info | {"tags": [], "siblings": siblings}

    def list_refs(self, kind: str, id: str) -> Any:
        repo = self.repo(kind, id)
        refs: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
        for name, commit in repo.refs.items():
            what = "tags" if name in repo.tags else "pullRequests" if name.startswith("refs/pr/") else "branches"
            ref = name if what == "pullRequests" else f"refs/{'tags' if what == 'tags' else 'heads'}/{name}"
            refs[what].append({"name": name, "ref": ref, "targetCommit": commit.oid})
        return refs

    def list_commits(self, kind: str, id: str, revision: str) -> Any:
        repo = self.repo(kind, id)
        history = repo.history[: repo.history.index(repo.at(revision)) + 1]
        authors = [{"user": self.hub.user}]
        return [
            {"id": c.oid, "title": c.title, "message": "", "date": DATE, "authors": authors} for c in reversed(history)
        ]

    def create_ref(self, kind: str, id: str, what: str, name: str) -> Any:
        repo, asked = self.repo(kind, id, write=True), json.loads(self.body or b"{}")
        start = asked.get("startingPoint") or "main" if what == "branch" else name
        name = asked["tag"] if what == "tag" else name
        if name in repo.refs:
            raise Refused(409, f"Reference already exists: {name}")
        repo.refs[name] = repo.at(start)
        repo.tags |= {name} if what == "tag" else set()
        return {}

    def delete_ref(self, kind: str, id: str, name: str) -> Any:
        del self.repo(kind, id, write=True).refs[name]
        return {}

    def create_pull_request(self, kind: str, id: str) -> Any:
        number = self.open_request(self.repo(kind, id), json.loads(self.body)["title"])
        return {"num": number, "url": f"{self.hub.url}/{id}/discussions/{number}"}

    def open_request(self, repo: Repo, title: str) -> int:
        number = 1 + len(repo.pull_requests)
        repo.refs[f"refs/pr/{number}"] = repo.at("main")
        repo.pull_requests.append({"num": number, "title": title, "status": "open", "isPullRequest": True})
        return number

    def list_pull_requests(self, kind: str, id: str) -> Any:
        about = {"author": {"name": self.hub.user}, "createdAt": DATE, "repo": {"name": id, "type": kind}}
        found = [request | about for request in self.repo(kind, id).pull_requests]
        return {"discussions": found, "count": len(found), "start": 0}

    # Files

    def tree(self, kind: str, id: str, revision: str, path: str | None) -> Any:
        commit, below = self.repo(kind, id).at(revision), f"{path}/" if path else ""
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        listed = [entry for name, entry in entries(commit, self.hub.xet.hashes).items() if name.startswith(below)]
        if below and not listed:
            raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        if not recursive:
            listed = [entry for entry in listed if "/" not in entry["path"].removeprefix(below)]
        start = int(self.query.get("cursor", 0))
        end, headers = start + self.hub.page_size, {}
        if end < len(listed):
            here = f"{self.hub.url}{urlsplit(self.path).path}"
            headers = {"Link": f'<{here}?recursive={recursive}&expand=true&cursor={end}>; rel="next"'}
        return 200, listed[start:end], headers

    def paths_info(self, kind: str, id: str, revision: str) -> Any:
        found = entries(self.repo(kind, id).at(revision), self.hub.xet.hashes)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        return [found[path] for path in paths if path in found]

    def resolve(self, kind: str | None, id: str, revision: str, path: str) -> Any:
        repo = self.repo(kind, id)
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            return 404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"}
        headers["ETag"] = f'"{file.oid}"'
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
            if file.sha256 in self.hub.xet.hashes:
                token = f"{self.hub.url}/api/{repo.kind}s/{id}/xet-read-token/{commit.oid}"
                headers |= {"X-Xet-Hash": self.hub.xet.hashes[file.sha256], "Link": f'<{token}>; rel="xet-auth"'}
        return self.part_of(file.content, headers)

    def part_of(self, content: bytes, headers: dict[str, str]) -> Any:
        """The content, or the range of bytes that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return 200, content, headers
        start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if start >= len(content):
            return 416, b"", headers | {"Content-Range": f"bytes */{len(content)}"}
        return 206, content[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}

    # A commit: what goes where, the large files, then the commit itself

    def validate_yaml(self) -> Any:
        errors, warnings = faults_of(json.loads(self.body)["content"])
        found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
        return (400 if errors else 200), found, {}

    def preupload(self, kind: str, id: str, revision: str) -> Any:
        files, answer, told = self.repo(kind, id, write=True).at(revision).files, [], json.loads(self.body)
        gitignore = files[".gitignore"].content.decode() if ".gitignore" in files else ""
        patterns = told.get("gitIgnore", gitignore).split()
        for asked in told["files"]:
            path, sample = asked["path"], base64.b64decode(asked["sample"])
            mode = "lfs" if is_large(path, asked["size"], sample) else "regular"
            known = {"oid": files[path].oid} if path in files and self.hub.tells_oids else {}
            ignored = any(fnmatch(path, pattern) for pattern in patterns)
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored} | known)
        return {"files": answer}

    def lfs_batch(self, kind: str | None, id: str) -> Any:
        self.repo(kind, id, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size, part_size = asked["oid"], asked["size"], self.hub.part_size
            if oid in self.hub.blobs:
                objects.append({"oid": oid, "size": size})  # no action: it is already here
                continue
            if self.hub.full:
                objects.append({"oid": oid, "size": size, "error": {"code": 403, "message": self.hub.full}})
                continue
            upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}?X-Amz-Signature=signed"}
            if part_size and size > part_size:
                parts = {str(n + 1): f"{self.hub.url}/lfs/{oid}/{n + 1}" for n in range(-(-size // part_size))}
                upload["header"] = {"chunk_size": str(part_size)} | parts
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload}})
        return {"transfer": "multipart" if self.hub.part_size else "basic", "objects": objects}

    def lfs_put(self, oid: str, part: str | None) -> Any:
        if part:
            self.hub.parts.setdefault(oid, {})[int(part)] = self.body
            return 200, b"", {"ETag": hashlib.md5(self.body).hexdigest()}
        return self.lfs_store(oid, self.body)

    def lfs_complete(self, oid: str) -> Any:
        parts = self.hub.parts.pop(oid, {})
        return self.lfs_store(oid, b"".join(parts[p["partNumber"]] for p in json.loads(self.body)["parts"]))

    def lfs_store(self, oid: str, content: bytes) -> Any:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "the content does not have the announced SHA-256")
        self.hub.blobs[oid] = content
        return b""

    def commit(self, kind: str, id: str, revision: str) -> Any:
        repo = self.repo(kind, id, write=True)
        head, (header, *operations) = repo.at(revision), [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", head.oid) != head.oid:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if key == "file":
                files[path] = File(base64.b64decode(value["content"]), large=False)
            elif key == "lfsFile" and value["oid"] in self.hub.blobs:
                files[path] = File(self.hub.blobs[value["oid"]], large=True)
            elif key == "deletedFile" and path in files:
                del files[path]
            elif key == "deletedFolder":
                files = {name: file for name, file in files.items() if not name.startswith(path.rstrip("/") + "/")}
            else:
                raise Refused(400, f"{key} {path}: the file does not exist")
        title, request = header["value"]["summary"], None
        if self.query.get("create_pr"):
            number = self.open_request(repo, title)
            revision, request = f"refs/pr/{number}", f"{self.hub.url}/{id}/discussions/{number}"
        commit = repo.commit(revision, title, files)
        url = f"{self.hub.url}/{quote(id)}/commit/{commit.oid}"
        return {"commitUrl": url, "commitOid": commit.oid, "pullRequestUrl": request, "success": True}

    # Xet: the same large files as chunks, see xet.py

    def xet_token(self, kind: str, id: str, access: str) -> Any:
        self.repo(kind, id, write=access == "write")
        token = {"accessToken": f"xet-{access}", "exp": 4_000_000_000, "casUrl": self.hub.url}
        headers = {"X-Xet-Cas-Url": self.hub.url, "X-Xet-Access-Token": token["accessToken"]}
        return 200, token, headers | {"X-Xet-Token-Expiration": str(token["exp"])}

    def xet_put_xorb(self, xorb: str) -> Any:
        return {"was_inserted": self.hub.xet.put_xorb(xorb, self.body)}

    def xet_put_shard(self) -> Any:
        self.hub.xet.put_shard(self.body)
        return {"result": 1}

    def xet_get_xorb(self, xorb: str) -> Any:
        return self.part_of(self.hub.xet.xorbs[xorb], {})

    def xet_reconstruction(self, file: str) -> Any:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if file not in self.hub.xet.files:
            raise Refused(404, "no such file")
        first, last = (int(asked[1]), int(asked[2] or 2**62)) if asked else (0, 2**62)
        answer = self.hub.xet.reconstruction(file, first, last)
        if answer is None:
            raise Refused(416, "the range is behind the end of the file")
        return answer
