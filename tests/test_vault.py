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

import pyrage
import pytest
from cli import make_project, tako
from keyholders import CONFIG, FLOWS, KEY, PASSPHRASE, someone, ssh_key

from tako_cli import keys
from tako_cli.vault import Vault, reveal
from tako_runtime.errors import ConfigError, InvalidValue, NotFound, Refused

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
