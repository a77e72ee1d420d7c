"""`tako deploy` to real servers, Debian with systemd as PID 1: what is taken, what goes on, who may."""

import json
import textwrap
import time
from pathlib import Path

import pytest
from conftest import until
from deploying import APP, FLOWS, PORT, WITH_APP, Hammering, Shop, index, stage
from machines import Machine, machines
from serving import newer_tako

from tako_runtime.store import version

# --- taken -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "user"),
    [
        ("bookworm", "root"), ("bookworm", "deploy"), ("trixie", "root"),
        pytest.param("jammy", "root", marks=pytest.mark.lasting),
        pytest.param("jammy", "deploy", marks=pytest.mark.lasting),
        pytest.param("noble", "root", marks=pytest.mark.lasting),
    ],
)  # fmt: skip
def test_a_run_that_is_parked_over_a_deploy_ends_on_the_new_release_with_its_finished_steps_kept(
    tmp_path: Path, suite: str, user: str
) -> None:
    """And the whole of it: to servers without a way out, as root and as an ordinary user."""
    with machines("web", suite=suite) as [web]:
        shop = Shop(tmp_path / "shop", {"web": web}, user)
        first = shop.release()
        shop.runs_on(first)
        run_id = shop.start("ask")
        until(lambda: shop.run(run_id)["reason"] == "waiting")
        second = shop.release()
        assert second != first
        shop.runs_on(second)
        shop.signal("go")
        assert shop.ended(run_id) == [first, second]
        assert shop.run(run_id)["attempt"] == 1


@pytest.mark.lasting
def test_what_is_not_vendored_comes_from_the_servers_own_index(shop: Shop, web: Machine) -> None:
    from tako_cli.deploy.lock import Target
    from tako_cli.deploy.release import pack
    from tako_runtime import config

    pack(config.load(shop.folder / "tako.toml"), "production", [Target("3.11", "x86_64", "2.36")])
    shop.configure(deploy="vendor = false")
    with index(web, (shop.folder / ".tako" / "deploy" / "wheels").resolve()):
        shop.runs_on(shop.release())


@pytest.mark.lasting
def test_a_step_of_ten_minutes_does_not_hold_the_deploy_and_costs_its_run_no_attempt(shop: Shop) -> None:
    shop.configure('[workflows]\ngrace = "10s"\n')
    first = shop.release()
    run_id = shop.start("long")
    until(lambda: [step["name"] for step in shop.run(run_id)["steps"]] == ["first"])  # and it is in the next one
    shop.change()
    begun = time.monotonic()
    [result] = shop.deploy()
    assert time.monotonic() - begun < 60
    assert result["draining"] == [first]
    assert shop.ended(run_id) == [first, result["release"]]
    shop.runs_on(result["release"])


