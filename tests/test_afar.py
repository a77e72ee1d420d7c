"""Commands about an app on a server, from the laptop: the same tables and the same JSON, through a real sshd."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from afar import Web, deployed
from cli import TAKO, done, environment
from conftest import until

from tako_cli.afar import explained
from tako_cli.remote import Done, Remote
from tako_runtime.config import load

# They are many commands, each a process of its own.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with deployed() as one:
        one.serve()
        yield one


@pytest.fixture(scope="module")
def waiting(web: Web) -> str:
    """A run that waits for a signal."""
    run = web.start("ask", {"order": 42})
    until(lambda: web.document("runs", "show", run)["run"]["reason"] == "waiting")
    return run


def ended(web: Web, run: str, status: str = "succeeded") -> None:
    until(lambda: web.document("runs", "show", run)["run"]["status"] == status)


#: What passes between two looks, and the store's address.
CHANGING = re.compile(r'"(lease_until|oldest_due_age|at|dead_since)": [^\n]*|\b\d+[smhd]\b( ago)?')


@pytest.mark.parametrize(
    "words",
    [
        ["status"], ["runs", "show", "RUN"], ["runs", "why", "RUN"], ["signals", "ls"], ["cron", "ls"],
        ["cron", "next", "yearly"], ["runs", "ls", "--status", "waiting"], ["workflows", "ls"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_command_about_a_server_says_what_it_says_there(web: Web, waiting: str, words: list[str]) -> None:
    named = [waiting if word == "RUN" else word for word in words]
    for told in (named, [*named, "--json"]):
        here, there = web.afar(*told), web.there(*told)
        assert (here.returncode, there.returncode) == (0, 0), here.stderr + there.stderr
        shown = [CHANGING.sub("", text).replace(f"{web.release}/", "") for text in (here.stdout, there.stdout)]
        if words[0] not in ("status", "workflows"):  # their paths are shown relative to where one is
            assert shown[0] == shown[1]
        else:
            assert [line.split()[:1] for line in shown[0].splitlines()] == [
                line.split()[:1] for line in shown[1].splitlines()
            ]


def test_a_run_is_started_signalled_and_ends_there(web: Web, waiting: str) -> None:
    answer = web.document("runs", "signal", "approval", "--payload", '{"approved": true}')
    assert answer["signal"]["woken"] == 1
    ended(web, waiting)
    assert web.document("runs", "show", waiting)["run"]["result"] == {"approved": True}
    assert done("runs", "ls", cwd=web.project) == "", "nothing of it is here"


def test_waiting_for_the_end_of_a_run_there_ends_with_it(web: Web) -> None:
    answer = web.document("runs", "start", "greet", "--payload", '"Ada"', "--wait")
    assert answer["run"]["result"] == "hello Ada"
    failed = web.document("runs", "start", "fail", "--payload", "{}", "--wait", code=1)
    assert failed["run"]["status"] == "dead"


def test_a_dead_run_is_retried_and_a_parked_one_cancelled_from_afar(web: Web) -> None:
    run = web.start("fail", {})
    ended(web, run, "dead")
    (web.release / "mended").touch()
    assert web.document("runs", "retry", run)["runs"][0]["id"] == run
    ended(web, run)
    (web.release / "mended").unlink()
    nap = web.start("nap", {})
    until(lambda: web.document("runs", "show", nap)["run"]["reason"] == "sleeping")
    assert web.document("runs", "cancel", nap, "--reason", "no")["runs"][0]["status"] == "cancelled"


def test_old_runs_are_counted_and_pruned_there(web: Web) -> None:
    run = web.start("greet", "Eve")
    ended(web, run)
    asked = web.document("runs", "prune", "--before", "0s", "--workflow", "greet", "--dry-run")
    assert asked["pruned"]["found"] >= 1
    pruned = web.document("runs", "prune", "--before", "0s", "--workflow", "greet", "--yes")
    assert pruned["pruned"]["runs"] == asked["pruned"]["found"]
    assert web.afar("runs", "show", run).returncode == 4


def test_a_schedule_is_fired_there(web: Web) -> None:
    run = web.document("cron", "fire", "yearly")["run"]
    ended(web, str(run["id"]))
    refused = web.afar("cron", "fire", "greet")
    assert refused.returncode == 4
    assert "tako runs start greet" in refused.stderr


def test_a_run_there_is_followed_to_its_end(web: Web) -> None:
    run = web.start("greet", "Bob")
    followed = web.afar("runs", "tail", run, "--json")
    assert followed.returncode == 0, followed.stderr
    events = [json.loads(line) for line in followed.stdout.splitlines()]
    assert events[-1]["event"] == "run.succeeded"
    assert {event["run"] for event in events if "run" in event} == {run}


def test_whoever_follows_all_runs_and_leaves_leaves_nobody_behind_there(web: Web) -> None:
    following = subprocess.Popen(
        [*TAKO, "runs", "tail", "--env", "production", "--json"], cwd=web.project,
        env=environment(TAKO_SSH=web.sshd.program), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert following.stdout is not None
    assert following.stdout.readline()
    assert operating(web)
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=20)
    assert following.returncode == 130, err
    until(lambda: not operating(web))


def operating(web: Web) -> list[str]:
    """The processes that answer somebody."""
    said = subprocess.run(["pgrep", "-af", "tako_runtime operate"], capture_output=True, text=True, check=False).stdout
    return [line for line in said.splitlines() if f"/proc/{line.split()[0]}" and web.release.name and is_of(web, line)]


def is_of(web: Web, line: str) -> bool:

    try:
        return Path(f"/proc/{line.split(maxsplit=1)[0]}/cwd").readlink() == web.release
    except OSError:
        return False


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["runs", "show", "ffffffff"], 4, "no run ffffffff"),
        (["runs", "start", "greeet"], 4, "Did you mean greet"),
        (["runs", "start", "greet", "--payload", "{"], 2, "the payload is not JSON"),
        (["runs", "ls", "--status", "odd"], 2, "no such status"),
        (["cron", "next", "nosuch"], 4, "no schedule 'nosuch'"),
        (["runs", "signal", "a\nb"], 2, "signal"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_the_server_refuses_is_the_same_error_with_the_same_code(
    web: Web, words: list[str], code: int, said: str
) -> None:
    here, there = web.afar(*words), web.there(*words)
    assert (here.returncode, there.returncode) == (code, code), here.stderr + there.stderr
    assert said in here.stderr
    first = here.stderr.splitlines()[0]
    assert first == there.stderr.splitlines()[0]
    told = web.document(*words, code=code)
    assert told["error"]["message"] in here.stderr.replace("\n  ", " ")


def test_a_link_that_breaks_while_a_run_is_followed_is_an_error_that_says_so(web: Web) -> None:
    following = subprocess.Popen(
        [*TAKO, "runs", "tail", "--env", "production", "--json"], cwd=web.project,
        env=environment(TAKO_SSH=web.sshd.program), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert following.stdout is not None
    assert following.stdout.readline()
    for pid in web.sshd.sessions():
        os.kill(pid, signal.SIGKILL)
    said, _ = following.communicate(timeout=60)
    assert following.returncode == 1
    assert "the connection to web broke" in said
    until(lambda: not operating(web))
    assert web.afar("runs", "ls").returncode == 0, "the next command connects anew"


def test_a_question_before_a_change_says_where_it_would_be(web: Web) -> None:
    ended(web, web.start("greet", "Zoe"))
    asked = web.afar("runs", "prune", "--before", "0s", "--workflow", "greet")
    assert asked.returncode == 2
    assert "of greet on web-1, and nobody is here to confirm it" in asked.stderr


def test_a_release_with_an_older_tako_is_told_from_other_failures(web: Web) -> None:
    words = [sys.executable, "-m", "tako_runtime", "of-tomorrow"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    done = Done(ended.returncode, ended.stdout, ended.stderr)
    error = explained(load(web.project / "tako.toml"), "production", Remote("web-1", "web"), done)
    assert "has an older tako" in str(error)
    assert error.hint == "Deploy with the tako of here: tako deploy --env production"


def test_of_servers_that_share_a_database_the_first_that_can_be_reached_answers(web: Web) -> None:
    config = web.project / "tako.toml"
    text = config.read_text()
    shared = text.replace('servers = ["web-1"]', 'servers = ["web-0", "web-1"]', 1)
    config.write_text(f'{shared}[servers.web-0]\nhost = "nowhere.invalid"\n[storage]\nurl = "postgres"\n')
    try:
        listed = web.afar("runs", "ls", "--json")
    finally:
        config.write_text(text)
    assert listed.returncode == 0, listed.stderr
    assert json.loads(listed.stdout)["runs"]
    assert "web-0: nowhere.invalid cannot be reached" in listed.stderr


def test_servers_that_share_nothing_are_listed_with_their_names_and_changed_by_name_alone(
    web: Web, waiting: str
) -> None:
    """Both names are of one machine here: so what it has is seen under both."""
    config = web.project / "tako.toml"
    text = config.read_text()
    several = text.replace('servers = ["web-1"]', 'servers = ["web-1", "web-0", "web-2"]', 1)
    config.write_text(f'{several}[servers.web-0]\nhost = "nowhere.invalid"\n[servers.web-2]\nhost = "web"\n')
    try:
        listed, shown = web.afar("runs", "ls", "--json"), web.document("runs", "show", waiting)["run"]
        refused, named = web.afar("runs", "signal", "nobody"), web.afar("runs", "ls", "--server", "web-2")
        table = web.afar("runs", "ls")
    finally:
        config.write_text(text)
    assert listed.returncode == 0, listed.stderr
    servers = {run["server"] for run in json.loads(listed.stdout)["runs"] if run["id"] == waiting}
    assert servers == {"web-1", "web-2"}
    assert "what only web-0 has is not looked at" in " ".join(listed.stderr.split())
    assert shown["server"] == "web-1"
    assert "ask (web-2)" in table.stdout
    assert refused.returncode == 1
    assert "--server web-1" in refused.stderr
    assert named.returncode == 0, named.stderr


def test_what_is_to_be_typed_next_names_the_environment_too(web: Web) -> None:
    assert "tako runs ls --env production" in web.afar("runs", "show", "ffffffff").stderr


def test_an_environment_without_servers_a_server_that_is_none_of_its_and_a_server_alone_are_refused(web: Web) -> None:
    unknown = web.tako("runs", "ls", "--env", "prodction")
    assert unknown.returncode == 3
    assert "Did you mean production?" in unknown.stderr
    other = web.afar("runs", "ls", "--server", "web-9")
    assert other.returncode == 3
    assert "It has web-1." in other.stderr
    alone = web.tako("runs", "ls", "--server", "web-1")
    assert alone.returncode == 2
    assert "--env" in alone.stderr


def test_development_is_here(web: Web) -> None:
    assert web.tako("runs", "ls", "--env", "development").returncode == 0
    assert web.tako("runs", "ls", "--env", "development", "--json").stdout == web.tako("runs", "ls", "--json").stdout


def test_an_app_that_is_not_deployed_there_says_how_to(web: Web) -> None:
    config = web.project / "tako.toml"
    config.write_text(config.read_text() + '[envs.staging]\nservers = ["web-1"]\n')
    missing = web.tako("status", "--env", "staging")
    assert missing.returncode == 4
    assert f"web-1: {web.app} is not deployed there" in missing.stderr
    assert "tako deploy --env staging" in missing.stderr


def test_a_release_without_its_runtime_says_so(web: Web) -> None:
    venv = web.release / ".venv"
    target = venv.readlink()
    venv.unlink()
    try:
        refused = web.afar("status")
    finally:
        venv.symlink_to(target)
    assert refused.returncode == 1
    assert "has no runtime any more" in refused.stderr


def test_where_no_supervisor_runs_status_says_how_to_start_one() -> None:
    with deployed() as idle:
        shown = idle.afar("status")
        assert shown.returncode == 0
        assert "no supervisor runs on web-1. Start it with: tako app start --env production" in shown.stderr.replace(
            "\n", " "
        )


def test_a_server_that_cannot_be_reached_is_an_error_and_status_shows_the_others() -> None:
    with deployed() as one:
        config = one.project / "tako.toml"
        text = config.read_text().replace('["web-1"]', '["web-0", "web-1"]')
        config.write_text(text + '[servers.web-0]\nhost = "nowhere.invalid"\n')
        asked = one.document("status", code=1)
        assert [row["server"] for row in asked["servers"]] == ["web-0", "web-1"]
        assert asked["servers"][0]["error"]["code"] == "unreachable"
        assert asked["servers"][1]["status"]["app"] == one.app
        shown = one.afar("status")
        assert "web-0: nowhere.invalid cannot be reached" in shown.stderr
        assert one.app in shown.stdout
        for words in (("runs", "ls"), ("cron", "ls"), ("runs", "prune", "--before", "1d", "--dry-run")):
            partly = one.afar(*words)
            assert partly.returncode == 0, partly.stderr
            assert "what only web-0 has is not looked at" in " ".join(partly.stderr.split())
        which = one.afar("runs", "signal", "go")
        assert which.returncode == 1
        assert "Say which: --server web-1" in which.stderr
        assert one.afar("runs", "ls", "--server", "web-1").returncode == 0
