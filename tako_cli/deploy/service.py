"""An app's units on a server as a whole: stop, start, restart, take it all down. One command there for each, which goes
on though nobody listens any more."""

from collections.abc import Sequence

from tako_cli.afar import FIND
from tako_cli.deploy.facts import slug
from tako_runtime.config import Config

#: What it ends with where somebody deploys right now; it has printed who.
LOCKED = 65

#: What is stopped stays so over a boot. The socket goes last: until then, connections wait. Nothing is removed before
#: the store's copy is there.
_SCRIPT = (
    """
set -e; umask 077; trap '' HUP PIPE
verb=$1 copy=$2; shift 2
"""
    + FIND
    + """
if [ -n "$account" ]; then
    units=/etc/systemd/system
    manager() { systemctl "$@"; }
else
    units=$HOME/.config/systemd/user
    export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/run/user/$(id -u)}"
    manager() { systemctl --user "$@"; }
fi
[ -L "$base/current" ] || exit 66
if command -v flock >/dev/null; then  # no deploy meanwhile
    exec 9>>"$base/deploy.lock"
    flock -n 9 || { cat "$base/deploy.lock"; exit 65; }
fi
release=$(basename "$(readlink "$base/current")")
unit=tako-$slug; service=$unit@$release.service; socket=$unit.socket

stop() {
    manager disable --quiet "$service" || true
    manager stop "$unit@*.service"
    if [ -f "$units/$socket" ]; then
        manager disable --quiet "$socket" || true
        manager stop "$socket" "$unit.service"
    fi
}

case $verb in
    stop) stop ;;
    start)
        if [ -f "$units/$socket" ]; then manager enable --quiet --now "$socket"; fi
        manager enable --quiet "$service"
        manager start "$service"
        ;;
    restart) manager restart "$service" ;;
    remove)
        stop
        if [ "$copy" = yes ] && [ -f "$data/apps/$app/runs.db" ]; then
            kept=$data/kept/$app-$(date -u +%Y%m%d-%H%M%S).db
            mkdir -p "$data/kept"
            cd -P "$base/current"
            # the file, also where it is only beside a shared store
            export TAKO_APP_NAME="$app" TAKO_DATA_DIR="$data" TAKO_STORAGE=sqlite
            as_account .venv/bin/python -P -m tako_runtime backup > "$kept"
            sync "$kept"
            echo "kept $kept"
        fi
        cd /
        rm -f "$units/$unit@"*.service "$units/$socket" "$units/$unit.service"
        manager daemon-reload
        manager reset-failed "$unit@*.service" 2>/dev/null || true
        rm -rf "$base" "$data/apps/$app"
        ;;
esac
echo "release $release"
echo "state $(manager is-active "$service" || true)"
"""
)


def words(config: Config, env: str, verb: str, *, copy: bool = True) -> Sequence[str]:
    """The command that does so. It prints `release ID`, `state WORD` and, of what was kept, `kept FILE`."""
    place = [slug(config, env), config.name, env, config.deploy.data_dir or ""]
    return ["sh", "-c", _SCRIPT, "service", verb, "yes" if copy else "no", *place]


def read(said: str) -> dict[str, str]:
    """What it has printed."""
    return dict(line.split(" ", 1) for line in said.splitlines() if " " in line)
