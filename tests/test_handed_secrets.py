"""Secrets on their way: from the server's file to its workers and to the manifest, and nowhere else."""

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from cli import done, tako
from conftest import until
from serving import Serving, keep_secrets, project, serving
from workers import now, shown

from tako_runtime import errors
from tako_runtime.errors import ConfigError
from tako_runtime.secrets import VARIABLE, stored
from tako_runtime.store import Home, base
from tako_runtime.store.commit import StoreThread
from tako_runtime.workflow import new_run

# They run processes of their own.
pytestmark = pytest.mark.slow

KEY = "sk_live_51Hx+/=vT9"
SPELLED = [KEY, quote(KEY, safe=""), base64.b64encode(KEY.encode()).decode(), json.dumps(KEY)[1:-1]]
LOOK = Path(__file__).with_name("scenarios_secrets") / "look.py"

proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="only Linux shows a process in /proc")


def start(opened: StoreThread, workflow: str, payload: str = "null", group: str = "default") -> str:
    run = new_run(workflow, group, payload, now=now(), due=now(), retries=0, backoff_base=1_000, backoff_max=1_000)
    [run_id] = opened.do_sync(base.Enqueue(runs=[run], now=now()))
    return run_id


def ended(opened: StoreThread, run_id: str) -> dict[str, Any]:
    until(lambda: shown(opened, run_id)["finished_at"], 30)
    return shown(opened, run_id)


def digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


READS = """
    import hashlib
    from tako_runtime import secrets, workflow

    AT_IMPORT = hashlib.sha256(secrets["STRIPE_KEY"].encode()).hexdigest()

    @workflow("reads")
    async def reads(step):
        now = hashlib.sha256(secrets["STRIPE_KEY"].encode()).hexdigest()
        return {"import": AT_IMPORT, "now": now, "names": list(secrets)}
"""


FATAL = """\
import os
from tako_runtime import secrets
os.write(2, f"fatal: {secrets['STRIPE_KEY']}".encode())
os._exit(9)
"""


# --- they arrive -----------------------------------------------------------------------------------------------------


def test_workers_and_the_manifest_have_the_secrets_when_modules_are_imported(
    opened: StoreThread, home: Home, tmp_path: Path
) -> None:
    root = project(tmp_path / "project", READS)
    keep_secrets(home, {"STRIPE_KEY": KEY, "OTHER_KEY": "another-one"})
    run = start(opened, "reads")
    with serving(home, root) as server:
        expected = {"import": digest(KEY), "now": digest(KEY), "names": ["STRIPE_KEY", "OTHER_KEY"]}
        assert ended(opened, run)["result"] == expected
        assert not server.saw("file.broken"), "the manifest's process was given them too"


def test_without_the_file_there_are_none_and_a_missing_one_is_named(
    opened: StoreThread, home: Home, tmp_path: Path
) -> None:
    flows = """
        from tako_runtime import SecretMissing, secrets, workflow

        @workflow("reads")
        async def reads(step):
            try:
                return secrets["STRIPE_KEY"]
            except SecretMissing as missing:
                return [str(missing), len(secrets)]
    """
    root = project(tmp_path / "project", flows, '[secrets]\nrequired = ["STRIPE_KEY", "DATABASE_URL"]')
    run = start(opened, "reads")
    with serving(home, root) as server:
        assert ended(opened, run)["result"] == [
            "the secret STRIPE_KEY is not set", 0
        ]  # fmt: skip
        missing = server.wait_for("secret.missing")
        assert missing["level"] == "warning"
        assert missing["names"] == "STRIPE_KEY, DATABASE_URL"
    assert issubclass(errors.SecretMissing, KeyError)


def test_what_is_there_is_not_missed_and_one_that_is_too_short_to_be_masked_is_named(
    opened: StoreThread, home: Home, tmp_path: Path
) -> None:
    root = project(tmp_path / "project", READS, '[secrets]\nrequired = ["STRIPE_KEY"]')
    keep_secrets(home, {"STRIPE_KEY": KEY, "PIN": "1234", "EMPTY": ""})
    with serving(home, root) as server:
        assert server.wait_for("secret.short")["names"] == "PIN"
        assert not server.saw("secret.missing")


