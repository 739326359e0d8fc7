import hashlib
import json
import logging
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="needs the extra 'remote'")

import fsspec

from imitate_ds.data import shard_store
from imitate_ds.data.shard_store import File, ShardStore, UnreachableError, open_store
from tests.data.hostile_server import BUSY, DROP, ENDLESS, FLIP, SHORT, STALL, Fault, HostileServer, serve

TAR = "train-000000.tar"
OTHER = "train-000001.tar"
TEXT = "train-000000.text.safetensors"
SIZE = 300_000
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(shard_store, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A shard folder as far as a store can tell: files of random bytes."""
    folder = tmp_path / "served" / "cxr"
    (folder / "text_encoder" / "tokenizer").mkdir(parents=True)
    for name in (TAR, OTHER, TEXT, "text_encoder/model.safetensors", "text_encoder/tokenizer/vocab.txt"):
        (folder / name).write_bytes(os.urandom(SIZE))
    (folder / "index.json").write_text('{"version": 1}')
    return folder


@pytest.fixture
def server(folder) -> Iterator[HostileServer]:
    with serve(folder.parent) as server:
        yield server


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def store(server, cache) -> Iterator[ShardStore]:
    store = opened(server, cache)
    yield store
    store.close()


def opened(server: HostileServer, cache: Path | None, **options) -> ShardStore:
    return open_store(f"{server.url}/cxr", **{"cache": cache, "attempts": 3, "timeout_s": 0.3, **options})


def described(folder: Path, name: str = TAR) -> File:
    data = (folder / name).read_bytes()
    return File(name, len(data), hashlib.sha256(data).hexdigest())


def same(path: Path, folder: Path, name: str = TAR) -> bool:
    return path.read_bytes() == (folder / name).read_bytes()


def left_over(store: ShardStore) -> list[str]:
    return [path.name for path in store.root.rglob("*") if path.suffix in (".part", ".tmp")]


def in_child(function: Callable[[], object]) -> None:
    """Run in a forked process, as a loader's worker is."""
    child = FORK.Process(target=function)
    child.start()
    child.join(20)
    assert child.exitcode == 0


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_a_local_folder_is_passed_through_untouched(folder):
    before = {path: path.stat() for path in folder.rglob("*")}
    for location in (folder, str(folder)):
        store = open_store(location)
        assert (store.root, store.remote) == (folder, False)
        assert store.fetch(File(TAR, 1, "wrong")) == folder / TAR
        assert store.fetch(File("index.json"), fresh=True) == folder / "index.json"
        assert store.fetch(File("absent.tar")) == folder / "absent.tar"
        store.prefetch([File(TAR), File("absent.tar")])
        store.close()
    assert {path: path.stat() for path in folder.rglob("*")} == before


def test_a_file_is_downloaded_once_and_is_the_same(store, server, folder):
    for name in (TAR, "text_encoder/model.safetensors", "text_encoder/tokenizer/vocab.txt"):
        for _ in range(3):
            path = store.fetch(described(folder, name))
            assert path == store.root / name
            assert same(path, folder, name)
    assert server.requests == {TAR: 1, "model.safetensors": 1, "vocab.txt": 1}
    assert left_over(store) == []


def test_the_cache_is_its_users_only(store, folder):
    store.fetch(described(folder, "text_encoder/model.safetensors"))
    store.fetch(File("index.json"))
    for path in [store.root.parent, store.root, *store.root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize(
    "faults",
    [
        [DROP],
        [BUSY],
        [BUSY, BUSY],
        [STALL],
        [SHORT],
        [FLIP],
        [FLIP, DROP],
        [ENDLESS],
        [DROP, BUSY],
        [Fault(status=429)],
    ],
)
@pytest.mark.parametrize("ranges", [True, False])
def test_what_fails_once_or_twice_is_tried_again(store, server, folder, faults, ranges):
    server.faults[TAR] = list(faults)
    server.ranges = ranges
    assert same(store.fetch(described(folder)), folder)
    assert server.requests[TAR] == len(faults) + 1
    assert left_over(store) == []


@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [
        (DROP._replace(cut=0.0), UnreachableError, "ClientPayloadError"),
        (BUSY, UnreachableError, "status 503"),
        (STALL, UnreachableError, "nothing came in time (0.3 s)"),
        (Fault(keep=0.1), UnreachableError, "bytes came"),
        (FLIP, OSError, "checksum differs"),
        (ENDLESS, OSError, "more than 300,000 bytes came"),
    ],
)
def test_what_always_fails_says_why_after_the_last_attempt(store, server, folder, fault, kind, reason):
    server.always[TAR] = fault
    server.ranges = False
    with pytest.raises(OSError, match=TAR) as raised:
        store.fetch(described(folder))
    assert type(raised.value) is kind
    assert reason in str(raised.value)
    assert f"{server.url}/cxr" in str(raised.value)
    assert "3 attempts" in str(raised.value)
    assert server.requests[TAR] == 3
    assert not (store.root / TAR).exists()
    assert left_over(store) == []


@pytest.mark.parametrize(
    ("status", "kind", "hint"),
    [
        (404, FileNotFoundError, "data.shards"),
        (401, PermissionError, "credentials"),
        (403, PermissionError, "credentials"),
        (400, OSError, "status 400"),
    ],
)
def test_what_more_attempts_cannot_mend_fails_at_once(store, server, folder, status, kind, hint):
    server.always[TAR] = Fault(status=status)
    with pytest.raises(kind, match=hint) as raised:
        store.fetch(described(folder))
    assert type(raised.value) is kind
    assert f"{server.url}/cxr: {TAR}" in str(raised.value)
    assert server.requests[TAR] == 1


def test_a_broken_transfer_goes_on_where_it_broke_off(store, server, folder):
    (folder / TAR).write_bytes(os.urandom(10 * SIZE))
    server.faults[TAR] = [DROP, DROP]
    assert same(store.fetch(described(folder)), folder)
    first, second, third = server.starts[TAR]
    assert first == 0 < second <= 5 * SIZE < third <= 7.5 * SIZE  # what was still buffered is lost


def test_a_range_that_was_not_asked_for_is_not_taken(store, server, folder):
    (folder / TAR).write_bytes(os.urandom(10 * SIZE))
    server.faults[TAR] = [DROP, Fault(junk_range=True)]
    assert same(store.fetch(described(folder)), folder)
    assert [start > 0 for start in server.starts[TAR]] == [False, True, False]


def test_a_large_file_on_a_bad_line_arrives_as_long_as_it_gets_on(store, server, folder, monkeypatch):
    monkeypatch.setattr(shard_store, "BLOCK", 50_000)
    (folder / TAR).write_bytes(os.urandom(40 * SIZE))
    server.faults[TAR] = [Fault(cut=0.2)] * 6
    assert same(store.fetch(described(folder)), folder)
    assert server.requests[TAR] == 7


def test_waits_double_up_to_a_limit_and_differ(monkeypatch):
    monkeypatch.undo()
    waits = [[shard_store._wait_s(failures) for _ in range(50)] for failures in (1, 2, 3, 20)]
    for several, most in zip(waits, (0.5, 1.0, 2.0, 30.0), strict=True):
        assert most / 2 <= min(several) < max(several) <= most


def test_a_file_of_unknown_size_is_bounded(store, server, monkeypatch):
    monkeypatch.setattr(shard_store, "UNSIZED_BYTES", 100_000)
    server.always["index.json"] = ENDLESS
    with pytest.raises(OSError, match="more than 100,000 bytes came"):
        store.fetch(File("index.json"))
    assert left_over(store) == []


def test_an_empty_file_needs_no_bytes(store, folder, server):
    (folder / "empty.txt").touch()
    assert store.fetch(described(folder, "empty.txt")).read_bytes() == b""
    assert server.requests["empty.txt"] == 0


def test_fresh_asks_again_and_takes_the_copy_only_where_nobody_answers(store, server, folder, caplog):
    index = File("index.json")
    store.fetch(index, fresh=True)
    (folder / "index.json").write_text('{"version": 2}')
    assert json.loads(store.fetch(index).read_text()) == {"version": 1}
    assert json.loads(store.fetch(index, fresh=True).read_text()) == {"version": 2}
    (folder / "index.json").write_text('{"version": 3}')
    server.always["index.json"] = BUSY
    with caplog.at_level(logging.WARNING):
        assert json.loads(store.fetch(index, fresh=True).read_text()) == {"version": 2}
    assert "status 503" in caplog.text
    assert "copy of an earlier run" in caplog.text
    server.always["index.json"] = Fault(status=403)
    with pytest.raises(PermissionError):
        store.fetch(index, fresh=True)
    server.always.clear()
    assert json.loads(store.fetch(index, fresh=True).read_text()) == {"version": 3}


def test_halves_of_two_versions_are_not_joined_where_there_is_no_checksum(store, server, folder):
    (folder / "index.json").write_bytes(os.urandom(10 * SIZE))
    server.faults["index.json"] = [DROP]
    assert same(store.fetch(File("index.json")), folder, "index.json")
    assert server.starts["index.json"] == [0, 0]


def test_a_server_that_is_gone_is_an_error_without_a_copy(folder, cache):
    with serve(folder.parent) as server:
        store = opened(server, cache)
    with pytest.raises(UnreachableError, match=r"index\.json: ClientConnectorError: Connection refused"):
        store.fetch(File("index.json"), fresh=True)


def test_a_file_of_another_size_or_another_build_is_fetched_again(store, server, folder):
    path = store.fetch(described(folder))
    path.write_bytes(b"short")
    assert same(store.fetch(described(folder)), folder)
    (folder / TAR).write_bytes(os.urandom(SIZE))  # built again: tars are often of the same size
    assert same(store.fetch(described(folder)), folder)
    assert server.requests[TAR] == 3


@pytest.mark.parametrize(
    "name",
    [
        *("../x.tar", "/etc/x.tar", "a/../../x.tar", "a//x.tar", ".x.tar", "a/.x", "a\\x.tar", "", "x.tar\n", "a/"),
        *("~/x", "a+b", "ä.tar", "x\0", "x" * 201, 7, None),
    ],
)
def test_names_that_lead_out_of_the_folder_are_refused(store, server, name, tmp_path):
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="a file of the shards is called"):
        store.fetch(File(name, 10, "0" * 64))
    store.prefetch([File(name, 10, "0" * 64)])
    with pytest.raises(ValueError, match="a file of the shards is called"):
        open_store(tmp_path).fetch(File(name))
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert not server.requests


