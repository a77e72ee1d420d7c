"""tako.toml: what it says, which value wins, and how each mistake is told."""

import tomllib
from pathlib import Path

import pytest
from tables import refused, shop

from tako_runtime import clock, config
from tako_runtime.errors import ConfigError

EXAMPLE = Path(config.__file__).with_name("example.toml")


# ------------------------------------------------------------------------------------------------------ what it says


def test_a_file_with_only_a_name_has_the_built_in_values() -> None:
    read = shop("")
    assert read.name == "shop"
    assert (read.path, read.root) == (Path("tako.toml").absolute(), Path.cwd())
    assert read.app is None
    assert read.workflows == config.Workflows(
        dir="workflows",
        workers=0,
        concurrency=10,
        idle_timeout=5 * clock.MINUTE,
        grace=30 * clock.SECOND,
        retention=30 * clock.DAY,
        signal_retention=7 * clock.DAY,
        max_value=1024 * 1024,
        lease=15 * clock.SECOND,
    )
    assert read.storage.url == "sqlite"
    assert (read.vars, read.envs, read.servers) == ({}, {}, {})
    assert read.secrets.required == ()
    assert read.deploy == config.Deploy(vendor=False, data_dir=None, keep_releases=5, max_size=200 << 20)
    assert read.metrics.listen is None


def test_the_example_loads_and_holds_every_table_and_key_that_the_parser_knows() -> None:
    read = config.load(EXAMPLE)
    seen = set()
    for path in read.stated:
        place: tuple[str, ...] = ()
        for key in path:
            kind = config.TABLES[place]
            named = (*place, config.NAME)
            leaf = key in config.settings(kind) or (kind is dict and named not in config.TABLES)
            place = (*place, key) if leaf or (*place, key) in config.TABLES else named
        seen.add(place)
    assert set(config.TABLES) <= seen
    kinds = set(config.TABLES.values()) - {config.Lane}  # its keys are keys of Workflows too
    keys = {(kind, key) for kind in kinds for key in config.settings(kind)}
    stated = {(config.TABLES[place[:-1]], place[-1]) for place in seen if place[:-1] in config.TABLES and place}
    assert keys <= stated
    assert len(keys) > 20


def test_the_example_explains_each_key_in_the_parsers_words_and_shows_the_built_in_value() -> None:
    text = EXAMPLE.read_text()
    written = tomllib.loads(text)
    for kind in (
        config.App,
        config.Workflows,
        config.Storage,
        config.Env,
        config.Server,
        config.Deploy,
        config.Metrics,
    ):
        for key, setting in config.settings(kind).items():
            row = next(row for row in text.splitlines() if row.startswith(f"{key} = ") and setting.doc in row)
            if "for example" not in row and setting.default is not config.REQUIRED:
                assert written[kind.__name__.lower()][key] == setting.default


def test_every_built_in_value_is_one_that_the_file_could_state() -> None:
    for kind in config.TABLES.values():
        for key, setting in config.settings(kind).items():
            if setting.default is not config.REQUIRED:
                setting.builtin()
            assert setting.doc, key


def test_the_app_has_its_command_port_and_health() -> None:
    read = shop('[app]\ncommand = ["uvicorn", "app:app", "-c", "-c", "a\\nb"]\nhealth = "/up"')
    assert read.app == config.App(command=("uvicorn", "app:app", "-c", "-c", "a\nb"), port=8000, health="/up")


def test_durations_are_text_or_seconds_and_become_microseconds() -> None:
    read = shop('[workflows]\nidle_timeout = "1h30m"\ngrace = 1.5\nretention = 60\nlease = "2s"')
    assert read.workflows.idle_timeout == 90 * clock.MINUTE
    assert read.workflows.grace == 1_500_000
    assert read.workflows.retention == clock.MINUTE
    assert read.workflows.lease == 2 * clock.SECOND


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ('"1MiB"', 2**20),
        ('"2 MB"', 2 * 10**6),
        ('"512kib"', 2**19),
        ("4096", 4096),
        ('"4096"', 4096),
        ('"2048B"', 2048),
    ],
)
def test_sizes_are_text_or_bytes(written: str, count: int) -> None:
    assert shop(f"[workflows]\nmax_value = {written}").workflows.max_value == count