@pytest.mark.lasting
def test_no_request_fails_at_300_a_second_over_five_deploys(shop: Shop, web: Machine) -> None:
    shop.configure(WITH_APP)
    shop.write("app.py", APP)
    releases = [shop.release()]
    hammer = Hammering(web, PORT, 300)
    releases += [shop.release() for _ in range(5)]
    told = hammer.stop()
    assert told["failures"] == []
    assert set(told["answers"]) == set(releases)
    assert sum(told["answers"].values()) == told["asked"]
    assert told["asked"] > 290 * told["seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["bookworm", pytest.param("jammy", marks=pytest.mark.lasting)])
def test_the_units_are_valid_by_the_servers_own_systemd_and_with_its_app_they_take_over(
    tmp_path: Path, suite: str
) -> None:
    with machines("web", suite=suite) as [web]:
        shop = Shop(tmp_path / "shop", {"web": web}, more=WITH_APP)
        shop.write("app.py", APP)
        shop.release()
        hammer = Hammering(web, PORT, 50)
        release = shop.release()
        assert hammer.stop()["failures"] == []
        names = [f"tako-shop@{release}.service", "tako-shop.socket", "tako-shop.service"]
        verify = ["systemd-analyze", "verify", *["--recursive-errors=yes"] * (suite != "jammy")]  # which came with 250
        done = web.attempt(*verify, *(f"/etc/systemd/system/{name}" for name in names))
        assert (done.returncode, done.stderr) == (0, ""), done.stdout


@pytest.mark.lasting
def test_the_way_back_needs_no_build_and_the_one_after_that_leads_forward_again(shop: Shop) -> None:
    first, second = shop.release(), shop.release()
    begun = time.monotonic()
    done = shop.tako("rollback")
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - begun < 10 * 2  # of which half is the machine's, that several share
    shop.runs_on(first)
    assert shop.tako("rollback", second[:8]).returncode in (0, 1)
    listed = json.loads(shop.tako("releases", "ls", "--json").stdout)["releases"]
    assert {row["release"] for row in listed} == {first, second}
    assert [row["release"] for row in listed if row["current"]] == [shop.current()]
    missing = shop.tako("rollback", "nosuch")
    assert missing.returncode == 4
    assert "it has no release nosuch" in missing.stderr


@pytest.mark.lasting
def test_a_newer_tako_is_deployed_and_left_again_unless_its_store_is_none_for_older_ones(
    shop: Shop, tmp_path: Path
) -> None:
    first = shop.release()
    run_id = shop.start("ask")
    until(lambda: shop.run(run_id)["reason"] == "waiting")
    shop.tako_from = newer_tako(tmp_path / "newer")
    second = shop.release()
    shop.runs_on(second)
    shop.tako_from = None
    done = shop.tako("rollback", "--yes")
    assert done.returncode == 0, done.stderr
    shop.runs_on(first)

    knows = version.newest("sqlite") + 1
    rename = f"-- serves: {knows}\nALTER TABLE runs RENAME COLUMN losses TO losses_of_old;\n"
    rename += "ALTER TABLE runs ADD COLUMN losses INTEGER NOT NULL DEFAULT 0;\n"
    shop.tako_from = newer_tako(tmp_path / "breaking", "SELECT 1;\n")
    number = knows + 1
    path = shop.tako_from / "tako_runtime/store/migrations/sqlite" / f"{number:04}_losses.sql"
    path.write_text(rename.replace(f"serves: {knows}", f"serves: {number}"))
    shop.change()
    refused = shop.tako("deploy", "--yes")
    assert refused.returncode == 1
    assert f"could not work with version {number}" in refused.stderr
    assert "tako store migrate --breaking" in refused.stderr
    shop.runs_on(first)
    runs = shop.tako("store", "migrate", "--breaking", "--env", "production")
    assert runs.returncode == 1
    assert "shop runs on web" in runs.stderr
    assert shop.tako("app", "stop").returncode == 0
    moved = shop.tako("store", "migrate", "--breaking", "--env", "production")
    assert moved.returncode == 0, moved.stderr
    third = shop.deploy()[0]["release"]
    shop.runs_on(third)
    shop.signal("go")
    assert shop.ended(run_id) == [first, third]
    back = shop.tako("rollback", first, "--yes")
    assert back.returncode == 1
    assert "it is for a newer tako" in back.stderr


@pytest.mark.lasting
def test_old_releases_go_but_the_newest(shop: Shop, web: Machine) -> None:
    shop.configure(deploy="vendor = true\nkeep_releases = 2")
    releases = [shop.release() for _ in range(3)]
    until(lambda: set(shop.units()) == {releases[-1]} or shop.units())
    assert set(web.run("ls", f"{shop.base}/releases").split()) == set(releases[1:])
    assert f"tako-shop@{releases[0]}.service" not in web.run("ls", "/etc/systemd/system")


@pytest.mark.lasting
def test_a_dry_run_shows_every_command_and_changes_nothing(shop: Shop, web: Machine) -> None:
    done = shop.tako("deploy", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "4. installs what it needs" in done.stdout
    assert "-m tako_runtime switch" in done.stdout
    assert "nothing was changed" in done.stderr
    assert web.run("find", "/opt", "/var/lib/tako", "/etc/systemd/system", "-name", "*tako*", check=False) == ""


@pytest.mark.lasting
def test_runs_that_the_new_code_would_not_know_are_told_of_before_the_switch(shop: Shop) -> None:
    first = shop.release()
    run_id = shop.start("ask")
    until(lambda: shop.run(run_id)["reason"] == "waiting")
    shop.write("workflows/flows.py", FLOWS.replace('"first"', '"renamed"'))
    asked = shop.tako("deploy")
    assert asked.returncode == 1
    assert f"run {run_id} (ask) has finished first" in asked.stderr
    assert "--yes goes on" in asked.stderr
    shop.runs_on(first)
    shop.write("workflows/flows.py", FLOWS.replace('"ask"', '"question"'))
    told = shop.tako("deploy")
    assert told.returncode == 0, told.stderr
    assert "orphaned: 1 (ask: 1)" in told.stderr


@pytest.mark.lasting
def test_secrets_come_along_and_are_nowhere_but_in_their_file(shop: Shop, web: Machine) -> None:
    shop.configure('[secrets]\nrequired = ["STRIPE_KEY"]\n')
    known = 'return secrets["STRIPE_KEY"][-4:] + os.environ["TAKO_RELEASE"]'
    flows = textwrap.dedent(FLOWS).replace('return os.environ["TAKO_RELEASE"]', known)
    shop.write("workflows/flows.py", f"from tako_runtime import secrets\n{flows}")
    missing = shop.tako("deploy", "--yes")
    assert missing.returncode == 3
    assert "required secrets that are not set for production: STRIPE_KEY" in missing.stderr
    set_ = shop.tako("secrets", "set", "STRIPE_KEY", "--env", "production", stdin="sk_live_a1b2c3d4_4711")
    assert set_.returncode == 0, set_.stderr
    release = shop.release()
    run_id = shop.start("greet")
    assert shop.ended(run_id) == f"4711{release}"
    path = f"{shop.data_dir}/apps/shop/secrets.json"
    assert web.run("stat", "-c", "%a %U", path).strip() == "600 tako"
    hidden = (
        "! grep -rl sk_live_[a]1b2c3d4 /etc /opt /run /var/log /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null"
    )
    assert web.attempt("sh", "-c", hidden).stdout == ""
    assert "sk_live" not in web.run("journalctl", "--no-pager")


# --- who may, and where ----------------------------------------------------------------------------------------------


@pytest.mark.lasting
def test_a_second_deploy_at_once_is_refused_and_names_who_has_the_lock(shop: Shop, web: Machine) -> None:
    good = shop.release()
    shop.change()
    first = shop.begin("deploy", "--yes")
    until(lambda: stage(web, good) != "", 60)
    second = shop.tako("deploy", "--yes")
    assert second.returncode == 1
    assert "web: a deploy of root on " in second.stderr
    assert "is under way, for " in second.stderr
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0, said


@pytest.mark.lasting
def test_one_of_two_servers_that_is_down_stops_the_deploy_before_anything_is_changed(tmp_path: Path) -> None:
    with machines("web", "api") as [web, api]:
        shop = Shop(tmp_path / "shop", {"web": web, "api": api}, more=WITH_APP)
        shop.write("workflows/flows.py", "")  # two servers cannot share the runs of a workflow
        shop.write("app.py", APP)
        assert [one["state"] for one in shop.deploy("--parallel")] == ["taken", "taken"]
        good = shop.current(web)
        assert shop.current(api) == good
        shop.change()
        api.cut()
        done = shop.tako("deploy", "--yes")
        assert done.returncode == 1
        assert "api: root@api cannot be reached" in done.stderr
        assert "Nothing was changed." in done.stderr
        assert shop.current(web) == good
        partly = shop.tako("deploy", "--yes", "--keep-going", "--json")
        assert shop.current(web) != good, partly.stdout + partly.stderr
        api.mend()
        rest = shop.deploy("--resume")
        assert [(one["server"], one["state"]) for one in rest] == [("api", "taken")]
        assert shop.current(api) == shop.current(web)