@pytest.mark.parametrize("size", [-1, 1.5, "10", True])
def test_sizes_that_are_none_are_refused(store, size):
    with pytest.raises(ValueError, match="is said to have"):
        store.fetch(File(TAR, size, "0" * 64))


def test_prefetch_then_fetch_makes_one_request(store, server, folder, monkeypatch):
    monkeypatch.setattr(shard_store, "PREFETCH_THREADS", 1)
    server.faults[TAR] = [Fault(stall=0.2)]
    files = [described(folder, name) for name in (TAR, OTHER, TEXT)]
    store.prefetch(files)
    until(lambda: server.requests[TAR])
    store.prefetch(files)
    assert list(store._queue().waiting) == files[1:]
    for file in files:
        assert same(store.fetch(file), folder, file.name)
    store.prefetch(files)
    assert server.requests == {TAR: 1, OTHER: 1, TEXT: 1}


def test_prefetch_fails_silently_and_fetch_tells(store, server, folder):
    server.always[TAR] = Fault(status=404)
    store.prefetch([described(folder), File("../x"), File(OTHER, 2**50)])
    until(lambda: server.requests[TAR] and not store._queue().threads)
    with pytest.raises(FileNotFoundError, match=TAR):
        store.fetch(described(folder))


def test_closing_forgets_what_waits_and_a_closed_store_opens_again(store, server, folder, monkeypatch):
    monkeypatch.setattr(shard_store, "PREFETCH_THREADS", 1)
    server.faults[TAR] = [Fault(stall=0.2)]
    store.prefetch([described(folder), described(folder, OTHER)])
    until(lambda: server.requests[TAR])
    store.close()
    until(lambda: (store.root / TAR).exists())
    time.sleep(0.05)
    assert server.requests[OTHER] == 0
    assert same(store.fetch(described(folder, OTHER)), folder, OTHER)


