"""`tako secrets`: the command, and how values get to what runs here."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pexpect
import pyrage
import pytest
from cli import TAKO, at_terminal, developing, document, done, environment, make_project, plain, start, tako
from conftest import until
from keyholders import CONFIG, FLOWS, KEY, someone, ssh_key
from serving import keep_secrets

from tako_cli.vault import Vault, reveal
from tako_runtime.store import Home

# They run processes of their own.
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def ada(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return someone(tmp_path, monkeypatch, "ada")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "shop", FLOWS, CONFIG)


@pytest.fixture
def vault(project: Path) -> Vault:
    return Vault(project, "production")


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_value_comes_from_stdin_one_line_without_its_end_and_several_as_they_are(project: Path) -> None:
    for given, kept in ((f"{KEY}\n", KEY), (f"{KEY}\r\n", KEY), (KEY, KEY), ("a\nb\n", "a\nb\n"), ("a b \n", "a b ")):
        done("secrets", "set", "STRIPE_KEY", cwd=project, stdin=given)
        assert reveal(project, "development") == {"STRIPE_KEY": kept}


def test_at_a_terminal_it_is_asked_for_and_not_shown(project: Path) -> None:
    typing = pexpect.spawn(
        TAKO[0], [*TAKO[1:], "secrets", "set", "STRIPE_KEY"], cwd=project, env=environment(), timeout=60
    )
    typing.expect("Value of STRIPE_KEY: ")
    typing.waitnoecho()
    typing.sendline(KEY)
    typing.expect(pexpect.EOF)
    typing.close()
    assert typing.exitstatus == 0
    assert b"Set STRIPE_KEY in development." in typing.before
    assert KEY.encode() not in typing.before
    assert reveal(project, "development") == {"STRIPE_KEY": KEY}


def test_a_key_of_several_lines_that_is_pasted_is_not_kept_by_its_first_one(project: Path) -> None:
    words = [
        "-c",
        f"{' '.join(TAKO)} secrets set TLS_KEY 2> said",
    ]  # where stderr is no terminal, it is not shown either
    typing = pexpect.spawn("sh", words, cwd=project, env=environment(), timeout=60)
    typing.waitnoecho()
    typing.sendline("-----BEGIN PRIVATE KEY-----")
    typing.expect(pexpect.EOF)
    typing.close()
    assert typing.exitstatus == 2
    assert b"BEGIN" not in typing.before
    assert "tako secrets set TLS_KEY < FILE" in (project / "said").read_text()
    assert reveal(project, "development") == {}


@pytest.mark.parametrize(
    "words", [["STRIPE_KEY", KEY], [f"STRIPE_KEY={KEY}"], ["STRIPE_KEY", KEY, "--env", "production"]]
)
def test_a_value_on_the_command_line_is_refused_not_kept_and_not_repeated(project: Path, words: list[str]) -> None:
    ended = tako("secrets", "set", *words, cwd=project, stdin="other")
    assert ended.returncode == 2
    assert "command line" in ended.stderr
    assert KEY not in ended.stderr + ended.stdout
    assert not (project / ".tako" / "secrets").exists()


@pytest.mark.parametrize("name", ["stripe_key", "1KEY", "STRIPE-KEY", "KEY\n", "ÄKEY", ""])
def test_a_name_that_could_not_be_handed_over_is_wrong_usage(project: Path, name: str) -> None:
    ended = tako("secrets", "set", name, cwd=project, stdin=KEY)
    assert ended.returncode == 2, ended.stderr
    assert KEY not in ended.stderr


def test_an_environment_that_the_project_does_not_have_gets_no_vault(project: Path) -> None:
    for words in (["set", "STRIPE_KEY"], ["ls"], ["rm", "STRIPE_KEY"], ["share", "age1x"]):
        ended = tako("secrets", *words, "--env", "prodution", cwd=project, stdin=KEY)
        assert ended.returncode in (2, 3)
        assert words[0] == "share" or "Did you mean production?" in ended.stderr
    assert not (project / ".tako").exists()


def test_the_list_has_names_and_what_is_required_and_ends_with_1_while_one_is_missing(project: Path) -> None:
    (project / "tako.toml").write_text(CONFIG + '[secrets]\nrequired = ["STRIPE_KEY", "DATABASE_URL"]\n')
    done("secrets", "set", "STRIPE_KEY", "--env", "production", cwd=project, stdin=KEY)
    done("secrets", "set", "OTHER_KEY", "--env", "production", cwd=project, stdin=KEY)
    answer = document("secrets", "ls", "--env", "production", cwd=project, code=1)
    rows = {row["name"]: (row["set"], row["required"]) for row in answer["secrets"]}
    assert rows == {"DATABASE_URL": (False, True), "OTHER_KEY": (True, False), "STRIPE_KEY": (True, True)}
    assert KEY not in json.dumps(answer)
    ended = tako("secrets", "ls", "--env", "production", cwd=project)
    assert ended.returncode == 1
    assert "not set, though [secrets] requires it: DATABASE_URL" in ended.stderr
    done("secrets", "set", "DATABASE_URL", "--env", "production", cwd=project, stdin=KEY)
    assert "required" in done("secrets", "ls", "--env", "production", cwd=project)


@pytest.mark.parametrize("columns", [60, 80])
def test_a_person_reads_the_list_at_any_width(project: Path, columns: int) -> None:
    done("secrets", "set", "STRIPE_KEY", cwd=project, stdin=KEY)
    code, shown = at_terminal("secrets", "ls", cwd=project, columns=columns, HOME=os.environ["HOME"])
    assert code == 0
    assert all(len(line) <= columns for line in plain(shown).splitlines())
    assert re.search(r"STRIPE_KEY +vault", plain(shown))


def test_no_value_is_in_the_environment_or_on_the_command_line_of_what_sets_it(project: Path) -> None:
    if not Path("/proc/self/environ").exists():
        pytest.skip("only Linux shows a process in /proc")
    process = subprocess.Popen(
        [*TAKO, "secrets", "set", "STRIPE_KEY"], cwd=project, env=environment(), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(KEY)
    process.stdin.flush()
    facts = Path(f"/proc/{process.pid}")
    until(lambda: b"tako_cli" in (facts / "cmdline").read_bytes())
    assert KEY.encode() not in (facts / "cmdline").read_bytes() + (facts / "environ").read_bytes()
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_what_runs_here_has_the_secrets_of_development_and_over_them_ones_own(project: Path) -> None:
    done("secrets", "set", "STRIPE_KEY", cwd=project, stdin=KEY)
    done("secrets", "set", "STRIPE_KEY", "--env", "production", cwd=project, stdin="production's")
    (project / "show.py").write_text(
        "from tako_runtime import secrets\nprint(len(secrets['STRIPE_KEY']), *sorted(secrets))\n"
    )
    assert done("run", "show.py", cwd=project) == f"{len(KEY)} STRIPE_KEY\n"
    run = start(project, "reads")
    done("dev", "--once", cwd=project)
    assert document("runs", "show", run, cwd=project)["run"]["result"] == len(KEY)
    keep_secrets(Home("shop", project / ".tako"), {"STRIPE_KEY": "own", "OTHER_KEY": "own"})
    assert done("run", "show.py", cwd=project) == "3 OTHER_KEY STRIPE_KEY\n"
    sources = {row["name"]: row["from"] for row in document("secrets", "ls", cwd=project)["secrets"]}
    assert sources == {"STRIPE_KEY": "secrets.json", "OTHER_KEY": "secrets.json"}


def test_where_tako_dev_runs_it_is_said_that_it_has_the_old_ones(project: Path) -> None:
    done("secrets", "set", "STRIPE_KEY", cwd=project, stdin=KEY)
    with developing(project) as dev:
        dev.wait_for("dev.ready")
        ended = tako("secrets", "set", "STRIPE_KEY", cwd=project, stdin=KEY)
        assert "start it again" in ended.stderr
        assert "start it again" not in tako("secrets", "set", "X", "--env", "production", cwd=project, stdin=KEY).stderr
        dev.send(signal.SIGINT)
        assert dev.ended() == 0
    assert "start it again" not in tako("secrets", "set", "STRIPE_KEY", cwd=project, stdin=KEY).stderr


def test_who_cannot_open_those_of_development_is_told_before_anything_runs(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done("secrets", "set", "STRIPE_KEY", cwd=project, stdin=KEY)
    someone(tmp_path, monkeypatch, "bob")
    for words in (["dev", "--once"], ["run", "true"]):
        ended = tako(*words, cwd=project)
        assert ended.returncode == 3
        assert "none of your keys opens the secrets of development" in ended.stderr
        assert "tako secrets share --env development KEY" in ended.stderr
    ended = tako("doctor", cwd=project)
    assert "none of your keys" in ended.stdout + ended.stderr


def test_the_scaffold_commits_the_encrypted_secrets_and_the_list_and_nothing_else_of_the_folder(tmp_path: Path) -> None:
    done("init", "shop", "--yes", cwd=tmp_path)
    shop = tmp_path / "shop"
    subprocess.run(["git", "init", "-q", "."], cwd=shop, check=True)
    ended = tako("secrets", "set", "STRIPE_KEY", cwd=shop, stdin=KEY)
    assert "git ignores" not in ended.stderr
    subprocess.run(["git", "add", "-A"], cwd=shop, check=True)
    listed = subprocess.run(["git", "ls-files", ".tako"], cwd=shop, check=True, capture_output=True, text=True).stdout
    assert listed.split() == [".tako/secrets/development.age", ".tako/secrets/development.keys"]


def test_where_git_ignores_them_the_lines_for_gitignore_are_shown(project: Path) -> None:
    subprocess.run(["git", "init", "-q", "."], cwd=project, check=True)
    (project / ".gitignore").write_text(".tako/\n")
    ended = tako("secrets", "set", "STRIPE_KEY", cwd=project, stdin=KEY)
    assert "git ignores .tako/secrets/development.age, .tako/secrets/development.keys" in ended.stderr
    (project / ".gitignore").write_text("\n".join(re.findall(r"^  (\S+)$", ended.stderr, re.MULTILINE)) + "\n")
    assert "git ignores" not in tako("secrets", "set", "STRIPE_KEY", cwd=project, stdin=KEY).stderr


def test_with_json_each_command_says_what_it_did_and_nothing_beside_it(project: Path) -> None:
    subprocess.run(["git", "init", "-q", "."], cwd=project, check=True)
    (project / ".gitignore").write_text(".tako/\n")
    told = {"name": "STRIPE_KEY", "env": "development"}
    assert document("secrets", "set", "STRIPE_KEY", cwd=project, stdin=KEY) == {"secret": {**told, "replaced": False}}
    assert document("secrets", "set", "STRIPE_KEY", cwd=project, stdin=KEY) == {"secret": {**told, "replaced": True}}
    other = str(pyrage.x25519.Identity.generate().to_public())
    shared = document("secrets", "share", other, "bob", cwd=project)
    assert shared == {"reader": {"key": other, "name": "bob", "env": "development", "new": True}}
    assert document("secrets", "rm", "STRIPE_KEY", cwd=project) == {"secret": told}
    answer = document("secrets", "rm", "STRIPE_KEY", cwd=project, code=4)
    assert "no secret 'STRIPE_KEY'" in answer["error"]["message"]


def test_a_key_is_shared_without_quotes_and_its_owner_is_named(project: Path, tmp_path: Path) -> None:
    bob = tmp_path / "bob"
    bob.mkdir()
    line = ssh_key(bob, comment="bob@desk")
    done("secrets", "set", "STRIPE_KEY", cwd=project, stdin=KEY)
    assert done("secrets", "share", *line.split(), cwd=project) == "bob@desk can now open the secrets of development.\n"
    assert "could already" in done("secrets", "share", str(bob / ".ssh" / "id_ed25519.pub"), cwd=project)
    readers = document("secrets", "ls", cwd=project)["readers"]
    assert readers[1] == {"key": " ".join(line.split()[:2]), "name": "bob@desk"}
