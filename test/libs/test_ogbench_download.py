# Copyright (c) Meta Platforms, Inc. and affiliates.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The download: breaks, ranges, what is not what it should be."""

from __future__ import annotations

import contextlib
import http.server
import shutil
import sys
import threading

import pytest
from _ogbench_cases import FILE, TASK, needs_ogbench

from torchrl_evor.data import (
    OGBenchExperienceReplay,
)
from torchrl_evor.data.datasets import (
    _ogbench_download,
)
from torchrl_evor.data.datasets._ogbench_download import download_npz


class Server:
    """A file server that can break off, forget ranges, or refuse."""

    def __init__(self, folder):
        self.requests, self.break_after, self.ranges = [], None, True
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range") if outer.ranges else None
                outer.requests.append((self.path, asked))
                file = folder / self.path.lstrip("/")
                if not file.exists():
                    return self.send_error(404)
                content = file.read_bytes()
                start = int(asked[6:-1]) if asked else 0
                if asked and start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                self.send_response(206 if asked else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                body = content[start:]
                if outer.break_after is not None:
                    body, outer.break_after = body[: outer.break_after], None
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()


@pytest.fixture
def server(folder):
    with Server(folder).running() as running:
        yield running


class TestDownload:
    @needs_ogbench
    def test_the_official_address(self, tmp_path, server, monkeypatch):
        import ogbench.utils

        monkeypatch.setattr(ogbench.utils, "DATASET_URL", server.url)
        data = OGBenchExperienceReplay(TASK, root=tmp_path / "cache")
        assert len(data) == 50
        assert len(OGBenchExperienceReplay(TASK, root=tmp_path / "cache", download=False)) == 50
        assert server.requests == [(f"/{FILE}.npz", None)]
        OGBenchExperienceReplay(TASK, root=tmp_path / "cache", download="force")
        assert len(server.requests) == 2

    def get(self, server, path, **kwargs):
        return download_npz(f"{server.url}/{FILE}.npz", path, wait=0.0, **kwargs)

    def test_goes_on_after_a_break(self, tmp_path, folder, server):
        server.break_after = 100
        path = self.get(server, tmp_path / "x.npz")
        assert [asked for _, asked in server.requests] == [None, "bytes=100-"]
        assert path.read_bytes() == (folder / f"{FILE}.npz").read_bytes()
        assert sorted(p.name for p in tmp_path.glob("x*")) == ["x.npz"]

    def test_a_later_call_goes_on(self, tmp_path, folder, server):
        server.break_after = 100
        with pytest.raises(ConnectionError, match="could not be downloaded in 1 attempts.*100 of"):
            self.get(server, tmp_path / "x.npz", attempts=1)
        assert not (tmp_path / "x.npz").exists()
        assert (tmp_path / "x.npz.part").stat().st_size == 100
        path = self.get(server, tmp_path / "x.npz", attempts=1)
        assert path.read_bytes() == (folder / f"{FILE}.npz").read_bytes()

    def test_starts_again_without_ranges(self, tmp_path, folder, server):
        server.ranges = False
        (tmp_path / "x.npz.part").write_bytes(b"old")
        path = self.get(server, tmp_path / "x.npz")
        assert path.read_bytes() == (folder / f"{FILE}.npz").read_bytes()

    def test_everything_had_arrived(self, tmp_path, folder, server):
        shutil.copy(folder / f"{FILE}.npz", tmp_path / "x.npz.part")
        self.get(server, tmp_path / "x.npz")
        assert len(server.requests) == 1

    def test_a_part_of_a_longer_file(self, tmp_path, folder, server):
        (tmp_path / "x.npz.part").write_bytes(b"0" * 10**6)
        path = self.get(server, tmp_path / "x.npz")
        assert path.read_bytes() == (folder / f"{FILE}.npz").read_bytes()

    def test_a_part_of_another_file(self, tmp_path, folder, server):
        (tmp_path / "x.npz.part").write_bytes(b"0" * 100)
        with pytest.raises(ValueError, match="did not send a sound npz file"):
            self.get(server, tmp_path / "x.npz")
        # the bad part is gone: the next call starts cleanly
        path = self.get(server, tmp_path / "x.npz")
        assert path.read_bytes() == (folder / f"{FILE}.npz").read_bytes()

    def test_no_zip(self, tmp_path, folder, server):
        (folder / f"{FILE}.npz").write_bytes(b"<html>sign in</html>")
        with pytest.raises(ValueError, match="no zip archive"):
            self.get(server, tmp_path / "x.npz")
        assert not list(tmp_path.glob("x.npz*"))

    def test_not_found(self, tmp_path, folder, server):
        (folder / f"{FILE}.npz").unlink()
        with pytest.raises(ConnectionError, match="answered 404"):
            self.get(server, tmp_path / "x.npz")
        assert len(server.requests) == 1

    def test_no_server(self, tmp_path):
        with pytest.raises(ConnectionError, match="source='local'"):
            download_npz("http://127.0.0.1:9/x.npz", tmp_path / "x.npz", attempts=2, wait=0.0)

    def test_progress(self, tmp_path, server, monkeypatch):
        shown = []

        class Progress(_ogbench_download._progress):
            def __enter__(self):
                return shown.append

        monkeypatch.setattr(_ogbench_download, "_progress", Progress)
        path = self.get(server, tmp_path / "x.npz")
        assert sum(shown) == path.stat().st_size


if __name__ == "__main__":
    pytest.main([__file__, *sys.argv[1:]])