def test_a_changed_file_is_read_at_sighup_and_workers_that_start_then_have_it_and_both_values_are_masked(
    opened: StoreThread, home: Home, tmp_path: Path
) -> None:
    flows = """
        from tako_runtime import secrets, workflow

        @workflow("reads")
        async def reads(payload: str, step):
            print(secrets["STRIPE_KEY"], payload)
            return [len(secrets["STRIPE_KEY"]), payload]
    """
    root = project(tmp_path / "project", flows, '[workflows]\nidle_timeout = "0s"')
    path = keep_secrets(home, {"STRIPE_KEY": KEY})
    with serving(home, root) as server:
        assert ended(opened, start(opened, "reads", '"one"'))["result"] == [len(KEY), "one"]
        server.wait_for("worker.stopped")
        keep_secrets(home, {"STRIPE_KEY": "rotated-and-longer-than-before"})
        server.process.send_signal(signal.SIGHUP)
        until(lambda: ended(opened, start(opened, "reads", '"two"'))["result"] == [30, "two"])
        path.chmod(0o644)
        server.process.send_signal(signal.SIGHUP)
        unread = server.wait_for("secret.unread")
        assert "has mode 0644" in unread["error"]
        assert ended(opened, start(opened, "reads", '"three"'))["result"] == [30, "three"], "what was known goes on"
        assert server.printed("three")["message"] == "[secret STRIPE_KEY] three"
    said = server.log.read_text()
    assert KEY not in said
    assert "rotated" not in said


def test_tako_dev_and_the_commands_read_the_projects_own_file(tmp_path: Path) -> None:
    root = project(tmp_path / "project", READS)
    home = Home("shop", root / ".tako")
    keep_secrets(home, {"STRIPE_KEY": KEY})
    assert "reads" in done("workflows", "ls", cwd=root)
    run = json.loads(done("runs", "start", "reads", "--json", cwd=root))["run"]["id"]
    said = done("dev", "--once", "--json", cwd=root)
    assert json.loads(done("runs", "show", run, "--json", cwd=root))["run"]["result"]["now"] == digest(KEY)
    assert KEY not in said
    (home.app_dir / "secrets.json").chmod(0o604)
    refused = tako("dev", "--once", cwd=root)
    assert refused.returncode == 3
    assert "has mode 0604" in refused.stderr
    assert KEY not in refused.stderr


def test_what_ends_the_reading_of_the_workflows_is_masked_for_a_command_too(tmp_path: Path) -> None:
    root = project(tmp_path / "project", FATAL)
    keep_secrets(Home("shop", root / ".tako"), {"STRIPE_KEY": KEY})
    failed = tako("workflows", "ls", cwd=root)
    assert failed.returncode == 1
    assert "fatal: [secret STRIPE_KEY]" in failed.stderr
    assert KEY not in failed.stdout + failed.stderr


# --- and nowhere else ------------------------------------------------------------------------------------------------


@proc
def test_the_pipe_on_descriptor_3_is_read_and_closed_before_user_code_and_no_child_of_a_step_has_it(
    opened: StoreThread, home: Home, tmp_path: Path
) -> None:
    flows = f"""
        import json, os, stat, subprocess, sys
        from pathlib import Path
        from tako_runtime import secrets, workflow

        def pipes():
            found = {{}}
            for entry in list(Path("/proc/self/fd").iterdir()):
                try:
                    if stat.S_ISFIFO(os.fstat(int(entry.name)).st_mode):
                        found[int(entry.name)] = os.fstat(int(entry.name)).st_ino
                except OSError:
                    pass
            return found

        AT_IMPORT = pipes(), dict(os.environ)

        @workflow("looks")
        async def looks(step):
            child = subprocess.check_output([sys.executable, {str(LOOK)!r}], close_fds=False)
            return {{"import": AT_IMPORT, "child": json.loads(child), "pid": os.getpid(), "out": os.fstat(1).st_ino}}
    """
    root = project(tmp_path / "project", flows)
    keep_secrets(home, {"STRIPE_KEY": KEY, "BIG": "x" * (1 << 20)})
    run = start(opened, "looks")
    with serving(home, root):
        seen = ended(opened, run)["result"]
        of = Path(f"/proc/{seen['pid']}")
        environ, words = (of / "environ").read_bytes(), (of / "cmdline").read_bytes()
    assert f"{VARIABLE}=3".encode() in environ.split(b"\0")
    at_import, variables = seen["import"]
    for inode in set(at_import.values()) - {seen["out"]}:  # one may be left: the lifeline, which has no end to read
        assert list(at_import.values()).count(inode) == 1
    assert len(set(at_import.values()) - {seen["out"]}) <= 1
    assert VARIABLE not in variables
    assert VARIABLE not in seen["child"]["environ"]
    assert set(seen["child"]["pipes"]) & set(at_import.values()) <= {seen["out"]}
    for place in (environ, words, json.dumps(seen).encode()):
        assert not any(spelled.encode() in place for spelled in SPELLED)


