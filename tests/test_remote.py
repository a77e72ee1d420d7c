"""Commands on a server, through the system's ssh and a real sshd: what is quoted, what is shared, what is refused."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
import sshd as server
from cli import TAKO, environment, is_alive, make_project
from conftest import finished, script, until
from sshd import Sshd

from tako_cli.remote import CommandFailed, HostKeyRefused, LinkLost, Remote, Unreachable
from tako_runtime.errors import InvalidValue

# They run processes of their own.
pytestmark = pytest.mark.slow


@pytest.fixture
def sshd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    with server.running() as one:
        monkeypatch.setenv("TAKO_SSH", one.program)
        yield one


@pytest.fixture
def web(sshd: Sshd) -> Iterator[Remote]:
    remote = Remote("web-1", "web")
    remote.connect()
    yield remote
    remote.close()


ODD = ["", "two words", "it's", '"double"', "$HOME", "`id`", "a;b", "*", "~", "\\n", "new\nline", "-n", "ünï", "!x"]


def test_words_arrive_there_as_they_are(web: Remote) -> None:
    told = web.done([sys.executable, "-c", "import sys; print(ascii(sys.argv[1:]))", *ODD])
    assert told.strip() == ascii(ODD)


def test_what_a_command_reads_prints_and_ends_with_comes_back(web: Remote) -> None:
    done = web.run(["sh", "-c", "cat; echo beside >&2; exit 7"], input=b"given")
    assert done == (7, "given", "beside\n")


def test_a_commands_own_255_is_not_the_connections(web: Remote) -> None:
    assert web.run(["sh", "-c", "exit 255"]).code == 255


def test_a_command_that_failed_is_named_with_its_last_lines(web: Remote) -> None:
    with pytest.raises(CommandFailed, match=r"web-1: sh -c .* ended with 3\nno space left") as caught:
        web.done(["sh", "-c", "echo no space left >&2; exit 3"])
    assert caught.value.done.code == 3


def test_lines_come_as_they_are_printed(web: Remote) -> None:
    lines = web.lines(["sh", "-c", "echo first; exec sleep 600"])
    assert next(lines) == "first"  # though it has not ended
    lines.close()


def test_lines_of_a_command_that_fails_end_with_its_error(web: Remote) -> None:
    lines = web.lines(["sh", "-c", "echo first; echo why >&2; exit 2"])
    assert next(lines) == "first"
    with pytest.raises(CommandFailed, match="why"):
        next(lines)


def test_all_commands_share_one_connection_that_only_its_user_can_use(web: Remote, sshd: Sshd) -> None:
    before = sshd.sessions()
    with server_threads(lambda: web.done(["true"]), 5):
        pass
    assert sshd.sessions() == before
    assert before
    sockets = [Path(word.partition("=")[2]) for word in web.interactive() if word.startswith("ControlPath=")]
    folder = sockets[0].parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(str(folder)) + 1 + 40 + 17 < 104  # the path of a socket; ssh makes it longer while it begins


class server_threads:  # noqa: N801 -- read as a word
    """Each of them carries `work` out, at once."""

    def __init__(self, work: object, count: int) -> None:
        self._threads = [threading.Thread(target=work) for _ in range(count)]  # type: ignore[arg-type]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self._threads)


def test_a_file_arrives_whole_and_its_way_is_told(web: Remote, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "a target"
    source.write_bytes(os.urandom(1_000_000))
    sent: list[int] = []
    web.upload(source, str(target), sent.append)
    assert target.read_bytes() == source.read_bytes()
    assert sent == sorted(sent)
    assert sent[-1] == 1_000_000
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


def test_a_file_that_did_not_arrive_whole_does_not_get_its_name(web: Remote, sshd: Sshd, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(200_000_000)

    def cut(sent: int) -> None:
        if sent > 10_000_000:
            for pid in sshd.sessions():
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(LinkLost, match="broke"):
        web.upload(source, str(target), cut)
    until(lambda: not writers(tmp_path / "target.part"))
    assert not target.exists()


def writers(path: Path) -> list[Path]:
    """Who has the file open."""
    found = []
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if fd.readlink() == path:
                found.append(fd)
        except OSError:
            continue
    return found


def test_a_file_of_theirs_comes_back_byte_for_byte(web: Remote, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    (tmp_path / "theirs").write_bytes(data)
    with (tmp_path / "ours").open("wb") as ours:
        web.download(["cat", str(tmp_path / "theirs")], ours)
    assert (tmp_path / "ours").read_bytes() == data


def test_a_dead_link_is_noticed_within_seconds(web: Remote, sshd: Sshd) -> None:
    lines = web.lines(["sh", "-c", "echo up; exec sleep 600"])
    next(lines)
    sshd.freeze()
    with pytest.raises(LinkLost, match="web-1: the connection to web broke") as caught:
        next(lines)  # the time limit of the test is `ServerAliveInterval` times `ServerAliveCountMax`, and not ours
    assert "do it again" in caught.value.hint


def test_a_connection_that_broke_is_made_anew(web: Remote, sshd: Sshd) -> None:
    sshd.stop()
    with pytest.raises(Unreachable):
        web.done(["true"])
    sshd.start()
    assert web.done(["echo", "again"]) == "again\n"


def test_a_server_that_is_not_there_says_what_ssh_said(sshd: Sshd) -> None:
    sshd.stop()
    with pytest.raises(Unreachable, match=r"web-1: web cannot be reached: .*refused") as caught:
        Remote("web-1", "web").connect()
    assert caught.value.hint == f"Try it by hand: {sshd.program} web"


def test_a_key_that_is_not_let_in_says_so(sshd: Sshd) -> None:
    (sshd.folder / "authorized").write_text("")
    with pytest.raises(Unreachable, match=r"lets nobody in: .*Permission denied"):
        Remote("web-1", "web").connect()


def test_an_unknown_host_key_stops_and_is_shown(sshd: Sshd) -> None:
    (sshd.folder / "known").write_text("")
    with pytest.raises(HostKeyRefused, match="no host key is known for web") as caught:
        Remote("web-1", "web").connect()
    assert sshd.fingerprint in str(caught.value)
    assert f"accept it: {sshd.program} web" in caught.value.hint
    assert (sshd.folder / "known").read_text() == ""  # nothing was accepted


def test_a_changed_host_key_stops_and_is_shown(sshd: Sshd) -> None:
    sshd.stop()
    sshd.new_host_key()
    sshd.start()
    with pytest.raises(HostKeyRefused, match="the host key of web has changed") as caught:
        Remote("web-1", "web").connect()
    assert sshd.fingerprint in str(caught.value)
    assert f"{sshd.folder}/known, line 1" in caught.value.hint


def test_a_users_own_lenience_accepts_no_key_either(sshd: Sshd) -> None:
    (sshd.folder / "known").write_text("")
    config = sshd.folder / "ssh_config"
    config.write_text(config.read_text() + "  StrictHostKeyChecking no\n")
    with pytest.raises(HostKeyRefused):
        Remote("web-1", "web").connect()


def test_jump_hosts_and_aliases_are_as_the_user_has_them(sshd: Sshd) -> None:
    config = sshd.folder / "ssh_config"
    config.write_text(f"Host inner\n  ProxyJump web\n{config.read_text().replace('Host web', 'Host web inner')}")
    inner = Remote("web-1", "inner")
    inner.connect()
    assert inner.done(["echo", "there"]) == "there\n"
    inner.close()


@pytest.mark.parametrize("host", ["-oProxyCommand=x", "web\n-x", "web;id", "user@-x", "", "we b", "a`id`"])
def test_a_host_that_is_none_never_reaches_ssh(host: str) -> None:
    with pytest.raises(InvalidValue, match=r"servers\.web-1\.host"):
        Remote("web-1", host)


def test_nobody_is_asked_where_there_is_no_terminal(sshd: Sshd) -> None:
    words = Remote("web-1", "web").interactive(["true"])
    assert "BatchMode=yes" in words
    assert "BatchMode=no" in Remote("web-1", "web", asking=True).interactive(["true"])


def with_passphrase(sshd: Sshd) -> None:
    """As a key that has a PIN: nobody gets in who is not asked."""
    words = ["ssh-keygen", "-q", "-p", "-f", str(sshd.folder / "id"), "-P", "", "-N", "4711-pin"]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def test_at_a_terminal_ssh_asks_for_what_a_key_wants_one_server_after_the_other(sshd: Sshd, tmp_path: Path) -> None:
    """Which it does for a PIN or a touch as for a passphrase."""
    sshd.be_known()
    with_passphrase(sshd)
    with (sshd.folder / "ssh_config").open("a") as file:
        text = (sshd.folder / "ssh_config").read_text()
        known = f"  HostKeyAlias [127.0.0.1]:{sshd.port}\n"
        file.write(text.replace("Host web\n  HostName 127.0.0.1\n", f"Host api\n  HostName localhost\n{known}"))
    named = '[envs.production]\nservers = ["web", "api"]\n[servers.web]\nhost = "web"\n[servers.api]\nhost = "api"\n'
    shop = make_project(tmp_path / "shop", config=f'name = "shop"\n{named}')
    words = [*TAKO, "servers", "check", "--json"]
    asked = pexpect.spawn(words[0], words[1:], cwd=str(shop), timeout=60, env=environment(TAKO_SSH=sshd.program))
    for _ in range(2):
        asked.expect("Enter passphrase for key .*: ")
        asked.sendline("4711-pin")
    asked.expect(pexpect.EOF)
    told = json.loads(asked.before[asked.before.index(b"{") :])
    assert {row["server"]: row["python"] is not None for row in told["servers"]} == {"web": True, "api": True}
    asked.wait()


def test_without_a_terminal_a_key_that_would_be_asked_for_is_said_to_be(sshd: Sshd) -> None:
    sshd.be_known()
    with_passphrase(sshd)
    with pytest.raises(Unreachable, match="lets nobody in") as caught:
        Remote("web-1", "web").connect()
    assert "a PIN or a touch is asked for at a terminal only" in caught.value.hint


def test_a_key_in_an_agent_whose_use_is_not_allowed_is_said_to_be(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a touch: the agent asks, and here nobody answers; and then somebody does."""
    sshd.be_known()
    answers = sshd.folder / "askpass"
    answers.write_text("#!/bin/sh\nexit 1\n")
    answers.chmod(0o700)
    env = {**os.environ, "SSH_ASKPASS": str(answers), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"}
    socket = sshd.folder / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], env=env, stdout=subprocess.DEVNULL)
    try:
        until(socket.exists)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        subprocess.run(["ssh-add", "-q", "-c", str(sshd.folder / "id")], check=True, stderr=subprocess.DEVNULL)
        (sshd.folder / "id").rename(sshd.folder / "elsewhere")  # the agent has it, and its public half is there
        with pytest.raises(Unreachable, match=r"lets nobody in: .*signing failed") as caught:
            Remote("web-1", "web").connect()
        assert "ssh-add" in caught.value.hint
        answers.write_text("#!/bin/sh\nexit 0\n")
        remote = Remote("web-1", "web")
        remote.connect()
        remote.close()
    finally:
        agent.terminate()
        agent.wait()


