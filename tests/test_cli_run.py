"""`tako run`: a one-off command with the project's variables and secrets, which tako becomes."""

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli import TAKO, at_terminal, document, done, environment, make_project, run_of, tako
from serving import keep_secrets

from tako_runtime.store import Home

# They run processes of their own.
pytestmark = pytest.mark.slow

KEY = "sk_live_51Hx+/=vT9"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
LOOK = Path(__file__).with_name("scenarios_secrets") / "look.py"
CONFIG = 'name = "shop"\n[vars]\nONE = "file"\nTWO = "file"\nTHREE = "file"\n[vars.development]\nTWO = "dev"\n'

#: Prints what a process was given: no value, only digests.
TELL = """
import hashlib, json, os, sys
from tako_runtime import secrets
digests = {name: hashlib.sha256(secrets[name].encode()).hexdigest() for name in secrets}
print(json.dumps({"secrets": digests, "environ": dict(os.environ), "argv": sys.argv, "cwd": os.getcwd()}))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A shop with variables and one secret, and a folder in it."""
    project = make_project(tmp_path / "shop", config=CONFIG)
    keep_secrets(Home("shop", project / ".tako"), {"STRIPE_KEY": KEY})
    (project / "scripts").mkdir()
    return project


def script(project: Path, code: str) -> str:
    (project / "scripts" / "script.py").write_text(code)
    return "scripts/script.py"


def told(*words: str, cwd: Path, **env: str) -> dict[str, Any]:
    return dict(json.loads(done("run", *words, cwd=cwd, **env)))


# --- what it is given ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["script.py"], ["--", sys.executable, "-c", TELL]], ids=["script", "command"])
def test_it_has_the_variables_the_secrets_and_the_store_of_the_project_found_upwards(
    words: list[str], project: Path
) -> None:
    script(project, TELL)
    seen = told(*words, cwd=project / "scripts", THREE="shell")
    assert [seen["environ"][name] for name in ("ONE", "TWO", "THREE")] == ["file", "dev", "shell"]
    assert seen["environ"]["TAKO_APP_NAME"] == "shop"
    assert seen["environ"]["TAKO_DATA_DIR"] == str(project / ".tako")
    assert seen["environ"]["TAKO_ENV"] == "development"
    assert seen["secrets"] == {"STRIPE_KEY": DIGEST}
    assert seen["cwd"] == str(project / "scripts"), "where the person is, so that file names mean what they say"


def test_no_secret_is_in_its_environment_or_on_its_command_line(project: Path) -> None:
    code = f"import runpy\nfrom pathlib import Path\nfrom tako_runtime import secrets\nrunpy.run_path({str(LOOK)!r})"
    for words in (["--", sys.executable, str(LOOK)], ["--", sys.executable, "-c", code], [script(project, code)]):
        seen = told(*words, cwd=project)
        assert not [name for name, value in seen["environ"].items() if KEY in value or DIGEST in value]
    shown = done("run", "--", "sh", "-c", "ps -o args= -p $$", cwd=project)
    assert KEY not in shown