LEAKS = """
    import base64, logging, subprocess, sys, threading
    from urllib.parse import quote
    from tako_runtime import secrets, signal, workflow

    KEY = secrets["STRIPE_KEY"]
    WAYS = [KEY, quote(KEY, safe=""), base64.b64encode(KEY.encode()).decode(), repr({"key": KEY})]

    class Refused(Exception):
        def __init__(self, key):
            super().__init__(f"the key {key} is refused")
            self.key = key

    @workflow("takes")
    async def takes(payload: dict, step):
        return payload

    @workflow("leaks")
    async def leaks(step):
        for way in WAYS:
            print("printed", way)
            print("printed to stderr", way, file=sys.stderr)
            logging.getLogger("shop").warning("logged %s", way)
            step.log.info("of the step %s", way)
        thread = threading.Thread(target=lambda: 1 / len(secrets["STRIPE_KEY"] * 0), name=KEY)
        thread.start()
        thread.join()
        subprocess.run(["echo", "from a program", *WAYS], stdout=sys.stdout)
        got = await step.run("step-result", lambda: {"ways": WAYS, KEY: 1})
        try:
            await step.run("step-failure", refuse)
        except Refused as error:
            logging.exception("caught")
        await takes.enqueue({"key": KEY, "ways": WAYS})
        await signal("news", {"ways": WAYS})
        return [got, WAYS]

    def refuse():
        raise Refused(KEY)

    @workflow("waits")
    async def waits(step):
        return await step.wait_for("news")

    @workflow("raises", retries=0)
    async def raises(step):
        raise Refused(KEY)

    @workflow("bails")
    async def bails(step):
        step.bail(f"no use with {KEY}")

    @workflow("fails")
    async def fails(step):
        step.fail(f"no use with {WAYS[2]}")
"""


@pytest.fixture
def leaking(opened: StoreThread, home: Home, tmp_path: Path) -> Iterator[tuple[Serving, dict[str, dict[str, Any]]]]:
    """A server whose workflows tell their secret wherever they can, and what became of their runs."""
    root = project(tmp_path / "project", LEAKS)
    keep_secrets(home, {"STRIPE_KEY": KEY})
    names = ("waits", "leaks", "raises", "bails", "fails")
    with serving(home, root) as server:
        ids = {name: start(opened, name) for name in names}
        runs = {name: ended(opened, run) for name, run in ids.items()}
        [taken] = until(lambda: [one for one in opened.do_sync(base.ListRuns(workflow="takes")) if one.finished_at])
        runs["takes"] = shown(opened, taken.id)
        yield server, runs


def test_a_value_is_in_no_byte_of_the_store_and_in_no_line_of_the_log(
    leaking: tuple[Serving, dict[str, dict[str, Any]]], home: Home
) -> None:
    server, _ = leaking
    server.printed("from a program")
    assert server.stop() == 0
    files = [file for file in home.data_dir.rglob("*") if file.is_file() and file.name != "secrets.json"]
    assert {"runs.db", "serve.log"} <= {file.name for file in files}
    for file in files:
        for spelled in SPELLED:
            assert spelled.encode() not in file.read_bytes(), f"{spelled} in {file}"


