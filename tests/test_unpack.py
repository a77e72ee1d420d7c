"""What a server does with an archive: the whole release, or nothing that looks like one."""

import gzip
import hashlib
import io
import json
import os
import resource
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tako_cli.deploy import unpack

PROGRAM = Path(unpack.__file__)

Member = tuple[str, bytes] | tarfile.TarInfo


def member(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def archive(*members: Member, about: bool = True) -> bytes:
    """What is sent, with these in it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        for one in [*members, *([("RELEASE.json", b'{"app": "shop"}')] if about else [])]:
            if isinstance(one, tarfile.TarInfo):
                tar.addfile(one)
            else:
                info = tarfile.TarInfo(one[0])
                info.size = len(one[1])
                tar.addfile(info, io.BytesIO(one[1]))
    return out.getvalue()


def make(releases: Path, data: bytes, name: str = "abc", digest: str = "", **facts: Any) -> Path:
    wanted = digest or hashlib.sha256(data).hexdigest()
    return Path(unpack.unpack(str(releases), name, wanted, io.BytesIO(data), facts))


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    return tmp_path / "releases"


def test_the_files_are_there_and_what_the_server_was_told(releases: Path) -> None:
    place = make(releases, archive(("a/b.txt", b"1"), member("c", tarfile.SYMTYPE, "a/b.txt")), by="ada")
    assert place == releases / "abc"
    assert (place / "c").read_text() == (place / "a" / "b.txt").read_text() == "1"
    told = json.loads((place / "RELEASE.json").read_text())
    assert {"app": "shop", "id": "abc", "by": "ada"}.items() <= told.items()
    assert [path.name for path in releases.iterdir()] == ["abc"]


@pytest.mark.parametrize(
    "bad",
    [
        ("../evil", b""),
        ("a/../../evil", b""),
        ("a/../b", b""),
        ("/etc/evil", b""),
        ("./a", b""),
        ("a//b", b""),
        member("device", tarfile.CHRTYPE),
        member("device", tarfile.BLKTYPE),
        member("pipe", tarfile.FIFOTYPE),
        member("hard", tarfile.LNKTYPE, "RELEASE.json"),
        member("hard", tarfile.LNKTYPE, "/etc/passwd"),
        member("link", tarfile.SYMTYPE, "/etc/passwd"),
        member("link", tarfile.SYMTYPE, "../evil"),
        member("link", tarfile.SYMTYPE, "a/../../evil"),
        member("a/link", tarfile.SYMTYPE, "../../abc"),
        member("link", tarfile.SYMTYPE, ".."),
    ],
    ids=lambda one: one.name + one.linkname if isinstance(one, tarfile.TarInfo) else one[0],
)
def test_what_would_leave_the_release_is_refused_and_nothing_is_made(releases: Path, bad: Member) -> None:
    with pytest.raises(unpack.Bad):
        make(releases, archive(("first.txt", b"1"), bad))
    assert list(releases.iterdir()) == []
    assert not (releases.parent / "evil").exists()


@pytest.mark.parametrize(
    "members",
    [
        [member("here", tarfile.SYMTYPE, "."), member("out", tarfile.SYMTYPE, "here/../evil")],
        [member("here", tarfile.SYMTYPE, "."), member("here/out", tarfile.SYMTYPE, "x")],
        [member("here", tarfile.SYMTYPE, "."), ("here/evil", b"1")],
        [("here/evil", b"1"), member("here", tarfile.SYMTYPE, "/tmp")],
        [member("a", tarfile.SYMTYPE, "b"), member("b", tarfile.SYMTYPE, "../evil")],
        [("twice", b"1"), ("twice", b"2")],
        [member("twice", tarfile.SYMTYPE, "x"), ("twice", b"2")],
    ],
)
def test_no_link_leads_out_by_way_of_another_and_nothing_is_written_through_one(
    releases: Path, members: list[Member]
) -> None:
    (releases.parent / "evil").mkdir()
    with pytest.raises(unpack.Bad):
        make(releases, archive(*members))
    assert list(releases.iterdir()) == []
    assert list((releases.parent / "evil").iterdir()) == []


def test_neither_owner_nor_mode_comes_from_the_archive_but_that_it_is_executable(releases: Path) -> None:
    info = tarfile.TarInfo("run.sh")
    info.mode, info.uid, info.gid = 0o6777, 12345, 12345
    before = os.umask(0o022)
    try:
        place = make(releases, archive(info, ("b", b"")))
    finally:
        os.umask(before)
    seen = (place / "run.sh").stat()
    assert (stat.S_IMODE(seen.st_mode), seen.st_uid) == (0o755, os.getuid())
    assert stat.S_IMODE((place / "b").stat().st_mode) == 0o644


def test_of_a_cable_cut_anywhere_nothing_is_left_and_the_next_one_is_whole(releases: Path) -> None:
    data = archive(("a.txt", os.urandom(3000)), ("b.txt", b"x" * 100_000))
    digest = hashlib.sha256(data).hexdigest()
    for size in [*range(0, len(data), 97), len(data) - 1]:
        with pytest.raises(unpack.Bad):
            make(releases, data[:size], digest=digest)
        assert list(releases.iterdir()) == []
    assert (make(releases, data, digest=digest) / "b.txt").stat().st_size == 100_000


@pytest.mark.parametrize("change", [lambda data: data + b"x", lambda data: archive(("a.txt", b"2"))])
def test_an_archive_that_is_not_the_one_that_was_sent_is_refused(
    releases: Path, change: Callable[[bytes], bytes]
) -> None:
    data = archive(("a.txt", b"1"))
    with pytest.raises(unpack.Bad, match="not the one that was sent"):
        make(releases, change(data), digest=hashlib.sha256(data).hexdigest())
    assert list(releases.iterdir()) == []


@pytest.mark.parametrize(
    "data",
    [b"", b"no archive", gzip.compress(b"no tar" * 1000), archive(about=False)],
    ids=["empty", "text", "no tar", "no RELEASE.json"],
)
def test_what_is_no_release_is_refused(releases: Path, data: bytes) -> None:
    with pytest.raises(unpack.Bad):
        make(releases, data)
    assert list(releases.iterdir()) == []


def test_the_same_release_again_is_left_as_it_is_and_another_content_is_refused(releases: Path) -> None:
    data = archive(("a.txt", b"1"))
    place = make(releases, data)
    (place / ".venv").mkdir()
    assert make(releases, data) == place
    assert (place / ".venv").is_dir()
    with pytest.raises(unpack.Bad, match="another content"):
        make(releases, archive(("a.txt", b"2")))
    assert (place / "a.txt").read_text() == "1"
    (releases / "mine").mkdir()
    with pytest.raises(unpack.Bad, match="no release of tako's"):
        make(releases, data, "mine")


def run(releases: Path, data: bytes, *words: str, **options: Any) -> "subprocess.CompletedProcess[bytes]":
    """The program alone, as it is sent over ssh: in a Python that has nothing of tako's."""
    given = [sys.executable, "-I", "-S", "-c", PROGRAM.read_text(), str(releases), *words]
    return subprocess.run(given, input=data, capture_output=True, check=False, timeout=60, **options)


def test_it_runs_alone_from_a_pipe_or_a_file(releases: Path, tmp_path: Path) -> None:
    data = archive(("caf\udce9\n", b"1"))
    digest = hashlib.sha256(data).hexdigest()
    done = run(releases, data, "one", digest, "-", json.dumps({"by": "ada"}), env={"LC_ALL": "C"})
    assert (done.returncode, done.stdout) == (0, f"{releases}/one\n".encode()), done.stderr
    assert (releases / "one" / "caf\udce9\n").read_text() == "1"
    (tmp_path / "a.tar.gz").write_bytes(data)
    words = [sys.executable, "-I", "-", str(releases), "two", digest, str(tmp_path / "a.tar.gz")]
    subprocess.run(words, input=PROGRAM.read_bytes(), check=True, capture_output=True, timeout=60)
    assert (releases / "two" / "RELEASE.json").is_file()


def test_it_says_in_one_line_why_not(releases: Path) -> None:
    done = run(releases, archive(("../evil", b"")), "one", "0" * 64, "-")
    assert done.returncode == 1
    assert done.stderr.decode() == "the release one was not unpacked: b'../evil' is no path inside a release\n"


def test_a_disk_that_is_full_leaves_nothing(releases: Path) -> None:
    data = archive(("big", b"x" * 1_000_000))

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run(releases, data, "one", hashlib.sha256(data).hexdigest(), "-", preexec_fn=small_files_only)
    assert done.returncode == 1
    assert b"File too large" in done.stderr
    assert list(releases.iterdir()) == []


def test_what_a_kill_left_is_no_release_and_the_next_one_removes_it(releases: Path) -> None:
    data = archive(("a", os.urandom(200_000)), ("b", b"1"))
    digest = hashlib.sha256(data).hexdigest()
    given = [sys.executable, "-I", "-c", PROGRAM.read_text(), str(releases), "one", digest, "-"]
    process = subprocess.Popen(given, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(data[:150_000])
    process.stdin.flush()
    from conftest import until

    until(lambda: releases.is_dir() and list(releases.glob(".one.*/a")))
    process.kill()
    process.wait()
    process.stdin.close()
    assert [path.name[:5] for path in releases.iterdir()] == [".one."]
    make(releases, data, "other")
    assert len(list(releases.iterdir())) == 2
    make(releases, data, "one")
    assert {path.name for path in releases.iterdir()} == {"one", "other"}
