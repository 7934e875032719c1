"""A hub on this machine, for tests of what is fetched from it and uploaded to it."""

import base64
import hashlib
import http.server
import json
import re

COMMITS = {"main": "a" * 40, "old": "b" * 40, "dev": "c" * 40}


class Hub(http.server.ThreadingHTTPServer):
    """A hub with the files of `repos`: `{repository: {file: content}}`.

    Attributes:
      gated: repositories that ask for consent.
      cut: a file whose connection ends in its middle, once.
      private: repositories that were made private.
      fetched: the paths that were asked for.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.gated, self.cut, self.fetched = {}, set(), "", []
        self.private = set()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers questions for a repository and for one of its files."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def do_POST(self):
        """Makes repositories and takes commits of small files."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.fetched.append(self.path)
        if self.path == "/api/validate-yaml":
            return self.send_json({})
        if self.path == "/api/repos/create":
            told = json.loads(body)
            repo = f"{told.get('organization') or 'me'}/{told['name']}"
            if repo not in self.server.repos and "private" in (
                told.get("private") and "private",
                told.get("visibility"),
            ):
                self.server.private.add(repo)
            self.server.repos.setdefault(repo, {})
            return self.send_json({"url": f"{self.server.endpoint}/{repo}"})
        repo = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/", self.path)
        if repo[2] == "branch":
            return self.send_json({})
        if repo[2] == "preupload":
            rows = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.send_json({"files": rows})
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                data = base64.b64decode(line["value"]["content"])
                self.server.repos[repo[1]][line["value"]["path"]] = data
            elif line["key"] == "deletedFile":
                del self.server.repos[repo[1]][line["value"]["path"]]
        url = f"{self.server.endpoint}/{repo[1]}/commit/{COMMITS['main']}"
        return self.send_json({"success": True, "commitOid": COMMITS["main"], "commitUrl": url})

    def answer(self, send):
        self.server.fetched.append(self.path)
        found = re.match(
            r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/?]+))?", self.path
        )
        path = self.path.partition("?")[0]
        file = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo, revision = (found or file)[1], (found[3] if found else file[2]) or "main"
        commit = COMMITS.get(revision, revision if revision in COMMITS.values() else "")
        contents = self.server.repos.get(repo)
        wrong = {
            "RepoNotFound": contents is None,
            "GatedRepo": repo in self.server.gated,
            "RevisionNotFound": not commit,
            "EntryNotFound": file and file[3] not in (contents or ()),
        }
        for code in (code for code, holds in wrong.items() if holds):
            status = 403 if code == "GatedRepo" else 404
            return self.begin(status, {"X-Error-Code": code, "Content-Length": "0"})
        if file:
            return self.send_file(file[3], contents[file[3]], commit, send)
        if found[2] == "tree":
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                for name, data in contents.items()
            ]
        else:
            siblings = [{"rfilename": name} for name in contents]
            rows = {"id": repo, "sha": commit, "siblings": siblings, "tags": []}
            rows["private"] = repo in self.server.private
        return self.send_json(rows, send)

    def send_json(self, value, send=True):
        return self.send(json.dumps(value).encode(), send, {})

    def send_file(self, name, data, commit, send):
        headers = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": commit}
        if not send or self.server.cut != name:
            return self.send(data, send, headers)
        self.server.cut, self.close_connection = "", True
        self.begin(200, {**headers, "Content-Length": str(len(data))})
        return self.wfile.write(data[: len(data) // 2])

    def send(self, data, send, headers):
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        part = data[int(first[1]) :] if first else data
        if first:
            headers = {
                **headers, "Content-Range": f"bytes {first[1]}-{len(data) - 1}/{len(data)}",
            }  # fmt: skip
        self.begin(206 if first else 200, {**headers, "Content-Length": str(len(part))})
        if send:
            self.wfile.write(part)

    def begin(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def digest(data):
    return hashlib.sha1(data).hexdigest()