def test_what_a_script_starts_inherits_neither_the_pipe_nor_its_number(project: Path) -> None:
    code = f"""
import json, os, subprocess, sys
with open("seen.json", "w") as file:
    subprocess.run([sys.executable, {str(LOOK)!r}], stdout=file, close_fds=False, check=True)
print(json.dumps([os.fstat(fd).st_ino for fd in (0, 1, 2)]))
"""
    own = json.loads(done("run", script(project, code), cwd=project))
    seen = json.loads((project / "seen.json").read_text())
    assert set(seen["pipes"]) <= set(own)
    assert "TAKO_SECRETS_FD" not in seen["environ"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the secrets are in a pipe, which one process can read")
def test_a_command_hands_the_secrets_on_through_a_shell_to_each_process_that_asks(project: Path) -> None:
    (project / "tell.py").write_text(TELL)
    python = f"{sys.executable} tell.py"
    shown = done("run", "--", "sh", "-c", f"true; {python}; {python}", cwd=project)
    assert [json.loads(line)["secrets"] for line in shown.splitlines()] == [{"STRIPE_KEY": DIGEST}] * 2


def test_a_process_that_has_another_pipe_under_that_number_does_not_touch_it(project: Path) -> None:
    """As one that a server or a test runner has started, which closes what it does not know."""
    code = """
import os, subprocess, sys
fd = int(os.environ["TAKO_SECRETS_FD"].partition(":")[0])
os.close(fd)
reading, writing = os.pipe()
os.write(writing, b"mine")
os.dup2(reading, fd)
asks = "from tako_runtime import secrets; print(secrets, 'STRIPE_KEY' in secrets)"
print(subprocess.check_output([sys.executable, "-c", asks], pass_fds=[fd], text=True).strip(), os.read(fd, 10))
"""
    assert done("run", "--", sys.executable, "-c", code, cwd=project) == "<secrets: none> False b'mine'\n"


def test_threads_that_ask_at_once_all_get_them(project: Path) -> None:
    code = """
import threading
from tako_runtime import secrets
ready, seen = threading.Barrier(8), []
def ask():
    ready.wait()
    seen.append(len(secrets["STRIPE_KEY"]))
threads = [threading.Thread(target=ask) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(seen)
"""
    assert done("run", "--", sys.executable, "-c", code, cwd=project) == f"{[len(KEY)] * 8}\n"


def test_a_script_imports_the_projects_workflows_and_starts_a_run_and_no_secret_reaches_the_store(
    project: Path,
) -> None:
    code = """
from tako_runtime import secrets
from workflows.flows import greet
print(greet.enqueue_sync("by " + secrets["STRIPE_KEY"]))
"""
    run = done("run", script(project, code), cwd=project).strip()
    assert run_of(project, run)["payload"] == "by [secret STRIPE_KEY]"
    assert KEY.encode() not in (project / ".tako/apps/shop/runs.db").read_bytes()
    done("dev", "--once", cwd=project)
    assert run_of(project, run)["status"] == "succeeded"


def test_a_secret_that_the_file_requires_and_nobody_has_set_is_named(project: Path) -> None:
    (project / "tako.toml").write_text('name = "shop"\n[secrets]\nrequired = ["STRIPE_KEY", "DATABASE_URL"]\n')
    ended = tako("run", "--", "true", cwd=project)
    assert ended.returncode == 0
    assert ended.stderr == "not set, though [secrets] requires it: DATABASE_URL\n"


@pytest.mark.skipif(sys.platform != "linux", reason="a pipe takes less")
def test_a_mebibyte_of_secrets_arrives(project: Path) -> None:
    keep_secrets(Home("shop", project / ".tako"), {"BIG": "x" * (1 << 20)})
    asks = "from tako_runtime import secrets; print(len(secrets['BIG']))"
    assert done("run", "--", sys.executable, "-c", asks, cwd=project) == f"{1 << 20}\n"


# --- it is the command -----------------------------------------------------------------------------------------------


def test_its_exit_code_and_its_words_are_the_commands_own(project: Path) -> None:
    words = ["a b", "$HOME", "*", "--json", "-h", "--", "x"]
    code = "import sys; print(sys.argv[1:]); sys.exit(7)"
    for start in (["--", sys.executable, "-c", code], [script(project, code)]):
        ended = tako("run", *start, *words, cwd=project)
        assert (ended.returncode, ended.stdout, ended.stderr) == (7, f"{words}\n", "")


def test_input_goes_through_and_a_closed_pipe_ends_it_as_it_would_any_program(project: Path) -> None:
    assert done("run", "--", "cat", cwd=project, stdin="given\n") == "given\n"
    ended = subprocess.run(
        ["bash", "-c", f"{' '.join(TAKO)} run -- yes | head -1; exit ${{PIPESTATUS[0]}}"], cwd=project,
        env=environment(), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signal.SIGPIPE, "y\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("kind", ["command", "script"])
def test_a_signal_reaches_the_command_itself(kind: str, number: signal.Signals, project: Path) -> None:
    code = """
import os, signal, sys
def told(number, frame):
    print("told", number, flush=True)
    sys.exit(9)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, told)
print(os.getpid(), flush=True)
signal.pause()
"""
    words = [script(project, code)] if kind == "script" else ["--", sys.executable, "-c", code]
    process = subprocess.Popen(
        [*TAKO, "run", *words], cwd=project, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid, "no process is between"
        process.send_signal(number)
        assert process.stdout.read() == f"told {int(number)}\n"
        assert process.wait(60) == 9
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_command_without_a_handler_dies_of_the_signal_and_its_shell_sees_that(project: Path) -> None:
    assert tako("run", "--", "sh", "-c", "kill -TERM $$", cwd=project).returncode == -signal.SIGTERM


def test_ctrl_c_at_the_terminal_and_the_terminal_itself_are_the_commands(project: Path) -> None:
    code = "import os, sys\nprint(os.isatty(0), os.isatty(1), flush=True)\nos.kill(os.getpid(), 2)\n"
    ended, shown = at_terminal("run", script(project, code), cwd=project)
    assert ended == -signal.SIGINT
    assert shown.startswith("True True\n")
    assert shown.endswith("KeyboardInterrupt\n")


def test_a_traceback_begins_in_the_script(project: Path) -> None:
    ended = tako("run", script(project, "def go():\n    raise KeyError('x')\ngo()\n"), cwd=project)
    assert ended.returncode == 1
    first, second, *_ = ended.stderr.splitlines()
    assert first == "Traceback (most recent call last):"
    assert second == '  File "scripts/script.py", line 3, in <module>'
    assert "runpy" not in ended.stderr
    ended = tako("run", script(project, "a = (\n"), cwd=project)
    assert ended.stderr.splitlines()[0] == '  File "scripts/script.py", line 1'


def test_what_a_script_has_left_to_do_at_its_end_is_done(project: Path) -> None:
    code = """
import atexit, threading
atexit.register(print, "at exit")
threading.Thread(target=lambda: (threading.main_thread().join(), print("a thread"))).start()
"""
    assert done("run", script(project, code), cwd=project) == "a thread\nat exit\n"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nope.py"], 4, "no file nope.py"),
        (["--", "no-such-program"], 4, "no program no-such-program"),
        (["--", "./tako.toml"], 1, "Permission denied"),
    ],
    ids=["script", "program", "not-executable"],
)
def test_what_cannot_be_run_is_an_error_of_takos_own(words: list[str], code: int, says: str, project: Path) -> None:
    assert says in document("run", "--json", *words, cwd=project, code=code)["error"]["message"]


def test_outside_a_project_nothing_is_run(tmp_path: Path) -> None:
    refused = tako("run", "--", "touch", "started", cwd=tmp_path)
    assert refused.returncode == 3
    assert "no tako.toml" in refused.stderr
    assert not (tmp_path / "started").exists()


def test_a_secrets_file_that_others_may_read_stops_it_before_anything_is_started(project: Path) -> None:
    (project / ".tako/apps/shop/secrets.json").chmod(0o644)
    refused = tako("run", "--", "touch", "started", cwd=project)
    assert refused.returncode == 3
    assert "has mode 0644" in refused.stderr
    assert not (project / "started").exists()