def test_what_is_stored_is_as_it_was_but_for_the_mask(leaking: tuple[Serving, dict[str, dict[str, Any]]]) -> None:
    _, runs = leaking
    mask = "[secret STRIPE_KEY]"
    ways = [mask, mask, mask, "{'key': '" + mask + "'}"]
    got = {"ways": ways, mask: 1}
    assert runs["leaks"]["status"] == "succeeded"
    assert runs["leaks"]["result"] == [got, ways]
    result, failure = runs["leaks"]["steps"]
    assert result["result"] == got
    assert failure["error"]["message"] == f"the key {mask} is refused"
    assert "raise Refused(KEY)" in failure["error"]["traceback"]
    assert f"the key {mask} is refused" in failure["error"]["traceback"]
    assert runs["takes"]["payload"] == runs["takes"]["result"] == {"key": mask, "ways": ways}
    assert runs["waits"]["result"] == {"ways": ways}
    assert runs["raises"]["error"]["message"] == f"the key {mask} is refused"
    assert runs["raises"]["reason"].startswith(f"Refused: the key {mask} is refused")
    assert runs["raises"]["attempts"][0]["error"]["message"] == f"the key {mask} is refused"
    assert runs["bails"]["reason"] == f"no use with {mask}"
    assert runs["fails"]["reason"] == f"Failed: no use with {mask}"


def test_each_place_is_warned_of_once_and_named(leaking: tuple[Serving, dict[str, dict[str, Any]]]) -> None:
    server, runs = leaking
    server.printed("from a program")
    places = [event["place"] for event in server.saw("secret.masked")]
    assert len(places) == len(set(places))
    assert {
        "step 'step-result' in 'leaks'",
        "the error of step 'step-failure' in 'leaks'",
        "the payload of 'takes' in 'leaks'",
        "the payload of signal 'news' in 'leaks'",
        "the result of 'leaks'",
        "an error in 'raises'",
        "an error in 'fails'",
        "the reason of a bail in 'bails'",
        "a log line in 'leaks'",
        "what a worker says",
    } <= set(places)
    warned = server.saw("secret.masked", lambda event: event["place"] == "step 'step-result' in 'leaks'")[0]
    assert (warned["level"], warned["name"], warned["run"]) == ("warning", "STRIPE_KEY", runs["leaks"]["id"])
    assert warned["message"] == (
        "the value of secret STRIPE_KEY turned up in step 'step-result' in 'leaks'; it is masked there"
    )


def test_what_a_broken_module_says_is_masked_in_the_log_of_the_server_and_of_its_workers(
    opened: StoreThread, home: Home, tmp_path: Path
) -> None:
    root = project(tmp_path / "project", READS)
    (root / "workflows" / "broken.py").write_text(
        'from tako_runtime import secrets\nraise ValueError("no use: " + secrets["STRIPE_KEY"])\n'
    )
    keep_secrets(home, {"STRIPE_KEY": KEY})
    run = start(opened, "reads")
    with serving(home, root) as server:
        ended(opened, run)
        assert len(until(lambda: server.saw("file.broken"))) >= 1
        assert all("no use: [secret STRIPE_KEY]" in event["error"] for event in server.saw("file.broken"))
        (root / "workflows" / "broken.py").write_text(FATAL)
        server.process.send_signal(signal.SIGHUP)
        assert (
            "fatal: [secret STRIPE_KEY]"
            in server.wait_for("file.broken", lambda event: "exit code 9" in event["error"])["error"]
        )
    assert KEY not in server.log.read_text()


# --- nothing blocks --------------------------------------------------------------------------------------------------


def test_a_mebibyte_reaches_the_worker_and_one_that_never_reads_it_holds_nobody_up(
    opened: StoreThread, home: Home, tmp_path: Path
) -> None:
    flows = """
        import hashlib
        from tako_runtime import secrets, workflow

        @workflow("in-stuck", group="stuck")
        async def in_stuck(step): ...

        @workflow("reads")
        async def reads(step):
            return hashlib.sha256(secrets["BIG"].encode()).hexdigest()
    """
    root = project(tmp_path / "project", flows, '[workflows]\ngrace = "500ms"\nidle_timeout = "0s"')
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "sitecustomize.py").write_text(
        "import signal, sys\nif 'stuck' in sys.orig_argv:\n    signal.signal(15, signal.SIG_IGN)\n    signal.pause()\n"
    )
    big = "€" + "x" * (1 << 20)
    keep_secrets(home, {"BIG": big})
    start(opened, "in-stuck", group="stuck")
    with serving(home, root, env={"PYTHONPATH": str(tmp_path / "early")}) as server:
        server.wait_for("worker.spawned", lambda event: event["group"] == "stuck")
        for _ in range(2):
            assert ended(opened, start(opened, "reads"))["result"] == digest(big)
            until(lambda: len(server.saw("worker.stopped")) == len(server.saw("worker.started")))
        assert server.stop() == 0


