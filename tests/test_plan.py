"""What a deploy would do, as text: facts, units, the plan and its commands. No server is asked."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tako_cli.deploy import facts, plan
from tako_cli.deploy.facts import Facts, read
from tako_cli.deploy.lock import Target
from tako_cli.deploy.release import Release
from tako_cli.deploy.units import units
from tako_cli.remote import Remote
from tako_runtime import clock, config
from tako_runtime.config import Config
from tako_runtime.manifest import Declared, Manifest
from tako_runtime.store.version import newest
from tako_runtime.switch import Spec

CONFIG = """
    name = "shop"
    [app]
    command = ["uvicorn", "app:app", "--fd", "{fd}"]
    port = 8123
    [workflows.slow]
    grace = "5m"
    [envs.production]
    servers = ["web-1"]
    [envs.staging]
    servers = ["web-1"]
    [servers.web-1]
    host = "deploy@web-1.example.com"
"""


def told(**given: Any) -> dict[str, Any]:
    """What a server answers that is fit for all."""
    answer = {
        "python": ["/usr/bin/python3", "3.11.2"], "machine": "x86_64", "glibc": "2.36", "systemd": "252",
        "manager": "running", "user": "root", "root": True, "runtime_dir": "/run", "linger": True, "account": True,
        "base": "/opt/tako/shop", "data_dir": "/var/lib/tako/production", "free": 9 << 30, "free_data": 9 << 30,
        "time": 1000.0, "uv": "", "lock": None, "schema": 4, "current": "", "previous": "", "units": {}, "releases": [],
    }  # fmt: skip
    return answer | given


def of_user(**given: Any) -> dict[str, Any]:
    share = "/home/deploy/.local/share/tako"
    theirs = {"user": "deploy", "root": False, "runtime_dir": "/run/user/1000", "base": f"{share}/shop"}
    return told(**theirs, data_dir=f"{share}/production") | given


@pytest.fixture
def shop(tmp_path: Path) -> Config:
    file = tmp_path / "tako.toml"
    file.write_text(textwrap.dedent(CONFIG))
    return config.load(file)


@pytest.fixture
def release(tmp_path: Path) -> Release:
    file = tmp_path / "abc.tar.gz"
    file.write_bytes(b"packed")
    target = Target("3.11", "x86_64", "2.36")
    return Release(
        "abc", file, "d1ge57", 6, 3, "abc", False, Manifest(()), (), {target: ".release/requirements-x.txt"},
        ".release/wheels/pip-25-py3-none-any.whl", False,
    )  # fmt: skip


def asked(shop: Config, answer: Mapping[str, Any], env: str = "production", here: float = 1000.0) -> Facts:
    return read(shop, env, Remote("web-1", "root@web-1"), answer, here)


# --- facts -----------------------------------------------------------------------------------------------------------


def test_a_server_that_is_fit_has_no_problems(shop: Config) -> None:
    for answer in (told(), of_user(), told(shared={}), told(shared={"serves": None}), told(shared={"serves": 1})):
        found = asked(shop, answer)
        assert found.problems == ()
        assert found.target == Target("3.11", "x86_64", "2.36")


@pytest.mark.parametrize(
    ("answer", "problem", "hint"),
    [
        (told(machine=""), "Python is too old: 3.11.2", "apt install python3.11"),
        (told(systemd="247"), "systemd is 247: 249 it has to be", ""),
        (told(systemd=""), "systemd is not there", ""),
        (told(manager=""), "systemctl does not answer", ""),
        (of_user(manager=""), "systemctl --user does not answer", ""),
        (of_user(linger=False), "the services of deploy end with its last login", "loginctl enable-linger deploy"),
        (told(glibc=""), "no glibc", ""),
        (told(time=1090.0), "its clock is 90 s ahead", "timedatectl"),
        (told(time=910.0), "its clock is 90 s behind", "timedatectl"),
        (told(free_data=100 << 20), "only 100 MiB are free", "Make room"),
        (told(schema=99), "for a newer tako: it takes version 99", "Upgrade tako"),
        (told(shared={"serves": 99}), f"it takes version 99, and this one knows {newest('postgres')}", "Upgrade tako"),
        (told(shared={"error": "the database db:5432/shop is away", "hint": "Look at it."}), "db:5432", "Look at it"),
        (told(lock={"user": "ada", "host": "pc", "since": 940.0}), "a deploy of ada on pc is under way, for 1m", ""),
    ],
)  # fmt: skip
def test_what_speaks_against_a_deploy_is_told_with_what_to_do(
    shop: Config, answer: dict[str, Any], problem: str, hint: str
) -> None:
    found = asked(shop, answer)
    assert len(found.problems) == 1
    assert problem in found.problems[0]
    assert hint in "".join(found.hints)


def test_an_app_is_called_by_its_environment_too_but_in_production(shop: Config) -> None:
    assert facts.slug(shop, "production") == "shop"
    assert facts.slug(shop, "staging") == "shop.staging"


def test_what_a_server_is_asked_is_answered_by_any_python_by_itself() -> None:
    source = Path(facts.__file__).with_name("asked.py").read_text()
    words = [sys.executable, "-I", "-", "shop", "shop", "production", ""]
    done = subprocess.run(words, input=source, capture_output=True, text=True, check=True, timeout=60)
    answer = json.loads(done.stdout)
    assert set(answer) == set(told())
    assert answer["python"][0] == sys.executable
    assert abs(answer["time"] - clock.SystemClock().now() / clock.SECOND) < 60
    assert answer["current"] == ""
    assert answer["releases"] == []


# --- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here: apt install systemd")
@pytest.mark.parametrize("answer", [told(), of_user()], ids=["root", "user"])
def test_the_units_are_valid_to_the_letter(shop: Config, answer: dict[str, Any], tmp_path: Path) -> None:
    place = asked(shop, answer).place
    assert place is not None
    folder = tmp_path / "odd place %1"
    place = replace(place, base=str(folder), data_dir=str(tmp_path / "data dir"), account="root")
    python = folder / "releases" / "abc" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    files = units(shop, "web-1", place, "abc")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    words = ["systemd-analyze", *["--user"] * place.user, "verify", "--man=no", "--recursive-errors=yes"]
    done = subprocess.run(
        [*words, *(str(tmp_path / name) for name in files)], capture_output=True, text=True, check=False,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if "tako-shop" in line]
    assert (done.returncode, ours) == (0, []), done.stderr


#: Every directive that may be in a unit, and the systemd that had it first (systemd.directives(7)); 0: any has it.
SINCE = {
    "Description": 0, "After": 0, "StartLimitIntervalSec": 230, "WantedBy": 0, "Type": 0, "NotifyAccess": 0,
    "ExecCondition": 243, "ExecStart": 0, "WorkingDirectory": 0, "Environment": 0, "Sockets": 0, "NonBlocking": 0,
    "Restart": 0, "RestartSec": 0, "RestartPreventExitStatus": 189, "WatchdogSec": 0, "TimeoutStartSec": 188,
    "TimeoutStopSec": 188, "KillMode": 0, "OOMPolicy": 243, "LimitNOFILE": 0, "UMask": 0, "NoNewPrivileges": 187,
    "LockPersonality": 235, "RestrictSUIDSGID": 242, "SystemCallArchitectures": 209, "User": 0, "Group": 0,
    "CapabilityBoundingSet": 0, "ProtectSystem": 214, "ProtectHome": 214, "ProtectKernelTunables": 232,
    "ProtectKernelModules": 232, "ProtectKernelLogs": 244, "ProtectControlGroups": 232, "ProtectHostname": 242,
    "RestrictAddressFamilies": 211, "RestrictNamespaces": 233, "RestrictRealtime": 231, "ReadWritePaths": 231,
    "ListenStream": 0, "Service": 0, "Backlog": 0, "NoDelay": 216, "RemainAfterExit": 0,
}  # fmt: skip


@pytest.mark.parametrize("answer", [told(), of_user()], ids=["root", "user"])
def test_the_units_have_nothing_that_the_oldest_systemd_does_not_know(shop: Config, answer: dict[str, Any]) -> None:
    place = asked(shop, answer).place
    assert place is not None
    text = "".join(units(shop, "web-1", place, "abc").values())
    used = {line.partition("=")[0] for line in text.splitlines() if "=" in line}
    assert {name: SINCE.get(name, 999) for name in used if SINCE.get(name, 999) > facts.SYSTEMD} == {}
    assert re.findall(r"^Type=(.*)$", text, re.MULTILINE) == ["notify", "oneshot"]  # notify-reload came with 253


def test_a_release_starts_only_if_it_is_current_or_on_trial(shop: Config, tmp_path: Path) -> None:
    place = asked(shop, told()).place
    assert place is not None
    place = replace(place, base=str(tmp_path), runtime_dir=str(tmp_path))
    text = units(shop, "web-1", place, "abc")["tako-shop@abc.service"]
    [condition] = [line.partition(" -c ")[2] for line in text.splitlines() if line.startswith("ExecCondition=")]
    script = json.loads(condition).replace("$$", "$")  # the quoting of systemd is that of JSON, as far as it goes here

    def starts() -> bool:
        return subprocess.run(["sh", "-c", script], check=False).returncode == 0

    assert not starts()
    (tmp_path / "current").symlink_to("releases/other")
    assert not starts()
    (tmp_path / "tako-shop.trial").write_text("abc\n")
    assert starts()
    (tmp_path / "tako-shop.trial").unlink()
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("releases/abc")
    assert starts()


def test_a_release_is_told_which_environment_it_is_of(shop: Config) -> None:
    place = asked(shop, told(), "staging").place
    assert place is not None
    text = units(shop, "web-1", place, "abc")["tako-shop.staging@abc.service"]
    assert 'Environment="TAKO_ENV=staging"\n' in text
    assert " --env staging " in text


def test_the_longest_grace_is_what_a_stop_is_given(shop: Config) -> None:
    place = asked(shop, told()).place
    assert place is not None
    assert "TimeoutStopSec=330\n" in units(shop, "web-1", place, "abc")["tako-shop@abc.service"]


def test_an_app_that_binds_its_port_itself_has_no_socket_unit(tmp_path: Path) -> None:
    file = tmp_path / "tako.toml"
    file.write_text(textwrap.dedent(CONFIG).replace('"--fd", "{fd}"', '"--port", "{port}"'))
    own = config.load(file)
    place = asked(own, told()).place
    assert place is not None
    files = units(own, "web-1", place, "abc")
    assert list(files) == ["tako-shop@abc.service"]
    assert "Sockets=" not in files["tako-shop@abc.service"]


# --- the plan --------------------------------------------------------------------------------------------------------


def planned(shop: Config, release: Release, answer: Mapping[str, Any], **more: Any) -> plan.Plan:
    return plan.plan(shop, release, asked(shop, answer), by={"by": "ada"}, **more)


def test_a_first_deploy_sends_unpacks_installs_and_switches(shop: Config, release: Release) -> None:
    made = planned(shop, release, told(schema=None))
    assert [step.name for step in made.steps] == ["folders", "upload", "unpack", "environment", "switch"]
    assert all(words.text for words in made.steps)
    upload = made.steps[1]
    assert upload.text == f"cat > /opt/tako/shop/incoming/d1ge57.tar.gz < {release.file}"


def test_what_a_server_has_already_is_not_sent_again(shop: Config, release: Release) -> None:
    known = {"id": "abc", "digest": "d1ge57", "ready": True}
    made = planned(shop, release, told(releases=[known]))
    assert [step.name for step in made.steps] == ["folders", "fit", "switch"]
    unfinished = planned(shop, release, told(releases=[{**known, "ready": False}]))
    assert [step.name for step in unfinished.steps] == ["folders", "environment", "fit", "switch"]


def test_the_same_tree_with_other_bytes_is_another_release_there(shop: Config, release: Release) -> None:
    made = planned(shop, release, told(releases=[{"id": "abc", "digest": "0ther", "ready": True}]))
    assert made.release == "abc-d1ge57"
    assert "upload" in [step.name for step in made.steps]


def test_the_switch_is_told_all_that_it_needs(shop: Config, release: Release) -> None:
    import msgspec

    made = planned(shop, release, told())
    spec = msgspec.json.decode(made.switch.given, type=Spec, dec_hook=lambda kind, text: kind(text))
    assert spec.release == "abc"
    assert spec.base == Path("/opt/tako/shop")
    assert set(spec.files) == {"tako-shop@abc.service", "tako-shop.socket", "tako-shop.service"}
    assert made.switch.words[-5:] == [
        "/opt/tako/shop/releases/abc/.venv/bin/python", "-P", "-m", "tako_runtime", "switch",
    ]  # fmt: skip


def test_secrets_are_in_no_command_and_no_unit(shop: Config, release: Release) -> None:
    made = planned(shop, release, told(), secrets={"STRIPE_KEY": "sk_live_4711"})
    assert b"sk_live_4711" in made.switch.given
    assert made.switch.text.endswith("< [REDACTED]")
    assert not any("sk_live_4711" in step.text for step in made.steps)
    assert not any(b"sk_live_4711" in step.given for step in made.steps if step is not made.switch)


def test_the_runs_are_looked_for_in_the_database_that_the_release_is_to_have(shop: Config, release: Release) -> None:
    """Until the switch the server has the secrets of the release before."""
    url = "postgresql://shop:pg-pass-4711@db/shop"
    there = told(schema=1)
    made = planned(shop, release, there, secrets={"DATABASE_URL": url, "STRIPE_KEY": "sk_live_4711"})
    assert made.fit is not None
    assert json.loads(made.fit.given) == {"secrets": {"DATABASE_URL": url}}
    assert "TAKO_SECRETS_FD=0" in made.fit.words
    assert "pg-pass" not in made.fit.text
    own = planned(shop, release, there)
    assert own.fit is not None
    assert (own.fit.given, "TAKO_SECRETS_FD=0" in own.fit.words) == (b"", False)


def test_what_the_app_is_asked_is_asked_as_the_user_who_runs_it(shop: Config, release: Release) -> None:
    assert planned(shop, release, told()).fit.words[:4] == ["runuser", "-u", "tako", "--"]  # type: ignore[union-attr]
    assert planned(shop, release, of_user()).fit.words[0] == "sh"  # type: ignore[union-attr]


@pytest.mark.parametrize("script", [plan._FOLDERS_OF_ROOT, plan._FOLDERS_OF_USER, plan._ENVIRONMENT_BY_PIP,
                                    plan._ENVIRONMENT_BY_UV, plan._UNPACK])  # fmt: skip
def test_the_scripts_are_ones_that_any_shell_reads(script: str) -> None:
    done = subprocess.run(["sh", "-n", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_environment_is_made_with_pip_where_there_is_no_uv_and_once_only(
    shop: Config, release: Release, tmp_path: Path
) -> None:
    """The script itself, with a pip that only says that it was asked."""
    folder = tmp_path / "releases" / "abc"
    (folder / ".release" / "wheels" / "pip.whl").mkdir(parents=True)
    (folder / ".release" / "wheels" / "pip.whl" / "pip").write_text("open('asked', 'a').write('x')\n")
    words = ["sh", "-c", plan._ENVIRONMENT_BY_PIP, "environment", sys.executable, "r.txt", ".release/wheels/pip.whl"]
    for _ in range(2):
        subprocess.run([*words, str(folder)], check=True, timeout=60)
    assert (folder / ".release" / "asked").read_text() == "x"
    assert (folder / ".venv" / "bin" / "python").exists()
    (folder / ".venv" / ".ready").unlink()  # it was cut off: it is begun anew
    subprocess.run([*words, str(folder)], check=True, timeout=60)
    assert (folder / ".release" / "asked").read_text() == "xx"


def test_the_lock_goes_with_the_process_that_holds_it_and_names_who_does(tmp_path: Path) -> None:
    words = [sys.executable, "-c", plan.LOCK, str(tmp_path / "base" / "deploy.lock"), '{"user": "ada"}']
    first = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdin is not None
    assert first.stdout.readline() == "held\n"
    second = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)
    assert (second.returncode, second.stdout) == (1, '{"user": "ada"}\n')
    first.stdin.close()  # as when the connection has gone
    assert first.wait(20) == 0
    first.stdout.close()
    third = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)
    assert (third.returncode, third.stdout) == (0, "held\n")


# --- servers that share nothing --------------------------------------------------------------------------------------


def declared(name: str, *, local: bool) -> Declared:
    return Declared(name, "default", 2, 1, 1, None, "flows.py", 1, local=local)


@pytest.mark.parametrize(
    ("servers", "url", "named"),
    [
        (["a", "b"], "sqlite", ["order", "refund"]),
        (["a"], "sqlite", []),
        (["a", "b"], "postgres", []),
    ],
)
def test_several_servers_need_a_store_that_they_share_for_all_that_is_not_local(
    shop: Config, servers: list[str], url: str, named: list[str]
) -> None:
    found = replace(shop, storage=replace(shop.storage, url=url))
    flows = (declared("order", local=False), declared("warm", local=True), declared("refund", local=False))
    assert plan.to_be_shared(found, servers, Manifest(flows)) == named
    assert plan.to_be_shared(found, servers, Manifest(flows[1:2])) == []
