"""tako.toml: what it says, which value wins, and how each mistake is told."""

import string
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tako_runtime import clock, config
from tako_runtime.errors import ConfigError

EXAMPLE = Path(config.__file__).with_name("example.toml")


def parse(text: str) -> config.Config:
    return config.parse(text.encode(), Path("tako.toml"))


def shop(text: str) -> config.Config:
    """A file with a name on line 1 and this text from line 2."""
    return parse('name = "shop"\n' + text)


def refused(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        shop(text)
    return caught.value


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


# -------------------------------------------------------------------------------------------- how each mistake is told


def test_an_unknown_key_names_its_line_and_the_nearest_known_key() -> None:
    error = refused("[workflows]\n\n# more of them\nconcurency = 4")
    assert str(error) == "tako.toml:5: workflows.concurency: unknown key"
    assert error.hint == "Did you mean workflows.concurrency?"


def test_an_unknown_table_names_the_nearest_known_one() -> None:
    error = refused("[metric]\nlisten = '127.0.0.1:1'")
    assert str(error) == "tako.toml:2: metric: unknown key"
    assert error.hint == "Did you mean metrics?"


def test_a_known_key_in_the_wrong_table_is_sent_to_the_right_one() -> None:
    assert refused("[workflows.email]\nlease = '5s'").hint == "Did you mean workflows.lease?"
    assert refused("port = 80").hint == "Did you mean app.port?"


def test_an_unknown_key_that_resembles_nothing_is_told_what_there_is() -> None:
    assert refused("[metrics]\nxyz = 1").hint == "In metrics go: listen."


def test_all_mistakes_of_a_file_are_told_at_once_in_the_order_of_the_lines() -> None:
    error = refused('[workflows]\nworkers = "4"\n[app]\nport = 0\n[envs.production]\nservers = ["web"]')
    assert str(error).splitlines() == [
        'tako.toml:3: workflows.workers: must be a whole number from 0 to 1000, not "4"',
        "tako.toml:4: app.command: is missing",
        "tako.toml:5: app.port: must be a whole number from 1 to 65535, not 0",
        'tako.toml:7: envs.production.servers: there is no server "web"',
    ]


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("[workflows.email]\nworkers = -1", 3, "workflows.email.workers"),
        ("[ workflows . 'email' ]\n'workers' = -1", 3, "workflows.email.workers"),
        ("[workflows]\nemail.workers = -1", 3, "workflows.email.workers"),
        ('workflows."email"."workers" = -1', 2, "workflows.email.workers"),
        ("workflows = { email = { workers = -1 } }", 2, "workflows.email.workers"),
        ("[vars]\nA = '''\n[workflows]\nworkers = 1\n'''\n[workflows]\nworkers = -1", 8, "workflows.workers"),
        ('[vars]\nA = """\nx = "\n\\""""\n[workflows]\nworkers = -1', 7, "workflows.workers"),
        ("[app]\ncommand = [\n  'a', # ]\n  'b',\n]\nport = -1", 7, "app.port"),
        ("[vars]\r\nA = 'b'\r\n[workflows]\r\nworkers = -1\r\n", 5, "workflows.workers"),
        ("[vars]\n'a b' = 'c'", 3, 'vars."a b"'),
        ("[vars]\n'a\"b' = 'c'", 3, 'vars."a\\"b"'),
        (
            "[servers.web]\n[servers.web.workflows.email]\ngrace = '2d'\n[servers.db]\nhost = 'db'",
            2,
            "servers.web.host",
        ),
    ],
)
def test_a_mistake_names_its_line_however_the_key_is_written(text: str, line: int, key: str) -> None:
    assert str(refused(text)).startswith(f"tako.toml:{line}: {key}: ") or f"\ntako.toml:{line}: {key}: " in str(
        refused(text)
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[workflows]\nworkers = true", "workflows.workers: must be a whole number from 0 to 1000, not true"),
        ("[workflows]\nworkers = 1001", "not 1001"),
        ("[workflows]\nworkers = 1.0", "not 1.0"),
        ("[workflows]\nconcurrency = 0", "from 1 to 10000, not 0"),
        ("[workflows]\ngrace = '1 year'", 'must be a duration from 0s to 1h, not "1 year"'),
        ("[workflows]\ngrace = true", "not true"),
        ("[workflows]\ngrace = nan", "not NaN"),
        ("[workflows]\ngrace = 07:32:00", 'not "07:32:00"'),
        ("[workflows]\ngrace = '-1s'", 'not "-1s"'),
        ("[workflows]\nlease = '999ms'", "must be a duration from 1s to 1h"),
        ("[workflows]\nmax_value = '1 potato'", 'not "1 potato"'),
        ("[workflows]\nmax_value = 10", "must be a size from 1KiB to 256MiB"),
        ("[workflows]\nmax_value = true", "not true"),
        (
            "[workflows]\ndir = '../other'",
            "must be a folder inside the project, relative to it, without '..', not \"../",
        ),
        ("[workflows]\ndir = '/srv'", 'not "/srv"'),
        ("[workflows]\ndir = '.'", 'not "."'),
        ("[workflows.Email]\n", "workflows.Email: the key must be a name: a-z, 0-9 and"),
        ("[workflows.workers]\ngrace = 1", "workflows.workers: must be a whole number from 0 to 1000, not a table"),
        ("[servers.web]\nhost='a'\n[servers.web.workflows.lease]\n", "servers.web.workflows.lease: unknown key"),
        ("[servers.web]\nhost='a'\n[servers.web.workflows]\ndir = 'x'", "servers.web.workflows.dir: unknown key"),
        ("[app]\ncommand = 'uvicorn app:app'", 'must be a list of words, the program first, not "uvicorn app:app"'),
        ("[app]\ncommand = []", "not []"),
        ("[app]\ncommand = ['']", 'not [""]'),
        ("[app]\ncommand = ['a', 1]", 'not ["a", 1]'),
        ("[app]\ncommand = ['a']\nhealth = 'healthz'", 'must be a path that starts with /, not "healthz"'),
        ("[vars]\nPORT = 80", "vars.PORT: must be text, not 80"),
        ("[vars]\n'A-B' = 'x'", 'vars.A-B: the key must be a name that an environment variable can have, not "A-B"'),
        ("[vars.production.deeper]\nA = 'x'", "vars.production.deeper: must be text, not a table"),
        ('[vars]\nA = "\\u0000"', "vars.A: must be text"),
        ("[envs.production]", "envs.production.servers: is missing"),
        ("[envs.production]\nservers = []", "must be a list of server names, each once, at least one, not []"),
        ("[servers.a]\nhost='a'\n[envs.x]\nservers = ['a', 'a']", 'not ["a", "a"]'),
        ("[servers.web]", "servers.web.host: is missing"),
        ("[servers.web]\nhost = '-oProxyCommand=x'", "must be a host that ssh understands"),
        ("[servers.web]\nhost = 'a b'", 'not "a b"'),
        ("[servers]\nweb = 'deploy@web'", 'servers.web: must be a table, not "deploy@web"'),
        ("[[servers]]\nhost = 'x'", "servers: must be a table, not [{"),
        ("workflows = 3", "workflows: must be a table, not 3"),
        ("[secrets]\nrequired = ['stripe']", 'must be a list of names in UPPER_SNAKE, each once, not ["stripe"]'),
        ("[deploy]\nvendor = 'yes'", 'must be true or false, not "yes"'),
        ("[deploy]\ndata_dir = 'data'", "must be a path that starts with / or ~/"),
        ("[deploy]\nkeep_releases = 0", "must be a whole number from 1 to 100"),
        ("[metrics]\nlisten = '0.0.0.0:9000'", "must be a loopback address"),
        ("[metrics]\nlisten = '127.0.0.1:0'", "must be a loopback address"),
        ("[metrics]\nlisten = ':9000'", "must be a loopback address"),
        ("[metrics]\nlisten = 'run/x.sock'", "must be a loopback address"),
        (f"[metrics]\nlisten = '/{'x' * 100}'", "must be a loopback address"),
        ("[storage]\nurl = 'mysql://db'", 'must be "sqlite", "postgres", or a postgresql:// url'),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_with_what_is_wrong(text: str, says: str) -> None:
    assert says in str(refused(text))


@pytest.mark.parametrize("name", ["Shop", "1shop", "shop-", "-shop", "sh_op", "", "s" * 64, "shop\n", "é"])
def test_a_name_outside_the_pattern_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^tako\.toml:1: name: must be a name"):
        parse(f"name = {config.json.dumps(name)}")


@pytest.mark.parametrize("name", ["s", "s1", "a-b", "s" * 63])
def test_a_name_inside_the_pattern_is_kept(name: str) -> None:
    assert parse(f'name = "{name}"').name == name


def test_a_file_without_a_name_is_told_so() -> None:
    with pytest.raises(ConfigError, match=r"^tako\.toml:1: name: is missing$"):
        parse("")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://app:hunter2@db/shop",
        "postgresql://app:hunt?er2@db/shop",
        "postgresql://app:hunt#er2@db/shop",
        "postgresql://app@db/shop?password=hunter2",
        "postgresql://app@db/shop?a=b&%70assword=hunter2",
        "postgres://app:hunter2@db/shop",
    ],
)
def test_a_password_in_the_storage_url_is_sent_to_the_secret_and_never_repeated(url: str) -> None:
    error = refused(f'[storage]\nurl = "{url}"')
    assert str(error).startswith("tako.toml:3: storage.url: must not hold a password")
    assert "DATABASE_URL" in error.hint
    assert "er2" not in f"{error} {error.hint}"


