"""tako.toml: how each mistake is told."""

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tables import parse, refused

from tako_runtime import config
from tako_runtime.errors import ConfigError

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