def test_envs_servers_secrets_and_deploy_are_read() -> None:
    read = shop(
        '[envs.production]\nservers = ["web-1"]\n[servers.web-1]\nhost = "deploy@web-1"\n'
        '[secrets]\nrequired = ["STRIPE_KEY", "DB2"]\n[deploy]\nvendor = true\ndata_dir = "~/data"\nkeep_releases = 2'
    )
    assert read.envs == {"production": config.Env(name="production", servers=("web-1",))}
    assert read.servers == {"web-1": config.Server(name="web-1", host="deploy@web-1")}
    assert read.secrets.required == ("STRIPE_KEY", "DB2")
    assert read.deploy == config.Deploy(vendor=True, data_dir="~/data", keep_releases=2, max_size=200 << 20)


def test_variables_of_an_environment_win_over_those_of_all() -> None:
    read = shop('[vars]\nLOG = "info"\nREGION = "eu"\n[vars.production]\nLOG = "warning"\nEXTRA = ""')
    assert read.vars == {"LOG": "info", "REGION": "eu"}
    assert read.variables("production") == {"LOG": "warning", "REGION": "eu", "EXTRA": ""}
    assert read.variables("staging") == {"LOG": "info", "REGION": "eu"}


@pytest.mark.parametrize("url", ["sqlite", "postgres", "postgresql://app@db.internal:5432/shop?sslmode=require"])
def test_a_storage_url_without_a_password_is_kept_as_it_is(url: str) -> None:
    assert shop(f'[storage]\nurl = "{url}"').storage.url == url


@pytest.mark.parametrize("listen", ["127.0.0.1:9000", "localhost:1", "[::1]:65535", "/run/shop/metrics.sock"])
def test_metrics_listen_on_a_loopback_address_or_a_socket(listen: str) -> None:
    assert shop(f'[metrics]\nlisten = "{listen}"').metrics.listen == listen


# --------------------------------------------------------------------------------------------------- which value wins

CHAIN = ["workflows", "workflows.email", "servers.web.workflows", "servers.web.workflows.email"]


@pytest.mark.parametrize("key", config.settings(config.Lane))
@pytest.mark.parametrize("stating", range(2 ** len(CHAIN)))
def test_the_most_particular_table_that_states_a_value_wins(key: str, stating: int) -> None:
    tables = [table for bit, table in enumerate(CHAIN) if stating >> bit & 1]
    text = '[servers.web]\nhost = "web"\n' + "".join(
        f"[{table}]\n{key} = {CHAIN.index(table) + 1}\n" for table in reversed(tables)
    )
    read, setting = shop(text), config.settings(config.Lane)[key]

    def stated_last(of: list[str]) -> object:
        return setting.read(CHAIN.index(of[-1]) + 1) if of else setting.builtin()

    assert getattr(read.group("email", "web"), key) == stated_last(tables)
    assert getattr(read.group("email"), key) == stated_last([one for one in tables if one.startswith("workflows")])
    assert getattr(read.group("other", "web"), key) == stated_last([one for one in tables if "email" not in one])


BOUNDS = {
    "workers": ("0", "1000", "1001"),
    "concurrency": ("1", "10000", "10001"),
    "idle_timeout": ('"0s"', '"365d"', '"366d"'),
    "grace": ("0", '"1h"', "3601"),
    "retention": ("1", '"3650d"', '"3651d"'),
    "signal_retention": ('"1s"', '"3650d"', '"521w4d"'),
    "max_value": ('"1KiB"', '"256MiB"', '"257MiB"'),
    "lease": ('"1s"', "3600", '"1h1s"'),
}


def test_every_number_of_a_group_has_bounds() -> None:
    keys = config.settings(config.Workflows).keys() - {"dir"}
    assert keys == BOUNDS.keys()
    for key, (least, most, more) in BOUNDS.items():
        for written in (least, most):
            assert shop(f"[workflows]\n{key} = {written}").stated["workflows", key].value is not None
        for written in (more, "-1", '"-1s"', "true", '""', "inf"):
            assert str(refused(f"[workflows]\n{key} = {written}")).startswith(
                f"tako.toml:3: workflows.{key}: must be a"
            )