def test_a_server_of_an_environment_must_exist() -> None:
    error = refused("[servers.web-1]\nhost = 'a'\n[envs.production]\nservers = ['web-1', 'web1']")
    assert str(error) == 'tako.toml:5: envs.production.servers: there is no server "web1"'
    assert error.hint == "Did you mean servers.web-1?"


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b'name = "shop"\nport = \n', 2),
        (b'name = "shop"\n\n[workflows', 3),
        (b'name = "shop"\nname = "again"\n', 2),
        (b'name = "shop"\n# \xff\n', 2),
        (b"name = 'shop'\nx = " + b"[" * 100_000, 2),
        (b"name = 'shop'\nx = " + b"9" * 5_000, 2),
    ],
)
def test_what_is_not_toml_is_a_config_error_with_its_line(data: bytes, line: int) -> None:
    with pytest.raises(ConfigError, match=f"^tako.toml:{line}: not valid TOML: "):
        config.parse(data, Path("tako.toml"))


def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tako\.toml: cannot be read: No such file"):
        config.load(tmp_path / "tako.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path)


# ----------------------------------------------------------------------------------------------------------- finding it


def test_the_nearest_file_upwards_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "shop" / "workflows" / "email"
    inner.mkdir(parents=True)
    (tmp_path / "tako.toml").write_text("")
    assert config.find(inner) == tmp_path / "tako.toml"
    (tmp_path / "shop" / "tako.toml").write_text("")
    assert config.find(inner) == tmp_path / "shop" / "tako.toml"
    (inner / "tako.toml").mkdir()
    monkeypatch.chdir(inner)
    assert config.find() == tmp_path / "shop" / "tako.toml"


def test_no_file_upwards_is_none() -> None:
    assert config.find(Path("/")) is None


# ----------------------------------------------------------------------------------------- nothing else is ever raised

WORDS = sorted(
    {key for kind in config.TABLES.values() for key in config.settings(kind)}
    | {key for table in config.TABLES for key in table}
    | {"web-1", "email", "LOG", "*", "", "a b", "é", "deep"}
)
values = st.recursive(
    st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(string.printable + "é\u2028")
    | st.sampled_from(["5m", "1MiB", "/x", "postgresql://a:b@c", "127.0.0.1:99999", "1e9d", "9" * 400 + "d", "::"])
    | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=25,
)


def toml(value: Any) -> str:
    """The value as TOML, tables inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{config.json.dumps(key)} = {toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return config.json.dumps(value).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(value)
    return str(value)


def parses_or_is_refused(data: bytes) -> None:
    try:
        read = config.parse(data, Path("tako.toml"))
    except ConfigError as error:
        rows = data.count(b"\n") + 1
        for row in str(error).split("\n"):
            assert row.startswith("tako.toml:"), row
            assert 1 <= int(row.split(":")[1]) <= rows
    else:
        for env in (None, *read.environments()):
            for server in (None, *(read.envs[env].servers if env in read.envs else read.servers)):
                assert read.explain(env, server)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(WORDS), values, max_size=6))
@example(
    {
        "workflows": {"workers": {}, "email": {"lease": 1}},
        "servers": {"NAME": {}, "a": 1},
        "envs": {"x": {"servers": 3}},
    }
)
@example({"name": "shop", "vars": {"NAME": {"NAME": {}}, "x": {"x": "y"}}, "": {"": 1}})
def test_any_tables_and_values_are_read_or_refused_with_a_config_error(document: dict[str, Any]) -> None:
    parses_or_is_refused("\n".join(f"{config.json.dumps(key)} = {toml(one)}" for key, one in document.items()).encode())


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(WORDS), min_size=1, max_size=5), st.dictionaries(st.sampled_from(WORDS), values)
        ),
        max_size=4,
    )
)
def test_any_headers_are_read_or_refused_with_a_config_error(tables: list[tuple[list[str], dict[str, Any]]]) -> None:
    rows = ['name = "shop"']
    for path, keys in tables:
        rows.append("[" + ".".join(map(config.json.dumps, path)) + "]")
        rows += [f"{config.json.dumps(key)} = {toml(one)}" for key, one in keys.items()]
    parses_or_is_refused("\n".join(rows).encode())


@settings(deadline=None)
@given(st.text(st.sampled_from("ab.=[]{}\"'\\#,\n\r 1-"), max_size=60) | st.binary(max_size=60))
@example("[" + "a." * 3000 + "a]\n" + "b." * 3000 + "b = 1")
@example("x = 0x" + "f" * 20_000)
@example("workflows.workers = 0x" + "f" * 20_000 + "\nworkflows.grace = 0x" + "f" * 20_000)
@example("app.command = [0x" + "f" * 20_000 + "]")
def test_any_text_is_read_or_refused_with_a_config_error(text: str | bytes) -> None:
    parses_or_is_refused(text if isinstance(text, bytes) else text.encode())
