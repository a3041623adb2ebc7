"""Downloads against a server on this machine, archives made to do harm, and the check of layouts."""

import hashlib
import io
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny_trees import cut_short, mvtec_tree, visa_tree

from defectbook.core import DataError, WeightsError
from defectbook.data import fetching
from defectbook.data.fetching import check_data, data_folder, fetch_data, list_data, safe_name, unpack
from defectbook.data.sources import fetch, manifest

CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves `content`; closes the connection after `break_after` bytes in the first `breaks` answers."""

    def __init__(self, content=CONTENT, ranges=True, breaks=0, break_after=300_000, status=200):
        self.content, self.ranges, self.breaks, self.break_after, self.status = content, ranges, breaks, break_after, status
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/file"

    def answer(self, request):
        wanted = request.headers.get("Range", "")
        self.asked.append(wanted)
        if self.status != 200:
            request.send_error(self.status)
            return
        start = int(wanted[6:-1]) if wanted and self.ranges else 0
        if start and start >= len(self.content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(self.content)}")
            request.end_headers()
            return
        body = self.content[start:]
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if self.breaks:
            self.breaks -= 1
            body = body[:self.break_after]
        request.wfile.write(body)

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    servers = []

    def start(**options):
        servers.append(Server(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


# Downloads

def test_broken_connection_is_taken_up_within_one_call(tmp_path, serve):
    server = serve(breaks=2)
    assert fetch(server.url, tmp_path / "a" / "file", DIGEST).read_bytes() == CONTENT
    assert server.asked == ["", "bytes=300000-", "bytes=600000-"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_interrupted_download_is_continued_by_the_next_call(tmp_path, serve):
    server = serve(breaks=100, break_after=100_000)
    with pytest.raises(WeightsError, match="500000 bytes are kept, call again to continue"):
        fetch(server.url, tmp_path / "file", DIGEST)
    assert (tmp_path / "file.part").stat().st_size == 500_000 and not (tmp_path / "file").exists()
    server.breaks = 0
    assert fetch(server.url, tmp_path / "file", DIGEST).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=500000-"


def test_a_server_without_ranges_starts_again(tmp_path, serve):
    server = serve(ranges=False)
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    assert fetch(server.url, tmp_path / "file", DIGEST).read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-"]


def test_a_complete_part_needs_no_bytes(tmp_path, serve):
    server = serve()
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert fetch(server.url, tmp_path / "file", DIGEST).read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-"]


def test_a_part_that_is_too_long_is_thrown_away(tmp_path, serve):
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    assert fetch(serve().url, tmp_path / "file", DIGEST).read_bytes() == CONTENT


def test_a_part_of_another_file_is_found_by_the_hash_and_removed(tmp_path, serve):
    server = serve()
    (tmp_path / "file.part").write_bytes(b"\1" * 1000)
    with pytest.raises(DataError, match=f"expected {DIGEST[:16]}"):
        fetch(server.url, tmp_path / "file", DIGEST, DataError)
    assert not list(tmp_path.iterdir())
    assert fetch(server.url, tmp_path / "file", DIGEST, DataError).is_file()


@pytest.mark.parametrize("status", [403, 404, 500])
def test_refusals_are_named(tmp_path, serve, status):
    server = serve(status=status)
    with pytest.raises(WeightsError, match=str(status)) as error:
        fetch(server.url, tmp_path / "file", DIGEST)
    assert server.url in str(error.value)
    assert len(server.asked) == (1 if status < 500 else 5)


def test_a_right_file_is_not_fetched_again(tmp_path, serve):
    server = serve()
    (tmp_path / "file").write_bytes(CONTENT)
    assert fetch(server.url, tmp_path / "file", DIGEST).read_bytes() == CONTENT and not server.asked
    (tmp_path / "file").write_bytes(b"old")
    assert fetch(server.url, tmp_path / "file", DIGEST).read_bytes() == CONTENT and server.asked == [""]


def test_no_server_and_no_http(tmp_path, serve):
    server = serve()
    server.close()
    with pytest.raises(WeightsError, match="download failed"):
        fetch(server.url, tmp_path / "file", DIGEST)
    with pytest.raises(WeightsError, match="not an http"):
        fetch("file:///etc/passwd", tmp_path / "file", DIGEST)


# Archives

def make_zip(path, entries, mode=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if mode:
                info.external_attr = mode << 16
            file.writestr(info, content)
    return path


def make_tar(path, entries, compression=""):
    with tarfile.open(path, f"w:{compression}") as file:
        for info, content in entries:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


GOOD = [("a.txt", b"one"), ("b/c.txt", b"two" * 1000)]


@pytest.mark.parametrize("make", [
    lambda path: make_zip(path, GOOD),
    lambda path: make_tar(path, GOOD),
    lambda path: make_tar(path, GOOD, "gz"),
    lambda path: make_tar(path, GOOD, "xz"),
    lambda path: make_tar(path, GOOD, "bz2"),
])
def test_good_archives(tmp_path, make):
    target = unpack(make(tmp_path / "archive"), tmp_path / "target")
    assert (target / "a.txt").read_bytes() == b"one" and (target / "b" / "c.txt").read_bytes() == b"two" * 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "target"]


NAMES = ["../evil", "a/../../evil", "/etc/evil", "..\\evil", "\\evil", "C:\\evil", "c:evil", "a/..", "..", "//server/share/evil"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_names_that_climb_out(tmp_path, name, make):
    inner = tmp_path / "x" / "y"
    inner.mkdir(parents=True)
    with pytest.raises(DataError, match="outside the target"):
        unpack(make(inner / "archive", [("good.txt", b"x"), (name, b"evil")]), inner / "target")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [inner / "archive"]


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("info", [
    special("link", tarfile.SYMTYPE, "/etc"), special("link", tarfile.SYMTYPE, "a.txt"), special("link", tarfile.LNKTYPE, "a.txt"),
    special("pipe", tarfile.FIFOTYPE), special("disk", tarfile.BLKTYPE), special("tty", tarfile.CHRTYPE),
])
def test_tar_links_and_devices(tmp_path, info):
    archive = make_tar(tmp_path / "archive", [("a.txt", b"x"), (info, b"")])
    with pytest.raises(DataError, match="link or a device"):
        unpack(archive, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def test_zip_links(tmp_path):
    with pytest.raises(DataError, match="link or a device"):
        unpack(make_zip(tmp_path / "archive", [("link", b"/etc")], mode=0o120777), tmp_path / "target")


def test_writing_through_a_link_is_impossible(tmp_path):
    (tmp_path / "outside").mkdir()
    archive = make_tar(tmp_path / "archive", [(special("door", tarfile.SYMTYPE, str(tmp_path / "outside")), b""), ("door/evil", b"x")])
    with pytest.raises(DataError):
        unpack(archive, tmp_path / "target")
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("entries", [[("a", b"1"), ("a", b"2")], [("a", b"1"), ("a/b", b"2")], [("a/b", b"1"), ("a", b"2")]])
@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_that_replace_each_other(tmp_path, entries, make):
    with pytest.raises(DataError, match="two entries claim"):
        unpack(make(tmp_path / "archive", entries), tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("make", [make_zip, lambda path, entries: make_tar(path, entries, "gz")])
def test_bombs(tmp_path, make):
    archive = make(tmp_path / "archive", [(f"zeros{i}", bytes(40 << 20)) for i in range(2)])
    assert archive.stat().st_size < 1 << 20
    with pytest.raises(DataError, match="bomb"):
        unpack(archive, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]
    with pytest.raises(DataError, match="bomb"):
        unpack(make(tmp_path / "small", GOOD), tmp_path / "target", limit=3002)
    assert unpack(tmp_path / "small", tmp_path / "target", limit=3003).is_dir()


@pytest.mark.parametrize("make", [make_zip, make_tar, lambda path, entries: make_tar(path, entries, "gz"),
                                  lambda path, entries: make_tar(path, entries, "xz")])
def test_cut_archives(tmp_path, make):
    import random

    noise = random.Random(0).randbytes(50_000)
    archive = cut_short(make(tmp_path / "archive", [("a.bin", noise), ("b.bin", noise[::-1])]), 0.6)
    with pytest.raises(DataError, match="damaged"):
        unpack(archive, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def test_flipped_bit_in_a_zip(tmp_path):
    archive = make_zip(tmp_path / "archive", [("a.txt", bytes(range(256)) * 40)])
    content = bytearray(archive.read_bytes())
    content[60] ^= 255
    archive.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        unpack(archive, tmp_path / "target")


def test_not_an_archive_and_existing_target(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match="damaged or no zip or tar"):
        unpack(tmp_path / "text", tmp_path / "target")
    (tmp_path / "target").mkdir()
    with pytest.raises(DataError, match="exists already"):
        unpack(make_zip(tmp_path / "archive", GOOD), tmp_path / "target")
    with pytest.raises(DataError, match="no such archive"):
        unpack(tmp_path / "none", tmp_path / "other")


def test_safe_names_stay():
    assert str(safe_name("a/b..c/d.png", "x")) == "a/b..c/d.png"
    assert str(safe_name("./a", "x")) == "a"


# Whole sets

@pytest.fixture
def packed_visa(tmp_path):
    """A VisA archive as published (flat tar) and its hash."""
    tree = visa_tree(tmp_path / "tree")
    archive = tmp_path / "archives" / "VisA_20220922.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as file:
        for path in sorted(tree.iterdir()):
            file.add(path, path.name)
    return archive


def use_entry(monkeypatch, **changes):
    changed = {**manifest()["data"]["visa"], **changes}
    monkeypatch.setattr(fetching, "entry", lambda kind, name: changed)


def test_fetch_downloads_resumes_unpacks_and_checks(tmp_path, packed_visa, serve, monkeypatch):
    content = packed_visa.read_bytes()
    server = serve(content=content, breaks=7, break_after=len(content) // 10)
    use_entry(monkeypatch, url=server.url, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(DataError, match="bytes are kept"):
        fetch_data("visa", tmp_path / "data" / "visa")
    assert fetch_data("visa", tmp_path / "data" / "visa") == tmp_path / "data" / "visa"
    assert server.asked[5].startswith("bytes=")
    assert check_data("visa", tmp_path / "data" / "visa", deep=True).ok
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["visa"]


def test_wrong_checksum_unpacks_nothing(tmp_path, packed_visa, serve, monkeypatch):
    use_entry(monkeypatch, url=serve(content=packed_visa.read_bytes()).url, sha256="0" * 64)
    with pytest.raises(DataError, match="expected 0000000000000000"):
        fetch_data("visa", tmp_path / "data" / "visa")
    assert not list((tmp_path / "data").iterdir())


def test_local_archive_is_verified(tmp_path, packed_visa, monkeypatch):
    with pytest.raises(DataError, match="it is not the archive of 'visa' that we know"):
        fetch_data("visa", tmp_path / "visa", archive=packed_visa)
    use_entry(monkeypatch, sha256=hashlib.sha256(packed_visa.read_bytes()).hexdigest())
    assert fetch_data("visa", tmp_path / "visa", archive=packed_visa).is_dir() and packed_visa.is_file()
    with pytest.raises(DataError, match="exists already"):
        fetch_data("visa", tmp_path / "visa", archive=packed_visa)


def test_unpacked_but_wrong_layout(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "archive", GOOD)
    use_entry(monkeypatch, sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    with pytest.raises(DataError, match="1cls.csv: not found"):
        fetch_data("visa", tmp_path / "visa", archive=archive)


@pytest.mark.parametrize("name", ["mvtec", "btad", "deeppcb", "magnetic_tile", "elpv", "folder"])
def test_sets_without_direct_download_name_the_way(tmp_path, name):
    with pytest.raises(DataError, match="no direct download is offered") as error:
        fetch_data(name, tmp_path / name)
    item = manifest()["data"][name]
    assert item["page"] in str(error.value) and item["licence"] in str(error.value)
    assert not list(tmp_path.iterdir())


def test_unknown_set():
    with pytest.raises(DataError, match="did you mean 'deeppcb'"):
        fetch_data("deepcb")
    with pytest.raises(DataError, match="did you mean 'visa'"):
        check_data("vise")


def test_table_of_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("DEFECTBOOK_DATA", str(tmp_path))
    mvtec_tree(tmp_path / "mvtec")
    table = list_data()
    assert set(table.index) == set(manifest()["data"])
    assert table.loc["mvtec", "found"] == str(tmp_path / "mvtec") and table.loc["visa", "found"] == ""
    assert table.loc["visa", "get"] == "direct" and (table["licence"] != "").all()
    assert data_folder("deeppcb") == tmp_path / "DeepPCB"


def test_manifest_has_a_full_hash_for_each_direct_download():
    for name, item in manifest()["data"].items():
        assert {"title", "licence", "page", "folder", "size", "obtain"} <= set(item), name
        assert not item.get("url") or len(item["sha256"]) == 64


# Checks

def test_check_names_the_first_problem(tmp_path):
    mvtec_tree(tmp_path, "a")
    mvtec_tree(tmp_path, "b")
    report = check_data("folder", tmp_path, deep=True)
    assert report.ok and len(report.facts) == 2 and "all right" in str(report)
    cut_short(tmp_path / "b/test/dot/001.png")
    assert check_data("folder", tmp_path).ok
    report = check_data("folder", tmp_path, deep=True)
    assert "b/test/dot/001.png" in report.problem and [fact[:2] for fact in report.facts] == ["a:"]
    (tmp_path / "a/ground_truth/dot/000_mask.png").unlink()
    assert "no mask for" in check_data("folder", tmp_path).problem


def test_check_hashes_the_manifest(tmp_path):
    mvtec_tree(tmp_path, "a")
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(tmp_path)}" for path in files]
    (tmp_path / "MANIFEST.sha256").write_text("\n".join(lines) + "\n")
    assert f"{len(files)} files as listed" in str(check_data("folder", tmp_path))
    files[3].write_bytes(files[3].read_bytes() + b"x")
    assert f"{files[3]}: differs" in check_data("folder", tmp_path).problem
    files[3].unlink()
    assert f"{files[3]}: named in MANIFEST.sha256 but missing" in check_data("folder", tmp_path).problem


def test_check_of_a_set_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("DEFECTBOOK_DATA", str(tmp_path))
    report = check_data("btad")
    assert not report.ok and "btad.zip" in report.problem and "not found" in str(report)
