"""tako secrets"""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tako_cli import output
from tako_cli.commands import AtServer, Json

if TYPE_CHECKING:
    from tako_cli.vault import Vault

app = typer.Typer(no_args_is_help=True, help="Secrets, encrypted to your team's keys.")

Env = Annotated[str, typer.Option("--env", metavar="ENV", help="Whose secrets.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="In UPPER_SNAKE, like STRIPE_KEY.", show_default=False)]


@app.command("set", context_settings={"allow_extra_args": True})  # to say what a value there is
def set_(context: typer.Context, name: Name, env: Env = "development", as_json: Json = False) -> None:
    """Keep a secret.

    Its value is asked for at a terminal, and else it is what stdin has. It goes into .tako/secrets/ENV.age, which the
    keys in ENV.keys open: commit both. The first set makes them, for a key of your own: an SSH key without a
    passphrase, or an age identity that is made then. What tako dev and tako run start has those of development.

    \b
    Examples:
      tako secrets set STRIPE_KEY
      tako secrets set TLS_KEY --env production < key.pem
    """
    from tako_cli.keys import identity_file
    from tako_cli.vault import check_name
    from tako_runtime.errors import InvalidValue

    if context.args or "=" in name:
        raise InvalidValue(
            "a value does not belong on a command line: it is in the shell's history and in the list of processes now",
            hint="It was not kept. Change that secret where it comes from, then: tako secrets set NAME",
        )
    check_name(name)
    vault, had_identity = _vault(env), identity_file().exists()
    replaced = vault.keep(name, _value(name))
    if as_json:
        output.document({"secret": {"name": name, "env": env, "replaced": replaced}})
        return
    output.text(f"{'Replaced' if replaced else 'Set'} {name} in {env}.")
    if not had_identity and identity_file().exists():
        output.note(f"your key is new, in {identity_file()}: keep a copy, for without it nobody could open them")
    _tell(vault)


@app.command("ls")
def ls(env: Env = "development", as_json: Json = False) -> None:
    """List the secrets by name.

    With them are those that tako.toml requires, and whose keys open them. Ends with 1 if a required one is not set.

    \b
    Example:
      tako secrets ls --env production
    """
    from tako_cli import context
    from tako_runtime import store

    vault, config = _vault(env), context.project()
    given = dict.fromkeys(vault.reveal(), "vault")
    if env == context.DEV:
        own = context.own_secrets(store.project_home(config.name, config.root))
        given |= dict.fromkeys(own, "secrets.json")
    required = config.secrets.required
    missing = [name for name in required if name not in given]
    names = sorted({*given, *required})
    if as_json:
        rows = [
            {"name": name, "set": name in given, "required": name in required, "from": given.get(name)}
            for name in names
        ]
        readers = [{"key": one.key, "name": one.name} for one in vault.readers()]
        output.document({"env": env, "secrets": rows, "readers": readers})
    else:
        _show(vault, given, required, names)
        if missing:
            output.note(f"not set, though [secrets] requires it: {', '.join(missing)}")
    if missing:
        raise typer.Exit(1)


@app.command("rm")
def rm(name: Name, env: Env = "development", as_json: Json = False) -> None:
    """Forget a secret.

    Who could read it may still have it, and so has the repository's history: change it where it comes from.

    \b
    Example:
      tako secrets rm STRIPE_KEY --env production
    """
    from tako_cli.vault import check_name

    check_name(name)
    vault = _vault(env)
    vault.remove(name)
    if as_json:
        output.document({"secret": {"name": name, "env": env}})
    else:
        output.text(f"Removed {name} from {env}.")
        _tell(vault)


@app.command("push")
def push(
    env: Annotated[
        str, typer.Option("--env", metavar="ENV", help="Whose secrets, and to which servers.")
    ] = "production",
    server: AtServer = None,
    roll: Annotated[
        bool, typer.Option("--roll/--no-roll", help="Have the workers take them up now, or at their next start.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Put the secrets on the servers.

    They take the place of those that are there. Workers with the old ones claim nothing more and end at their next
    step; their runs go on in new ones, and the app is started anew. tako status says who still has the old ones. Every
    deploy puts them there too.

    \b
    Examples:
      tako secrets push
      tako secrets push --env staging --no-roll
    """
    from tako_cli import afar, context
    from tako_cli.vault import Vault
    from tako_runtime.errors import ConfigError, NotFound, TakoError

    config, names = context.servers(env, server)
    vault = Vault(config.root, env)
    values = vault.reveal()
    if not vault.file.exists():
        raise NotFound(f"no secret is kept for {env} here", hint=f"Keep one: tako secrets set NAME --env {env}")
    if missing := [name for name in config.secrets.required if name not in values]:
        hint = f"Nothing was sent. Set them: tako secrets set {missing[0]} --env {env}"
        raise ConfigError(f"required secrets that are not set for {env}: {', '.join(missing)}", hint=hint)
    rows: list[dict[str, Any]] = []
    for remote in context.remotes_of(config, names):
        try:
            with afar.site(config, env, remote) as site:
                rows.append({"server": remote.name, **site.put_secrets(values, roll), "error": None})
        except TakoError as error:
            if len(names) == 1:
                raise
            said = {"message": str(error), "hint": error.hint, "code": error.code}
            rows.append({"server": remote.name, "changed": [], "told": False, "running": False, "error": said})
    if as_json:
        output.document({"servers": rows})
    else:
        _show_pushed(rows, env)
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


def _show_pushed(rows: "list[dict[str, Any]]", env: str) -> None:
    for row in rows:
        if row["error"]:
            output.error(row["error"]["message"], row["error"]["hint"])
            continue
        what = f"changed {', '.join(row['changed'])}" if row["changed"] else "has them already"
        output.text(f"{row['server']}: {what}")
        if row["told"]:
            output.note(f"who still has the old ones: tako status --env {env}")
        elif row["changed"] and row["running"]:
            output.note(f"what runs there has the old ones until: tako secrets push --env {env}")


@app.command("share")
def share(
    key: Annotated[
        list[str], typer.Argument(metavar="KEY", help="A public key (age1..., ssh-ed25519 ...), or its file.")
    ],
    env: Env = "development",
    as_json: Json = False,
) -> None:
    """Let one more key open them.

    What age can use is its own keys and SSH's of the kinds ed25519 and rsa.

    \b
    Examples:
      tako secrets share ssh-ed25519 AAAAC3Nz... ada@laptop --env production
      tako secrets share ~/ada.pub
    """
    from tako_cli.keys import public_key

    vault, one = _vault(env), public_key(" ".join(key))
    fresh = vault.share(one)
    if as_json:
        output.document({"reader": {"key": one.key, "name": one.name, "env": env, "new": fresh}})
        return
    output.text(f"{one.short} {'can now' if fresh else 'could already'} open the secrets of {env}.")
    _tell(vault, changed=False)


def _vault(env: str) -> "Vault":
    from tako_cli import context
    from tako_cli.vault import Vault

    config = context.project()
    config.check_environment(env)
    return Vault(config.root, env)


def _value(name: str) -> str:
    """From the terminal, without echo, or all of stdin. One line is kept without its end, several as they are."""
    from tako_runtime.errors import InvalidValue

    if sys.stdin.isatty():
        value = output.ask_hidden(f"Value of {name}")
        if value.startswith("-----BEGIN"):
            raise InvalidValue(
                "that has several lines, and a terminal takes one: nothing was kept",
                hint=f"Have it read from its file: tako secrets set {name} < FILE",
            )
        return value
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise InvalidValue(
            "the value is not text in UTF-8, so it was not kept", hint="Encode it in base64 first."
        ) from None
    return text.rstrip("\r\n") if len(text.splitlines()) == 1 else text


def _tell(vault: "Vault", *, changed: bool = True) -> None:
    """What a person has to do now, or will wonder about."""
    from tako_cli import context
    from tako_cli.vault import kept_out_of_git
    from tako_runtime import store
    from tako_runtime.feed import supervising

    home = store.project_home(context.project().name, vault.root)
    if changed and vault.env == context.DEV and supervising(home.app_dir) is not None:
        output.note("what runs here has the old ones: stop tako dev, and start it again")
    if changed and vault.env in context.project().envs:
        output.note(f"its servers get that with the next deploy, or now: tako secrets push --env {vault.env}")
    if ignored := kept_out_of_git(vault):
        names = ", ".join(str(path.relative_to(vault.root)) for path in ignored)
        output.note(
            f"git ignores {names}: encrypted, they are meant to be committed. In .gitignore, in place of .tako/:\n"
            "  .tako/*\n  !.tako/secrets/\n  .tako/secrets/*\n  !.tako/secrets/*.age\n  !.tako/secrets/*.keys"
        )


def _show(vault: "Vault", given: dict[str, str], required: tuple[str, ...], names: list[str]) -> None:
    if names:
        rows = [
            [
                output.styled(name, "bold"),
                "required" if name in required else "",
                given.get(name, output.styled("not set", "red")),
            ]
            for name in names
        ]
        output.show(*output.table(["NAME", "", "FROM"], rows))
    else:
        output.note(f"there are no secrets of {vault.env} yet: tako secrets set NAME --env {vault.env}")
    if readers := vault.readers():
        output.note(f"opened by the keys of {', '.join(one.short for one in readers)}")
