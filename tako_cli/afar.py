"""An app on a server, as if it were here: what the current release there answers, over SSH.

No command knows where it works: it asks for a `Site`, and gets one that is here or `Afar`. There, the release's own
runtime opens the app's store as the app's own user, and answers one request after the other (`tako_runtime/site.py`).
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, cast

from tako_cli.deploy.facts import slug
from tako_cli.remote import CommandFailed, Done, Remote
from tako_runtime.config import Config
from tako_runtime.errors import NotFound, Refused, TakoError
from tako_runtime.feed import Event
from tako_runtime.site import OPERATIONS, Site, answered, asked

#: Where the app is on the server, from the words SLUG APP ENV DATA; `deploy/asked.py` knows the same places.
FIND = """
slug=$1 app=$2 env=$3 data=$4; shift 4
if [ "$(id -u)" = 0 ]; then
    share=/opt/tako; own=/var/lib/tako; account=tako
else
    share=$HOME/.local/share/tako; own=$share; account=
fi
case $data in
    "") data=$own ;;
    "~/"*) data=$HOME/${data#"~/"} ;;
esac
data=$data/$env base=$share/$slug
as_account() {
    if [ -n "$account" ] && id -u "$account" >/dev/null 2>&1; then runuser -u "$account" -- "$@"; else "$@"; fi
}
"""

#: Goes there and carries the words out as the app's user, with its environment.
_THERE = (
    FIND
    + """
cd -P "$base/current" 2>/dev/null || exit 66
[ -x .venv/bin/python ] || exit 67
export TAKO_APP_NAME="$app" TAKO_DATA_DIR="$data" TAKO_ENV="$env" TAKO_RELEASE="$(basename "$(pwd -P)")"
as_account "$@"
"""
)
NO_APP, NO_RUNTIME = 66, 67

#: What a person is told to type next, and that goes for the server too.
_NEXT = re.compile(r"\btako (status|(?:runs|cron|signals|workflows) [a-z]+)")


def there(config: Config, env: str, words: Sequence[str]) -> list[str]:
    """The command on a server of that environment that carries `words` out where the app is, as the app does."""
    place = [slug(config, env), config.name, env, config.deploy.data_dir or ""]
    return ["sh", "-c", _THERE, "there", *place, *words]


def runtime(*words: str) -> list[str]:
    """The release's own runtime. Its folder is no place to import from."""
    return [".venv/bin/python", "-P", "-m", "tako_runtime", *words]


@contextlib.contextmanager
def site(config: Config, env: str, remote: Remote) -> Iterator[Site]:
    """The app on that server. Raises `Unreachable`; `NotFound` where it is not there."""
    remote.connect()
    one = Afar(config, env, remote)
    try:
        yield cast(Site, one)
    finally:
        one.close()


def explained(config: Config, env: str, remote: Remote, done: Done) -> TakoError:
    """Why a command that was to be carried out where the app is was not."""
    if done.code == NO_APP:
        return NotFound(
            f"{remote.name}: {config.name} is not deployed there", hint=f"Deploy it: tako deploy --env {env}"
        )
    if done.code == NO_RUNTIME:
        return Refused(
            f"{remote.name}: the release that is current there has no runtime any more",
            hint=f"Deploy it anew: tako deploy --env {env}",
        )
    if done.code == 2 and ("invalid choice" in done.err or "unrecognized arguments" in done.err):
        return Refused(
            f"{remote.name}: the release there has an older tako, which cannot do that",
            hint=f"Deploy with the tako of here: tako deploy --env {env}",
        )
    return CommandFailed(remote.name, ["tako_runtime"], done)


class Afar:
    """Everything that a `Site` can do, and that may be asked over a pipe."""

    development = False

    def __init__(self, config: Config, env: str, remote: Remote) -> None:
        self._config, self._env, self._remote = config, env, remote
        self.where, self.at = f"on {remote.name}", f" --env {env}"
        self._process = remote.held_open(there(config, env, runtime("operate", "--server", remote.name)))

    def __getattr__(self, name: str) -> Any:
        if name not in OPERATIONS:
            raise AttributeError(name)
        return lambda *given, **named: self._ask(name, asked(name, given, named))

    async def tail(self, run: str | None = None) -> AsyncIterator[Event]:
        """Events as they come, until their end; what is asked after that is not answered."""
        self._send(asked("tail", (run,), {}))
        try:
            while (event := await asyncio.to_thread(self._answer, "tail")) is not None:
                yield event
        finally:
            self._process.kill()  # or a thread would wait for its next line

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _ask(self, name: str, line: bytes) -> Any:
        self._send(line)
        return self._answer(name)

    def _send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _answer(self, name: str) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._broken(line)
        try:
            return answered(name, line)
        except TakoError as error:
            error.hint = _NEXT.sub(rf"\g<0>{self.at}", error.hint)
            raise

    def _broken(self, said: bytes) -> TakoError:
        assert self._process.stderr is not None
        err = self._process.stderr.read().decode(errors="replace")
        done = Done(self._process.wait(), said.decode(errors="replace"), err)
        self._remote.examine(done.code, err)
        return explained(self._config, self._env, self._remote, done)
