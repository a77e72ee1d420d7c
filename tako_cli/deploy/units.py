"""The units of systemd that an app has on a server, as text. They are valid for systemd 249.

tako-<slug>@<id>.service    one for each release: the supervisor, its workers and the app
tako-<slug>.socket          where [app] takes a socket: it outlives the releases, so nobody is turned away
tako-<slug>.service         what that socket is formally for: it does nothing, and stays, so that no connection ever
                            makes systemd start anything
"""

from collections.abc import Mapping

from tako_cli.deploy.facts import Place
from tako_runtime import clock
from tako_runtime.config import Config
from tako_runtime.port import HOST
from tako_runtime.rollover import NOT_TAKEN

#: What a service of the whole system's may not do. Those of a user's manager cannot be kept from most of it.
_SANDBOX = """
User={account}
Group={account}
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectHostname=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
ReadWritePaths={data} {shared}
"""

_RELEASE = """\
[Unit]
Description={app} ({env}), release {release}
After=network.target
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecCondition=/bin/sh -c {condition}
ExecStart={python} -m tako_runtime serve --env {env} --server {server} --on-trial {trial}
WorkingDirectory={folder}
{environment}
{sockets}Restart=on-failure
RestartSec=1
RestartPreventExitStatus={not_taken}
WatchdogSec=60
TimeoutStartSec=600
TimeoutStopSec={stop}
KillMode=mixed
OOMPolicy=continue
LimitNOFILE=65536
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
{sandbox}
[Install]
WantedBy={target}
"""

#: A socket is blocking or not for everybody who has it: were it made blocking at the start of a release, the app of the
#: one before, which has it too, would wait for its next connection and answer nobody meanwhile.
_TAKES = """\
Sockets={unit}.socket
NonBlocking=yes
"""

_SOCKET = """\
[Unit]
Description=Where {app} ({env}) listens, whatever release runs

[Socket]
ListenStream={host}:{port}
Service={unit}.service
Backlog=4096
NoDelay=yes

[Install]
WantedBy=sockets.target
"""

_HOLDER = """\
[Unit]
Description=What the socket of {app} ({env}) is for; the releases take it over

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
"""


def units(config: Config, server: str, place: Place, release: str) -> Mapping[str, str]:
    """The text of each unit, by its name."""
    names = config.group_names(server)
    grace = max([config.workflows.grace, *(config.group(name, server).grace for name in names)])
    takes_socket = config.app is not None and any("{fd}" in word for word in config.app.command)
    environment = {
        "TAKO_APP_NAME": place.app, "TAKO_DATA_DIR": place.data_dir, "TAKO_ENV": place.env, "TAKO_RELEASE": release,
    }  # fmt: skip
    # A socket whose path is too long lies in /tmp, where other processes have to find it: so /tmp is not private.
    sandbox = _SANDBOX.format(account=place.account, data=_path(place.data_dir), shared=_path(f"{place.base}/shared"))
    files = {
        f"{place.unit}@{release}.service": _RELEASE.format(
            app=place.app, env=place.env, release=release, server=server, condition=_condition(place, release),
            python=_path(f"{place.release(release)}/.venv/bin/python"), trial=_path(place.trial),
            folder=_escaped(place.release(release)),
            environment="\n".join(f"Environment={_quoted(f'{name}={value}')}" for name, value in environment.items()),
            sockets=_TAKES.format(unit=place.unit) if takes_socket else "", not_taken=NOT_TAKEN,
            stop=grace // clock.SECOND + 30, sandbox="" if place.user else sandbox.lstrip(),
            target="default.target" if place.user else "multi-user.target",
        )
    }  # fmt: skip
    if takes_socket:
        assert config.app is not None
        told = {"app": place.app, "env": place.env, "unit": place.unit}
        files[f"{place.unit}.socket"] = _SOCKET.format(**told, host=HOST, port=config.app.port)
        files[f"{place.unit}.service"] = _HOLDER.format(**told)
    return files


def _condition(place: Place, release: str) -> str:
    """Whether the release is the current one, or on trial."""
    current = f'test "$(readlink "{place.base}/current")" = "releases/{release}"'
    trial = f'test "$(cat "{place.trial}" 2>/dev/null)" = "{release}"'
    return _quoted(f"{current} || {trial}".replace("$", "$$"))


def _quoted(text: str) -> str:
    """One word of a unit, as systemd.syntax(7) has it."""
    return '"' + _escaped(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _path(path: str) -> str:
    return _quoted(path) if any(c in path for c in " \t\"'\\") else _escaped(path)