def test_each_field_of_a_group_finds_its_own_table() -> None:
    read = shop(
        '[workflows]\ngrace = "1m"\nconcurrency = 3\n[workflows.email]\nworkers = 1\n[servers.web]\nhost = "web"\n'
        '[servers.web.workflows]\nconcurrency = 7\n[servers.web.workflows.email]\nretention = "1d"'
    )
    assert read.group("email", "web") == config.Group(
        name="email",
        workers=1,
        concurrency=7,
        idle_timeout=5 * clock.MINUTE,
        grace=clock.MINUTE,
        retention=clock.DAY,
    )


def test_a_group_that_the_file_does_not_have_inherits_the_base() -> None:
    group = shop("[workflows]\nworkers = 3").group("reports")
    assert (group.name, group.workers, group.concurrency) == ("reports", 3, 10)


def test_default_is_a_group_that_is_always_there_and_first() -> None:
    assert shop("").group_names() == ("default",)
    text = "[workflows.media]\n[workflows.default]\nworkers = 2\n[workflows.email]\n[servers.web]\nhost = 'web'\n"
    text += "[servers.web.workflows.gpu]\n[servers.web.workflows.media]"
    read = shop(text)
    assert read.group_names() == ("default", "media", "email")
    assert read.group_names("web") == ("default", "media", "email", "gpu")
    assert read.group("default").workers == 2


def test_a_server_that_the_file_does_not_have_is_a_config_error_with_the_nearest() -> None:
    read = shop('[servers.web-1]\nhost = "web"')
    for ask in (read.group_names, lambda name: read.group("email", name), lambda name: read.explain(server=name)):
        with pytest.raises(ConfigError, match="there is no server") as caught:
            ask("web-2")
        assert caught.value.hint == "Did you mean servers.web-1?"


def test_an_environment_that_the_file_does_not_have_is_a_config_error_with_the_nearest() -> None:
    read = shop('[envs.production]\nservers = ["web-1"]\n[servers.web-1]\nhost = "web"\n[vars.staging]\nA = "1"')
    assert read.environments() == ("production", "staging", "development")
    for env in read.environments():
        assert read.explain(env)
    with pytest.raises(ConfigError, match='there is no environment "prodution"') as caught:
        read.explain("prodution")
    assert caught.value.hint == "Did you mean production?"
    with pytest.raises(ConfigError) as caught:
        read.explain("x")
    assert caught.value.hint == "There is: production, staging, development."


def test_a_server_of_another_environment_is_a_config_error_with_those_that_it_has() -> None:
    read = shop(
        '[envs.production]\nservers = ["a", "b"]\n[servers.a]\nhost="a"\n[servers.b]\nhost="b"\n[servers.c]\nhost="c"'
    )
    assert read.explain("production", "b")
    with pytest.raises(ConfigError, match="c is not a server of the environment production") as caught:
        read.explain("production", "c")
    assert caught.value.hint == "It has a, b."


def test_explain_gives_each_value_as_written_and_its_source() -> None:
    read = shop(
        '[workflows]\ngrace = "90s"\n\n[workflows.email]\nworkers = 1\n[vars]\nLOG = "info"\n[vars.production]\n'
        'LOG = "warning"\n[servers.web]\nhost = "web"\n[servers.web.workflows]\nworkers = 4'
    )
    rows = {key: (value, where) for key, value, where in read.explain()}
    assert rows["name"] == ("shop", "tako.toml:1")
    assert rows["workflows.email.grace"] == ("90s", "tako.toml:3 [workflows]")
    assert rows["workflows.email.workers"] == (1, "tako.toml:6 [workflows.email]")
    assert rows["workflows.default.workers"] == (0, "built-in")
    assert rows["workflows.max_value"] == ("1MiB", "built-in")
    assert rows["vars.LOG"] == ("info", "tako.toml:8 [vars]")
    assert rows["servers.web.host"] == ("web", "tako.toml:12 [servers.web]")
    assert "app.port" not in rows

    rows = {key: (value, where) for key, value, where in read.explain("production", "web")}
    assert rows["vars.LOG"] == ("warning", "tako.toml:10 [vars.production]")
    assert rows["workflows.email.workers"] == (4, "tako.toml:14 [servers.web.workflows]")


def test_explain_covers_every_key_of_the_example() -> None:
    explained = {key.split(".")[-1] for key, _, _ in config.load(EXAMPLE).explain("production", "web-1")}
    assert {key for kind in config.TABLES.values() for key in config.settings(kind)} <= explained
