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
      large: the ends of the names of files that are uploaded by LFS, before the commit.
      uploaded: the contents of these files by their SHA-256.
      refuses: "lfs" or "commit": what is answered with 403.
      fetched: the paths that were asked for.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.gated, self.cut, self.fetched = {}, set(), "", []
        self.private, self.large, self.uploaded, self.refuses = set(), (), {}, ""

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

    def do_PUT(self):
        """Takes the content of a large file, whose name is its SHA-256."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses == "lfs":
            return self.begin(403, {"Content-Length": "0"})
        self.server.uploaded[hashlib.sha256(data).hexdigest()] = data
        return self.send_json({})

    def do_POST(self):
        """Makes repositories and takes commits."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.fetched.append(self.path)
        if self.path == "/api/validate-yaml":
            return self.send_json({})
        if self.path == "/api/repos/create":
            return self.send_json({"url": f"{self.server.endpoint}/{self.made(json.loads(body))}"})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return self.send_json({"objects": [*map(self.place_of, json.loads(body)["objects"])]})
        repo = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/", self.path)
        if repo[2] == self.server.refuses:
            return self.begin(403, {"Content-Length": "0"})
        answer = {}
        if repo[2] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            rows = [{"path": path, "uploadMode": self.mode(path)} for path in paths]
            answer = {"files": [{**row, "shouldIgnore": False} for row in rows]}
        elif repo[2] == "commit":
            self.commit(self.server.repos[repo[1]], map(json.loads, body.decode().splitlines()))
            url = f"{self.server.endpoint}/{repo[1]}/commit/{COMMITS['main']}"
            answer = {"success": True, "commitOid": COMMITS["main"], "commitUrl": url}
        return self.send_json(answer)

    def made(self, told):
        """Returns the repository that is asked for, which is made if there is none."""
        repo = f"{told.get('organization') or 'me'}/{told['name']}"
        is_private = "private" in (told.get("private") and "private", told.get("visibility"))
        if repo not in self.server.repos and is_private:
            self.server.private.add(repo)
        self.server.repos.setdefault(repo, {})
        return repo

    def mode(self, name):
        return "lfs" if name.endswith(tuple(self.server.large)) else "regular"

    def place_of(self, file):
        """Returns where the content of a large file goes; none if it is there already."""
        if file["oid"] in self.server.uploaded:
            return file
        place = {"href": f"{self.server.endpoint}/lfs/{file['oid']}"}
        return {**file, "actions": {"upload": place}}

    def commit(self, contents, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                contents[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                contents[value["path"]] = self.server.uploaded[value["oid"]]
            elif line["key"] == "deletedFile":
                del contents[value["path"]]

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