def worker_with(envelope: bytes, root: Path, home: Home) -> subprocess.CompletedProcess[str]:
    reading, writing = os.pipe()
    os.write(writing, envelope)
    os.close(writing)
    env = {**os.environ, **home.environment(), VARIABLE: str(reading)}
    try:
        return subprocess.run(
            [sys.executable, "-m", "tako_runtime", "worker", "--idle-timeout", "0s"], cwd=root, env=env,
            pass_fds=[reading], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(reading)


def test_a_worker_with_a_malformed_envelope_says_so_imports_nothing_and_shows_nothing_of_it(
    home: Home, tmp_path: Path
) -> None:
    root = project(tmp_path / "project", "open('imported', 'w')\n")
    ended_ = worker_with(b'{"secrets": {"KEY": "hunter2-hunter2"}', root, home)
    assert ended_.returncode == 1
    assert "not one whole" in ended_.stderr
    assert "hunter2" not in ended_.stdout + ended_.stderr
    assert not (root / "imported").exists()
    assert worker_with(b'{"secrets": {"KEY": "hunter2-hunter2"}}', root, home).returncode == 0
    assert (root / "imported").exists()


# --- where the server has them from ----------------------------------------------------------------------------------


def test_a_file_of_secrets_is_read(home: Home) -> None:
    assert stored(home.app_dir) == {}
    path = keep_secrets(home, {"STRIPE_KEY": KEY})
    assert stored(home.app_dir) == {"STRIPE_KEY": KEY}
    path.chmod(0o400)
    assert stored(home.app_dir) == {"STRIPE_KEY": KEY}


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o700, 0o4600])
def test_a_file_that_others_could_read_or_write_is_refused(home: Home, mode: int) -> None:
    keep_secrets(home, {"STRIPE_KEY": KEY}).chmod(mode)
    with pytest.raises(ConfigError, match=f"has mode {mode:04o}") as caught:
        stored(home.app_dir)
    assert "0600" in caught.value.hint


@pytest.mark.parametrize(
    "content",
    ["", "hunter2", '{"secrets": {"key": "hunter2"}}', '{"secrets": {"KEY": 12}}', '{"KEY": "hunter2"}', "\x00\xff"],
)
def test_a_file_that_is_no_envelope_is_refused_and_not_shown(home: Home, content: str) -> None:
    keep_secrets(home, {}).write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="not one whole") as caught:
        stored(home.app_dir)
    assert "hunter2" not in f"{caught.value!r} {caught.value.hint}"
    assert caught.value.__context__ is None


def test_what_is_no_regular_file_is_refused_at_once(home: Home) -> None:
    path = keep_secrets(home, {})
    path.rename(path.with_name("elsewhere.json"))
    path.symlink_to("elsewhere.json")
    with pytest.raises(ConfigError, match="symbolic link"):
        stored(home.app_dir)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        stored(home.app_dir)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="not a regular file"):
        stored(home.app_dir)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_elses_is_refused(home: Home) -> None:
    os.chown(keep_secrets(home, {"STRIPE_KEY": KEY}), 12345, -1)
    with pytest.raises(ConfigError, match=r"another user \(uid 12345\)"):
        stored(home.app_dir)


def test_a_server_with_a_bad_file_does_not_start_and_says_why(home: Home, tmp_path: Path) -> None:
    root = project(tmp_path / "project", READS)
    keep_secrets(home, {"STRIPE_KEY": KEY}).chmod(0o666)
    ended_ = subprocess.run(
        [sys.executable, "-m", "tako_runtime", "serve"], cwd=root, env={**os.environ, **home.environment()},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended_.returncode == 1
    assert "has mode 0666" in ended_.stderr
    assert KEY not in ended_.stderr + ended_.stdout
