"""Downloads against a server that stalls, cuts off, lies and fails."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
from bad_server import CONTENT, CUT, Server, fails, serving

from mclip.sources import downloads

MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()
fetch = partial(downloads.fetch, checksum=MD5)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MCLIP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(downloads, "BACK_OFF", 0.0)
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    with serving() as state:
        yield state


def test_a_file_is_fetched_once(server, tmp_path):
    path = fetch(f"{server.url}/file", tmp_path / "new" / "file")
    assert path.read_bytes() == CONTENT
    assert not path.with_name("file.part").exists()
    for checksum in (MD5, "sha256:" + hashlib.sha256(CONTENT).hexdigest()):
        fetch(f"{server.url}/file", path, checksum=checksum)
    assert len(server.requests) == 1
    path.write_bytes(CONTENT[:-1] + b"x")
    fetch(f"{server.url}/file", path)
    assert path.read_bytes() == CONTENT
    assert server.ranges() == [None, None]


@pytest.mark.parametrize("fault", ["cut", "cut reset", "stall", "silent", "500", "503"])
def test_what_may_pass_is_tried_again_from_where_it_broke(server, tmp_path, fault):
    server.faults = [fault]
    assert fetch(f"{server.url}/file", tmp_path / "file").read_bytes() == CONTENT
    first, second = server.ranges()
    assert first is None
    if fault in ("silent", "500", "503"):
        assert second is None
    elif fault != "cut reset":  # what was under way is lost with the connection, how much is chance
        assert second == f"bytes={CUT}-"


def test_a_partial_file_is_resumed_by_a_later_call(server, tmp_path):
    server.faults = ["cut", *["500"] * 3]
    url, path = f"{server.url}/file", tmp_path / "file"
    fails(lambda: fetch(url, path), url, "500", str(path), "from the 131,072 bytes", "place it as")
    assert not path.exists()
    fetch(url, path)
    assert path.read_bytes() == CONTENT
    assert server.ranges()[-1] == f"bytes={CUT}-"


def test_a_connection_that_brings_something_may_break_often(server, tmp_path):
    server.faults = ["cut", "cut"]
    assert fetch(f"{server.url}/file", tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges() == [None, f"bytes={CUT}-", f"bytes={2 * CUT}-"]
    server.faults = ["cut no range"] * 9
    fails(lambda: fetch(f"{server.url}/file", tmp_path / "other"), "131072 bytes read")
    assert len(server.requests) == 3 + 4


def test_a_server_without_range_begins_anew(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"something else")
    server.faults = ["no range"]
    assert fetch(f"{server.url}/file", tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges() == ["bytes=14-"]


def test_all_or_too_much_is_there(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert fetch(f"{server.url}/file", tmp_path / "file").read_bytes() == CONTENT
    (tmp_path / "two.part").write_bytes(CONTENT + b"too much")
    fails(lambda: fetch(f"{server.url}/file", tmp_path / "two"), "damaged", "deleted")
    assert fetch(f"{server.url}/file", tmp_path / "two").read_bytes() == CONTENT
    assert server.ranges() == [f"bytes={len(CONTENT)}-", f"bytes={len(CONTENT) + 8}-", None]


@pytest.mark.parametrize("fault", ["403", "404", "410"])
def test_what_will_not_pass_is_reported_at_once(server, tmp_path, fault):
    server.faults = [fault] * 3
    fails(lambda: fetch(f"{server.url}/file", tmp_path / "file"), fault, "from the 0 bytes")
    assert len(server.requests) == 1


def test_a_server_that_never_answers_costs_its_time_outs_and_no_more(server, tmp_path):
    server.faults = ["silent"] * 9
    start = time.monotonic()
    fails(lambda: fetch(f"{server.url}/file", tmp_path / "file"), "timed out")
    assert 0.9 <= time.monotonic() - start < 2
    assert len(server.requests) == 3
    fails(lambda: fetch("http://127.0.0.1:9/file", tmp_path / "file"), "Connection refused")
    fails(lambda: fetch("nonsense", tmp_path / "file"), "nonsense")


def test_a_damaged_download_is_deleted_and_reported(server, tmp_path):
    server.faults = ["corrupt"]
    fails(lambda: fetch(f"{server.url}/file", tmp_path / "file"), "damaged", MD5[4:], "deleted")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    fails(lambda: fetch(f"{server.url}/file", tmp_path / "file" / "inside"), "wanted as")


def test_processes_that_want_the_same_file_fetch_it_once(server, tmp_path):
    call = partial(fetch, f"{server.url}/file", tmp_path / "file")
    threads = [threading.Thread(target=call) for _ in range(4)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert len(server.requests) == 1