def test_what_is_held_open_there_ends_with_the_process_that_holds_it(web: Remote, tmp_path: Path) -> None:
    code = f"""
        import os, sys, time
        sys.path[:0] = {sys.path!r}
        os.environ["TAKO_SSH"] = {os.environ["TAKO_SSH"]!r}
        from tako_cli.remote import Remote

        held = Remote("web-1", "web").held_open(["sh", "-c", "echo $$; cat > /dev/null; echo gone > {tmp_path}/gone"])
        print(held.stdout.readline().decode(), flush=True)
        time.sleep(600)
    """
    process = script(code)
    assert process.stdout is not None
    there = int(process.stdout.readline())
    assert is_alive(there)
    process.kill()
    until(lambda: (tmp_path / "gone").exists())
    until(lambda: not is_alive(there))
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


def test_a_shared_connection_holds_on_to_no_pipe_of_the_command_that_began_it(sshd: Sshd) -> None:
    """Or whoever reads what `tako` says to the end would wait for a minute."""
    code = f"""
        import os, sys
        sys.path[:0] = {sys.path!r}
        os.environ["TAKO_SSH"] = {os.environ["TAKO_SSH"]!r}
        from tako_cli.remote import Remote

        print(Remote("web-1", "web").done(["echo", "done"]), end="")
    """
    assert finished(script(code), 20) == "done\n"
    assert sshd.sessions()  # it is still there
    Remote("web-1", "web").close()
    until(lambda: not sshd.sessions())