def test_four_processes_download_a_file_once(store, server, folder):
    server.faults[TAR] = [Fault(stall=0.2)]
    file = described(folder)

    def fetch() -> None:
        assert same(store.fetch(file), folder)

    children = [FORK.Process(target=fetch) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    assert server.requests[TAR] == 1


def test_processes_that_wait_for_a_failing_download_do_not_each_repeat_it(store, server, folder):
    server.always[TAR] = BUSY._replace()
    file, errors = described(folder), []

    def fetch() -> None:
        with pytest.raises(UnreachableError, match="503"):
            store.fetch(file)
        errors.append(1)

    with store._locked(TAR):  # all four are waiting when the first one begins
        threads = [threading.Thread(target=fetch) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(20)
    assert len(errors) == 4
    assert server.requests[TAR] == 3
    server.always.clear()
    assert same(store.fetch(file), folder)  # who asks later is not bound by it


def test_a_store_used_in_the_parent_works_in_a_forked_child_and_goes_on_in_the_parent(store, server, folder):
    server.faults[TEXT] = [Fault(stall=0.25)]
    store.fetch(described(folder))
    store.prefetch([described(folder, TEXT)])  # a transfer is under way, in a thread that the child will not have
    until(lambda: server.requests[TEXT])

    def child() -> None:
        assert same(store.fetch(described(folder, OTHER)), folder, OTHER)
        store.prefetch([described(folder, "text_encoder/model.safetensors")])
        assert same(store.fetch(described(folder, TEXT)), folder, TEXT)
        assert same(
            store.fetch(described(folder, "text_encoder/model.safetensors")), folder, "text_encoder/model.safetensors"
        )
        store.close()

    in_child(child)
    assert same(store.fetch(described(folder, TEXT)), folder, TEXT)
    store.fetch(File("index.json"), fresh=True)
    in_child(lambda: store.fetch(File("index.json"), fresh=True))
    assert server.requests == {TAR: 1, OTHER: 1, TEXT: 1, "model.safetensors": 1, "index.json": 2}


def test_a_downloader_that_is_killed_leaves_nothing_half(store, server, folder):
    server.faults[TAR] = [STALL]
    file = described(folder)
    slow = opened(server, store.root.parent, timeout_s=30)
    child = FORK.Process(target=slow.fetch, args=(file,))
    child.start()
    until(lambda: any(path.stat().st_size for path in store.root.rglob("*.part")))
    child.kill()
    child.join(20)
    assert not (store.root / TAR).exists()
    assert left_over(store) == [f"{TAR}.part"]
    assert same(store.fetch(file), folder)
    assert left_over(store) == []


def test_a_worker_does_not_hold_the_locks_of_a_parent_that_is_killed(store, server, folder):
    server.faults[TAR] = [STALL]
    file = described(folder)
    slow = opened(server, store.root.parent, timeout_s=30)
    reading, writing = os.pipe()

    def parent() -> None:
        slow.prefetch([file])
        until(lambda: any(path.stat().st_size for path in store.root.rglob("*.part")))
        worker = FORK.Process(target=time.sleep, args=(60,))
        worker.start()
        os.write(writing, str(worker.pid).encode())
        time.sleep(60)

    child = FORK.Process(target=parent)
    child.start()
    worker = int(os.read(reading, 20))
    try:
        child.kill()
        child.join()  # with a limit it would wait for a pipe that the worker has too
        began = time.monotonic()
        assert same(store.fetch(file), folder)
        assert time.monotonic() - began < 5
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


def test_the_interpreter_leaves_in_the_middle_of_a_stalled_download(server, folder, cache):
    server.always[TAR] = STALL
    script = (
        "import sys, time; from pathlib import Path; from imitate_ds.data.shard_store import *\n"
        f"store = open_store({server.url + '/cxr'!r}, cache=Path({str(cache)!r}), timeout_s=30)\n"
        f"store.prefetch([File({TAR!r}, {SIZE})])\n"
        "time.sleep(0.5)\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert server.requests[TAR] == 1
    assert time.monotonic() - began < 15


def test_the_longest_unused_shards_make_room(server, folder, cache):
    store = opened(server, cache, max_bytes=int(2.5 * SIZE))
    for seconds, name in ((300, OTHER), (200, TEXT), (400, "index.json")):
        age(store.fetch(described(folder, name)), seconds)
    held = (store.root / OTHER).open("rb")
    store.fetch(described(folder))
    assert sorted(path.name for path in store.root.iterdir() if path.is_file()) == sorted(["index.json", TEXT, TAR])
    assert store._remove_unused(store.root / OTHER)  # as where another process was quicker
    assert held.read() == (folder / OTHER).read_bytes()
    held.close()
    assert sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file()) <= 2.5 * SIZE
    assert same(store.fetch(described(folder, OTHER)), folder, OTHER)
    assert not (store.root / TEXT).exists()


def test_shards_just_fetched_stay_though_the_cache_is_full(server, folder, cache, caplog):
    store = opened(server, cache, max_bytes=int(1.5 * SIZE))
    age(store.fetch(described(folder)), 300)
    in_child(lambda: store.fetch(described(folder)))  # used by somebody
    with caplog.at_level(logging.WARNING):
        store.fetch(described(folder, OTHER))
        store.fetch(described(folder, TEXT))
    assert all((store.root / name).exists() for name in (TAR, OTHER, TEXT))
    assert caplog.text.count("data.cache_gib") == 1


def test_a_file_larger_than_the_cache_is_refused(server, folder, cache):
    with pytest.raises(ValueError, match=r"data\.cache_gib = .*train-000000\.tar alone has"):
        opened(server, cache, max_bytes=SIZE - 1).fetch(described(folder))
    assert not server.requests


def test_a_full_disk_is_said_at_once(store, server, folder):
    def child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError, match=r"data\.cache_dir"):
            store.fetch(described(folder))

    in_child(child)
    assert server.requests[TAR] == 1
    assert left_over(store) == []


def test_credentials_open_doors_and_show_up_nowhere(server, folder, cache, caplog):
    server.password = "alice:s3cret"
    login = server.url.replace("http://", "http://alice:s3cret@") + "/cxr/?token=t0ken"
    store = open_store(login.replace("http", "HTTP"), cache=cache, attempts=2, timeout_s=0.3)
    messages = [repr(store), str(store.root)]
    with caplog.at_level(logging.INFO):
        assert same(store.fetch(described(folder)), folder)
        store.fetch(File("index.json"))
        server.always["index.json"] = BUSY
        store.fetch(File("index.json"), fresh=True)
        assert "status 503" in caplog.text
        for fault in (BUSY, FLIP, DROP._replace(cut=0), Fault(status=404), Fault(status=400), Fault(status=401)):
            server.always[OTHER] = fault
            with pytest.raises(OSError, match=OTHER) as raised:
                store.fetch(described(folder, OTHER))
            assert (raised.value.__context__, raised.value.__cause__) == (None, None)
            messages.append(str(raised.value))
    server.password = "bob:other"
    with pytest.raises(PermissionError, match="status 401"):
        store.fetch(File("text_encoder/model.safetensors"))
    messages += [str(path) for path in cache.rglob("*")] + [path.read_text() for path in cache.rglob("*.lock")]
    shown = "\n".join([*messages, caplog.text])
    assert not any(secret in shown for secret in ("alice", "s3cret", "t0ken"))
    assert store.root == opened(server, cache).root  # whatever the credentials, one cache
    store.close()


@pytest.mark.parametrize(
    "url", ["http://user:pass/word@host/x", "http://user:secret@/x", "http://[host/secret", "s3:///secret"]
)
def test_urls_that_cannot_be_read_are_refused_without_showing_them(url, cache):
    with pytest.raises(ValueError, match=r"data\.shards") as raised:
        open_store(url, cache=cache)
    assert not any(secret in str(raised.value) for secret in ("pass/", "secret"))


def test_a_protocol_nobody_knows_is_named(cache):
    with pytest.raises(ValueError, match=r"data\.shards: gopher:// is unknown"):
        open_store("gopher://h/x", cache=cache)


@pytest.mark.parametrize(("url", "package"), [("https://h/x", "aiohttp"), ("s3://b/x", "s3fs")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(url, package, cache):
    script = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from imitate_ds.data.shard_store import open_store\n"
        f"try: open_store({url!r}, cache={str(cache)!r} and None)\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)
    assert f"needs {package}: pip install 'imitate-ds[remote]'" in done.stdout


def test_the_cache_lies_where_the_environment_says(server, monkeypatch, tmp_path):
    monkeypatch.setenv("IMITATE_DS_CACHE", str(tmp_path / "scratch"))
    store = opened(server, None)
    assert store.root.parent == tmp_path / "scratch"
    assert store.root.name.endswith("-cxr")
    monkeypatch.delenv("IMITATE_DS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert opened(server, None).root.parent == tmp_path / "home" / ".cache" / "imitate_ds"


def test_a_cache_that_others_could_write_to_becomes_private(store, server):
    store.root.chmod(0o777)
    assert stat.S_IMODE(opened(server, store.root.parent).root.stat().st_mode) == 0o700


def test_other_protocols_are_read_in_blocks(folder, cache, monkeypatch):
    monkeypatch.setattr(shard_store, "BLOCK", 70_000)
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/cxr/{name}": (folder / name).read_bytes() for name in (TAR, "index.json")})
    for location in ("memory://cxr", folder.as_uri()):
        store = open_store(location, cache=cache)
        assert same(store.fetch(described(folder)), folder)
        assert same(store.fetch(File("index.json")), folder, "index.json")
        with pytest.raises(FileNotFoundError, match=r"absent\.tar"):
            store.fetch(File("absent.tar", 5))


@pytest.fixture
def s3(server, monkeypatch) -> HostileServer:
    """The hostile server as an S3 endpoint, for reading: GetObject of a bucket 'cxr'."""
    pytest.importorskip("s3fs", reason="needs the extra 'remote'")
    _s3_environment(monkeypatch, server.url)
    return server


def _s3_environment(monkeypatch, url: str) -> None:
    values = {
        "ENDPOINT_URL": url,
        "ACCESS_KEY_ID": "testing",
        "SECRET_ACCESS_KEY": "hushhush",
        "DEFAULT_REGION": "us-east-1",
    }
    for name, value in (values | {"EC2_METADATA_DISABLED": "true"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)


@pytest.mark.parametrize("faults", [[], [BUSY, BUSY], [DROP], [STALL], [SHORT], [FLIP], [Fault(status=429)]])
@pytest.mark.parametrize("ranges", [True, False])
def test_s3_is_tried_again_too(s3, folder, cache, faults, ranges):
    s3.faults[TAR] = list(faults)
    s3.ranges = ranges
    store = open_store("s3://cxr", cache=cache, attempts=3, timeout_s=0.5)
    assert same(store.fetch(described(folder)), folder)
    # a part of the right length, and then a whole file where the rest was asked for, are one attempt more
    assert s3.requests[TAR] == len(faults) + 1 + (SHORT in faults and not ranges)
    store.close()


@pytest.mark.parametrize(
    ("fault", "kind", "hint", "requests"),
    [
        (Fault(status=404), FileNotFoundError, TAR, 1),
        (Fault(status=403), PermissionError, "credentials", 1),
        (BUSY, UnreachableError, "status 503", 2),
        (STALL, UnreachableError, "nothing came in time", 2),
    ],
)
def test_s3_says_why(s3, folder, cache, fault, kind, hint, requests):
    s3.always[TAR] = fault
    with pytest.raises(kind, match=hint) as raised:
        open_store("s3://cxr", cache=cache, attempts=2, timeout_s=0.3).fetch(described(folder))
    assert "hushhush" not in str(raised.value)
    assert s3.requests[TAR] == requests


def test_s3_without_credentials_says_what_to_set(s3, folder, cache, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(PermissionError, match="FSSPEC_S3_ANON"):
        open_store("s3://cxr", cache=cache, attempts=2, timeout_s=0.5).fetch(described(folder))


def test_a_bucket_of_a_real_s3_server_is_read(folder, cache, monkeypatch):
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    monkeypatch.setattr(shard_store, "BLOCK", 70_000)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _s3_environment(monkeypatch, "http://{}:{}".format(*server.get_host_and_port()))
        bucket = fsspec.filesystem("s3", skip_instance_cache=True)
        bucket.mkdir("hospital")
        for name in (TAR, OTHER, "index.json", "text_encoder/model.safetensors"):
            bucket.pipe_file(f"hospital/shards/cxr/{name}", (folder / name).read_bytes())
        store = open_store("s3://hospital/shards/cxr/", cache=cache, attempts=2, timeout_s=5)
        assert same(store.fetch(File("index.json"), fresh=True), folder, "index.json")
        for name in (TAR, "text_encoder/model.safetensors"):
            assert same(store.fetch(described(folder, name)), folder, name)
        in_child(lambda: store.fetch(described(folder, OTHER)))
        assert same(store.root / OTHER, folder, OTHER)
        with pytest.raises(FileNotFoundError, match=r"s3://hospital/shards/cxr: absent\.tar"):
            store.fetch(File("absent.tar", 5))
        store.close()
    finally:
        server.stop()
