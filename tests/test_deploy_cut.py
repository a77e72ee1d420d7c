"""`tako deploy` to a real server, cut off: a killed command, a cable, a disk, a power cut."""

import os
import signal
import textwrap
import threading

import pytest
from conftest import until
from deploying import Shop, stage
from machines import Machine

pytestmark = pytest.mark.lasting


#: The server's own systemctl, which stops for ever as it is to enable a release's unit: before it does, or after.
HELD = """
    #!/bin/sh
    case "$*" in "enable tako-shop@"*)
        [ {moment} = before ] || /usr/bin/systemctl "$@"
        touch /run/held
        exec sleep infinity
    esac
    exec /usr/bin/systemctl "$@"
"""


# --- cut off ---------------------------------------------------------------------------------------------------------


def test_a_command_that_is_killed_between_any_two_steps_changes_nothing_and_the_next_deploy_mends_it(
    shop: Shop,
) -> None:
    good = shop.release()
    steps = ["makes its folders", "uploads the release", "unpacks it", "installs what it needs", "looks which runs"]
    for step in steps:
        shop.change()
        deploying = shop.begin("deploy", "--yes")
        assert deploying.stdout is not None
        for line in deploying.stdout:
            if step in line:
                break
        else:
            pytest.fail(f"it never came to {step!r}")
        os.killpg(deploying.pid, signal.SIGKILL)
        deploying.wait()
        deploying.stdout.close()
        shop.runs_on(good)
    shop.runs_on(shop.release())  # at once: nobody holds the lock any more


def test_a_command_that_is_killed_in_the_switch_leaves_one_release_that_runs(shop: Shop, web: Machine) -> None:
    good = shop.release()
    shop.change()
    deploying = shop.begin("deploy", "--yes")
    until(lambda: stage(web, good).startswith("watches"), 60)
    os.killpg(deploying.pid, signal.SIGKILL)
    deploying.communicate()
    until(lambda: shop.current() != good, 60)  # what runs there in one go runs to its end
    shop.runs_on(shop.current())
    shop.runs_on(shop.release())


def test_a_cable_that_is_cut_in_the_upload_is_noticed_and_the_next_deploy_mends_it(shop: Shop, web: Machine) -> None:
    good = shop.release()
    (shop.folder / "large.bin").write_bytes(os.urandom(150_000_000))
    incoming = web.root / "opt/tako/shop/incoming"

    def cut() -> None:
        until(lambda: any(path.stat().st_size > 5_000_000 for path in incoming.glob("*.part")), 120)
        web.cut()

    cutting = threading.Thread(target=cut)
    cutting.start()
    done = shop.tako("deploy", "--yes")
    cutting.join()
    web.mend()
    assert done.returncode == 1
    assert "the connection to root@web broke" in done.stderr
    assert "do it again" in done.stderr
    shop.runs_on(good)
    until(lambda: shop.tako("deploy", "--yes").returncode == 0, 120)  # the server gives the lock up within a minute
    shop.runs_on(shop.current())
    assert shop.current() != good
    assert list(incoming.iterdir()) == []


def test_a_disk_that_fills_up_stops_the_deploy_and_the_next_one_mends_it(shop: Shop, web: Machine) -> None:
    shop.configure(deploy='vendor = true\nmax_size = "1GiB"')
    first = shop.release()
    shop.change()
    good = shop.release()
    (shop.folder / "large.txt").write_bytes(bytes(260_000_000))
    web.fill_disk(leave=230_000_000)
    done = shop.tako("deploy", "--yes")
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    shop.runs_on(good)
    web.fill_disk(leave=100_000_000)
    asked = shop.tako("deploy", "--yes")
    assert asked.returncode == 1
    assert "MiB are free" in asked.stderr
    assert "Nothing was changed." in asked.stderr
    assert good in shop.tako("releases", "ls").stdout
    assert shop.tako("rollback", "--yes").returncode == 0, "what sends nothing needs no room"
    shop.runs_on(first)
    web.empty_disk()
    shop.deploy()
    shop.runs_on(shop.current())
    assert shop.current() != good


def test_a_reboot_in_the_switch_leaves_one_release_that_runs_and_the_next_deploy_mends_it(
    shop: Shop, web: Machine
) -> None:
    good = shop.release()
    parked, held = shop.start("ask"), shop.start("long")
    until(lambda: shop.run(parked)["reason"] == "waiting")
    until(lambda: [step["name"] for step in shop.run(held)["steps"]] == ["first"])  # and it is in the next one
    shop.change()
    deploying = shop.begin("deploy", "--yes")
    until(lambda: stage(web, good).startswith("watches"), 60)
    web.reboot()
    said, _ = deploying.communicate(timeout=120)
    assert deploying.returncode == 1, said
    shop.runs_on(good)
    assert shop.run(held)["status"] == "running"
    assert shop.run(held)["attempt"] == 1, "what was in hand was handed back, in order"
    release = shop.release()
    shop.runs_on(release)
    shop.signal("go")
    assert shop.ended(parked) == [good, release]
    assert shop.ended(held) == [good, release]


def test_a_power_cut_in_the_switch_leaves_the_old_release_and_the_next_deploy_mends_it(
    shop: Shop, web: Machine
) -> None:
    good = shop.release()
    run_id = shop.start("ask")
    until(lambda: shop.run(run_id)["reason"] == "waiting")
    shop.change()
    deploying = shop.begin("deploy", "--yes")
    until(lambda: stage(web, good).startswith("watches"), 60)
    web.power_cut()
    said, _ = deploying.communicate(timeout=120)
    assert deploying.returncode == 1
    assert "broke" in said
    web.boot()
    shop.runs_on(good)
    release = shop.release()
    shop.runs_on(release)
    shop.signal("go")
    assert shop.ended(run_id) == [good, release]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_power_cut_as_the_release_that_has_proved_itself_is_enabled_leaves_one_that_starts_at_boot(
    shop: Shop, web: Machine, moment: str
) -> None:
    """Had `current` named it before it was enabled, none would: a unit that `current` does not name may not start."""
    shop.release()
    systemctl = web.root / "usr/local/bin/systemctl"
    systemctl.write_text(textwrap.dedent(HELD.format(moment=moment)).lstrip())
    systemctl.chmod(0o755)
    shop.change()
    deploying = shop.begin("deploy", "--yes")
    until(lambda: web.attempt("test", "-e", "/run/held").returncode == 0, 120)
    web.power_cut()
    deploying.communicate(timeout=120)
    web.boot()
    systemctl.unlink()
    shop.runs_on(shop.current())
    shop.runs_on(shop.release())
