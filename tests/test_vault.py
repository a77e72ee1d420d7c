"""`tako secrets`: values at rest, encrypted to a team's keys, and how they get to what runs here."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pexpect
import pyrage
import pytest
from cli import TAKO, at_terminal, developing, document, done, environment, make_project, plain, start, tako
from conftest import until
from serving import keep_secrets

from tako_cli import keys
from tako_cli.vault import Vault, reveal
from tako_runtime.errors import ConfigError, InvalidValue, NotFound, Refused
from tako_runtime.store import Home

# They run processes of their own.
pytestmark = pytest.mark.slow

KEY = "sk_live_51Hx+/=vT9"
PASSPHRASE = "correct horse"  # noqa: S105

CONFIG = 'name = "shop"\n[envs.production]\nservers = ["web-1"]\n[servers.web-1]\nhost = "web-1"\n'

FLOWS = """
    from tako_runtime import secrets, workflow

    @workflow("reads")
    async def reads(payload: None, step) -> int:
        return len(secrets["STRIPE_KEY"])
"""


def someone(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """Be a user with an empty home of this name from now on."""
    home = folder / name
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return home


def ssh_key(home: Path, name: str = "id_ed25519", passphrase: str = "", comment: str = "ada@laptop") -> str:
    """Make an SSH key in a home; its public half."""
    folder = home / ".ssh"
    folder.mkdir(mode=0o700, exist_ok=True)
    words = [
        "ssh-keygen",
        "-q",
        "-t",
        name.removeprefix("id_"),
        "-N",
        passphrase,
        "-C",
        comment,
        "-f",
        str(folder / name),
    ]
    subprocess.run(words, check=True, timeout=60)
    return (folder / f"{name}.pub").read_text().strip()


@pytest.fixture(autouse=True)
def ada(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return someone(tmp_path, monkeypatch, "ada")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "shop", FLOWS, CONFIG)


@pytest.fixture
def vault(project: Path) -> Vault:
    return Vault(project, "production")


# --- who can read ----------------------------------------------------------------------------------------------------


def test_what_is_set_is_read_again_and_no_file_shows_it(vault: Vault) -> None:
    assert vault.keep("STRIPE_KEY", KEY) is False
    assert vault.keep("TLS_KEY", "two\nlines\n") is False
    assert vault.keep("STRIPE_KEY", KEY + "2") is True
    assert reveal(vault.root, "production") == {"STRIPE_KEY": KEY + "2", "TLS_KEY": "two\nlines\n"}
    assert reveal(vault.root, "development") == {}
    for path in vault.folder.iterdir():
        assert KEY not in path.read_text()
        assert "STRIPE" not in path.read_text()


def test_without_a_key_an_identity_is_made_that_is_ones_own_alone(vault: Vault, ada: Path) -> None:
    vault.keep("STRIPE_KEY", KEY)
    identity = ada / ".config" / "tako" / "identity"
    assert stat.S_IMODE(identity.stat().st_mode) == 0o600
    assert stat.S_IMODE(identity.parent.stat().st_mode) == 0o700
    before = identity.read_bytes()
    vault.keep("OTHER_KEY", KEY)
    assert identity.read_bytes() == before
    assert [one.key for one in vault.readers()] == re.findall(r"age1\w+", identity.read_text())


def test_the_identity_is_in_the_folder_that_xdg_names(
    vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    vault.keep("STRIPE_KEY", KEY)
    assert (tmp_path / "config" / "tako" / "identity").is_file()


@pytest.mark.parametrize("name", ["id_ed25519", "id_rsa"])
@pytest.mark.parametrize("public", [True, False])
def test_an_ssh_key_opens_it_and_no_identity_is_made(vault: Vault, ada: Path, name: str, public: bool) -> None:
    line = ssh_key(ada, name)
    if not public:
        (ada / ".ssh" / f"{name}.pub").unlink()
    vault.keep("STRIPE_KEY", KEY)
    assert [one.key for one in vault.readers()] == [" ".join(line.split()[:2])]
    assert vault.reveal() == {"STRIPE_KEY": KEY}
    assert not keys.identity_file().exists()


def test_a_key_with_a_passphrase_is_left_alone_and_an_identity_made(vault: Vault, ada: Path) -> None:
    ssh_key(ada, passphrase=PASSPHRASE)
    vault.keep("STRIPE_KEY", KEY)
    assert keys.identity_file().is_file()
    assert vault.reveal() == {"STRIPE_KEY": KEY}


def test_who_has_only_a_key_with_a_passphrase_is_told_so_and_given_a_key_to_ask_for(
    vault: Vault, ada: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault.keep("STRIPE_KEY", KEY)
    bob = someone(tmp_path, monkeypatch, "bob")
    line = ssh_key(bob, passphrase=PASSPHRASE)
    with pytest.raises(ConfigError, match="id_ed25519 has a passphrase") as caught:
        vault.reveal()
    [asked] = re.findall(r"age1\w+", caught.value.hint)
    someone(tmp_path, monkeypatch, "ada")
    assert vault.share(keys.public_key(line)) is True  # which age can encrypt to, but he cannot open
    someone(tmp_path, monkeypatch, "bob")
    with pytest.raises(ConfigError, match="has a passphrase"):
        vault.reveal()
    someone(tmp_path, monkeypatch, "ada")
    vault.share(keys.public_key(asked))
    someone(tmp_path, monkeypatch, "bob")
    assert vault.reveal() == {"STRIPE_KEY": KEY}


def test_a_key_of_a_kind_that_age_cannot_use_is_named(
    vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault.keep("STRIPE_KEY", KEY)
    bob = someone(tmp_path, monkeypatch, "bob")
    ssh_key(bob, "id_ecdsa")
    (bob / ".ssh" / "id_ecdsa").rename(bob / ".ssh" / "id_rsa")
    with pytest.raises(ConfigError, match=r"id_rsa is of a kind that age cannot use"):
        vault.reveal()


def test_who_it_is_shared_with_can_read_and_set_and_the_others_still_can(
    vault: Vault, ada: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault.keep("STRIPE_KEY", KEY)
    bob = someone(tmp_path, monkeypatch, "bob")
    line = ssh_key(bob, comment="bob@desk")
    with pytest.raises(ConfigError, match="none of your keys opens the secrets of production"):
        vault.keep("STRIPE_KEY", "bobs")
    someone(tmp_path, monkeypatch, "ada")
    assert vault.reveal() == {"STRIPE_KEY": KEY}
    assert vault.share(keys.public_key(line)) is True
    assert vault.share(keys.public_key(line)) is False
    assert [one.name for one in vault.readers()][1:] == ["bob@desk"]
    someone(tmp_path, monkeypatch, "bob")
    vault.keep("OTHER_KEY", KEY)
    someone(tmp_path, monkeypatch, "ada")
    assert vault.reveal() == {"OTHER_KEY": KEY, "STRIPE_KEY": KEY}


def test_a_line_that_is_taken_out_of_the_list_cannot_read_what_is_set_from_then_on(
    vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault.keep("STRIPE_KEY", KEY)
    line = ssh_key(someone(tmp_path, monkeypatch, "bob"))
    someone(tmp_path, monkeypatch, "ada")
    vault.share(keys.public_key(line))
    vault.key_file.write_text(vault.key_file.read_text().replace(f"{line}\n", ""))
    vault.keep("STRIPE_KEY", KEY)
    someone(tmp_path, monkeypatch, "bob")
    with pytest.raises(ConfigError, match="none of your keys"):
        vault.reveal()


def test_nobody_shuts_himself_out(vault: Vault, ada: Path) -> None:
    ssh_key(ada)
    vault.keep("STRIPE_KEY", KEY)
    listed, sealed = vault.key_file.read_text(), vault.file.read_bytes()
    other = str(pyrage.x25519.Identity.generate().to_public())
    vault.key_file.write_text(f"{other} bob\n")
    with pytest.raises(Refused, match=r"none of your keys would open .*production\.age any more"):
        vault.share(keys.public_key(other))
    assert (vault.file.read_bytes(), vault.key_file.read_text()) == (sealed, f"{other} bob\n")
    vault.key_file.write_text(listed)
    vault.keep("OTHER_KEY", KEY)


def test_a_public_file_that_is_not_of_the_private_key_beside_it_loses_nothing(
    vault: Vault, ada: Path, tmp_path: Path
) -> None:
    ssh_key(ada)
    (tmp_path / "other").mkdir()
    (ada / ".ssh" / "id_ed25519.pub").write_text(ssh_key(tmp_path / "other"))
    with pytest.raises(Refused, match=r"none of your keys would open") as caught:
        vault.keep("STRIPE_KEY", KEY)
    assert ".pub" in caught.value.hint
    assert not vault.file.exists()


def test_a_key_that_somebody_has_slipped_into_the_list_is_not_encrypted_to(vault: Vault) -> None:
    vault.keep("STRIPE_KEY", KEY)
    slipped = pyrage.x25519.Identity.generate()
    with vault.key_file.open("a") as file:
        file.write(f"{slipped.to_public()} a-friend\n")
    before = vault.file.read_bytes()
    with pytest.raises(Refused, match="a key that nobody has shared with: a-friend") as caught:
        vault.keep("OTHER_KEY", KEY)
    assert "tako secrets share" in caught.value.hint
    assert vault.file.read_bytes() == before
    vault.share(keys.public_key(str(slipped.to_public())))
    vault.keep("OTHER_KEY", KEY)
    assert KEY in pyrage.decrypt(vault.file.read_bytes(), [slipped]).decode()


@pytest.mark.parametrize(
    "given",
    [
        "",
        "nonsense",
        "ssh-ed25519",
        "ssh-ed25519 AAAA",
        "age1nonsense",
        "ecdsa-sha2-nistp256 AAAAE2Vj",
        "~/.ssh/id_none.pub",
    ],
)
def test_what_is_no_key_is_refused_and_nothing_changes(vault: Vault, given: str) -> None:
    vault.keep("STRIPE_KEY", KEY)
    before = {path: path.read_bytes() for path in vault.folder.iterdir()}
    with pytest.raises(InvalidValue, match="is no public key") as caught:
        vault.share(keys.public_key(given))
    assert "ssh-ed25519" in caught.value.hint
    assert {path: path.read_bytes() for path in vault.folder.iterdir()} == before


def test_a_private_key_is_refused_and_not_repeated(ada: Path) -> None:
    ssh_key(ada)
    path = ada / ".ssh" / "id_ed25519"
    secret = str(pyrage.x25519.Identity.generate())
    for given in (str(path), path.read_text(), secret, secret.lower()):
        with pytest.raises(InvalidValue, match="private key") as caught:
            keys.public_key(given)
        assert path.read_text()[40:60] not in str(caught.value)
        assert secret[20:40] not in str(caught.value).upper()


def test_a_public_key_may_be_named_by_its_file(ada: Path) -> None:
    line = ssh_key(ada)
    assert keys.public_key("~/.ssh/id_ed25519.pub").line == line


@pytest.mark.parametrize(("mode", "content"), [(0o644, None), (0o600, "AGE-SECRET-KEY-1NONE\n"), (0o600, "")])
def test_an_identity_that_others_may_read_or_that_is_none_is_refused_and_kept(
    vault: Vault, mode: int, content: str | None
) -> None:
    vault.keep("STRIPE_KEY", KEY)
    identity = keys.identity_file()
    if content is not None:
        identity.write_text(content)
    identity.chmod(mode)
    before = identity.read_bytes()
    with pytest.raises(ConfigError, match="has mode 0644" if content is None else "is no age identity") as caught:
        vault.reveal()
    assert caught.value.hint
    assert identity.read_bytes() == before


# --- what may go wrong -----------------------------------------------------------------------------------------------


def test_a_damaged_file_is_named_and_left_as_it_is(vault: Vault) -> None:
    vault.keep("STRIPE_KEY", KEY)
    whole = vault.file.read_bytes()
    for damaged in (b"", whole[:100], whole[:-80], whole.replace(b"A", b"B"), b"garbage", os.urandom(300)):
        vault.file.write_bytes(damaged)
        for act in (vault.reveal, lambda: vault.keep("OTHER_KEY", KEY), lambda: vault.remove("STRIPE_KEY")):
            with pytest.raises(ConfigError, match=r"production\.age is damaged") as caught:
                act()
            assert "git" in caught.value.hint
        assert vault.file.read_bytes() == damaged


def test_the_marks_of_a_merge_are_called_that(vault: Vault) -> None:
    vault.keep("STRIPE_KEY", KEY)
    vault.file.write_bytes(b"<<<<<<< HEAD\n" + vault.file.read_bytes() + b"=======\n>>>>>>> theirs\n")
    with pytest.raises(ConfigError, match="marks of a merge"):
        vault.reveal()


def test_what_is_inside_and_is_no_envelope_is_not_shown(vault: Vault) -> None:
    vault.keep("STRIPE_KEY", KEY)
    own, _ = keys.own_keys()
    vault.file.write_bytes(pyrage.encrypt(json.dumps({"x": KEY}).encode(), [own[0].public.recipient()]))
    with pytest.raises(ConfigError, match="holds no secrets of tako's") as caught:
        vault.reveal()
    assert KEY not in str(caught.value) + caught.value.hint
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_a_list_without_keys_is_refused_and_nothing_changes(vault: Vault) -> None:
    vault.keep("STRIPE_KEY", KEY)
    before = vault.file.read_bytes()
    vault.key_file.write_text("# nobody\n")
    with pytest.raises(ConfigError, match="names no key"):
        vault.keep("OTHER_KEY", KEY)
    vault.key_file.write_text("nonsense\n")
    with pytest.raises(ConfigError, match=r"production\.keys:1: no public key"):
        vault.keep("OTHER_KEY", KEY)
    assert vault.file.read_bytes() == before


def test_what_is_not_there_is_not_found(vault: Vault) -> None:
    with pytest.raises(NotFound, match="no secrets of production yet"):
        vault.remove("STRIPE_KEY")
    with pytest.raises(NotFound, match="no secrets of production yet"):
        vault.share(keys.first_key().public)
    assert not vault.file.exists()
    vault.keep("STRIPE_KEY", KEY)
    with pytest.raises(NotFound, match="no secret 'STRIPE'") as caught:
        vault.remove("STRIPE")
    assert "STRIPE_KEY" in caught.value.hint
    vault.remove("STRIPE_KEY")
    assert vault.reveal() == {}


@pytest.mark.parametrize("value", ["", "a\0b", "\udcff", "x" * ((1 << 17) + 1)])
def test_a_value_that_could_not_be_handed_over_is_refused_and_not_shown(vault: Vault, value: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        vault.keep("STRIPE_KEY", value)
    assert len(str(caught.value)) < 200
    assert not vault.file.exists()


def test_many_who_set_at_once_all_have_theirs_kept(project: Path) -> None:
    names = [f"KEY_{number}" for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(lambda name: tako("secrets", "set", name, cwd=project, stdin=f"value of {name}"), names))
    assert [one.returncode for one in ended] == [0] * 8, [one.stderr for one in ended]
    assert reveal(project, "development") == {name: f"value of {name}" for name in names}


def test_a_kill_at_any_moment_leaves_the_old_values_or_the_new_ones(vault: Vault) -> None:
    """The writer is killed again and again while it writes; whoever comes next finds one whole vault."""
    vault.keep("STRIPE_KEY", "0")
    code = (
        "import sys, itertools; from pathlib import Path; from tako_cli.vault import Vault\n"
        "for i in itertools.count(1):\n"
        "    Vault(Path(sys.argv[1]), 'production').keep('STRIPE_KEY', str(i))\n"
        "    print(i, flush=True)\n"
    )
    last = 0
    for _ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", code, str(vault.root)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(3):
            last = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest = [int(line) for line in writer.stdout.read().split()]
        writer.wait()
        writer.stdout.close()
        assert int(vault.reveal()["STRIPE_KEY"]) in (max([last, *rest]), max([last, *rest]) + 1)
    vault.keep("STRIPE_KEY", KEY)
    assert vault.reveal() == {"STRIPE_KEY": KEY}


def test_a_share_that_was_cut_off_between_its_two_files_is_done_by_the_next(
    vault: Vault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault.keep("STRIPE_KEY", KEY)
    before = vault.file.read_bytes()
    line = ssh_key(someone(tmp_path, monkeypatch, "bob"))
    someone(tmp_path, monkeypatch, "ada")
    vault.share(keys.public_key(line))
    vault.file.write_bytes(before)  # as if it had ended after the first
    assert vault.share(keys.public_key(line)) is True
    someone(tmp_path, monkeypatch, "bob")
    assert vault.reveal() == {"STRIPE_KEY": KEY}


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
