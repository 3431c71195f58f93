"""The command line: ``isthmus-bridge serve | check | doctor | status | end | sudoers | schema | certs``."""

import argparse
import datetime as dt
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__, logs
from .admin import certificates, check, doctor, orders, strict_modes
from .policy.fields import USER_NAME
from .policy.policy import Policy, PolicyError, load, schema
from .pools import status_file
from .pools.journal import JournalError
from .server import ServerError, serve
from .slurm.environment import user_name
from .users.doctor import changeable, code_paths
from .users.sudoers import RuleError, fragment
from .users.user_checks import local_users, require

log = logging.getLogger(__name__)

# What follows isthmus://operator/ in a certificate.
_CLUSTER = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


# The bridge looks for orders once a second.
_ORDER_PATIENCE = 15.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0 well, 1 not, 2 wrong usage or policy."""
    options = _parser().parse_args(argv)
    try:
        return int(options.command(options))
    except PolicyError as error:
        return _complain(str(error), 2)
    except (ServerError, JournalError) as error:
        return _complain(str(error), 1)


def _serve(options: argparse.Namespace) -> int:
    logs.set_up(options.log_level)

    def reread() -> Policy:
        policy = require(_policy(options))
        for line in strict_modes.require(policy, options.policy):
            log.warning("%s", line)
        return policy

    serve(reread(), reread)
    return 0


def _policy(options: argparse.Namespace) -> Policy:
    """The policy file, with what the command line says instead."""
    policy = load(options.policy)
    _one_proxy(options)
    changes: dict[str, object] = {}
    if options.listen:
        changes["listen"] = options.listen
    if options.metrics_listen:
        changes["metrics_listen"] = None if options.metrics_listen == "off" else options.metrics_listen
    if options.connect:
        changes |= _dialling(options.connect, options.proxy)
    if changes:
        # Checked again as a whole: an address from the command line obeys the policy's rules.
        policy = _changed(policy, changes)
    return policy


def _one_proxy(options: argparse.Namespace) -> None:
    if options.proxy and not options.connect:
        raise PolicyError("--proxy goes with --connect; for the policy's gateways it stands there (gateways[].proxy)")


def _dialling(addresses: Sequence[str], proxy: str | None) -> dict[str, object]:
    return {"gateways": [{"address": address, "proxy": proxy} for address in addresses]}


def _changed(policy: Policy, changes: dict[str, object]) -> Policy:
    from .policy.policy import parse

    return parse({**policy.model_dump(mode="json", exclude_unset=True), **changes})


def _check(options: argparse.Namespace) -> int:
    policy = load(options.policy)
    good = True
    for line in check.explain(policy, options.identity):
        print(line)
    found = list(strict_modes.examine(policy, options.policy))
    for warning in (one.line for one in found if not one.grave):
        print(f"warning: {warning}")
    grave = (one.line for one in found if one.grave)
    for problem in (*grave, *check.problems(policy), *check.readable(policy, options.policy)):
        good = False
        print(f"problem: {problem}")
    if good:
        print("no problems found")
    return 0 if good else 1


def _doctor(options: argparse.Namespace) -> int:
    good = True
    policy = load(options.policy)
    _one_proxy(options)
    if options.connect:
        policy = _changed(policy, _dialling(options.connect, options.proxy))
    for well, line in doctor.examine(policy):
        good = good and well is not False
        print(f"{'PROBLEM' if well is False else 'ok     ' if well else 'note   '}  {line}")
    return 0 if good else 1


def _status(options: argparse.Namespace) -> int:
    try:
        for line in status_file.show(load(options.policy).status_path):
            print(line)
    except status_file.StatusError as error:
        return _complain(str(error), 1)
    return 0


def _end(options: argparse.Namespace) -> int:
    policy = load(options.policy)
    try:
        ended = orders.end_all(policy.journal_path, options.identity, options.reason, _ORDER_PATIENCE)
    except orders.OrderError as error:
        return _complain(str(error), 1)
    for key in ended:
        print(key)
    print(f"{len(ended)} pools of {options.identity} are being ended")
    return 0


def _sudoers(options: argparse.Namespace) -> int:
    policy = load(options.policy)
    bridge = options.bridge_user or user_name({})
    if bridge == "root" or USER_NAME.fullmatch(bridge) is None:
        return _complain(f"--bridge-user: {bridge!r} is no ordinary user; name the one who runs the bridge", 2)
    if not (users := local_users(policy)):
        return _complain(f"{options.policy}: no identity names a local user: nothing needs sudo", 1)
    try:
        lines = list(fragment(policy, bridge, users))
    except RuleError as error:
        return _complain(str(error), 1)
    if path := changeable(code_paths()):
        _complain(f"warning: others than root may change {path}, and with it what these lines let {bridge} run", 0)
    print("\n".join(lines))
    return 0


def _schema(options: argparse.Namespace) -> int:
    print(schema(), end="")
    return 0


def _certs(options: argparse.Namespace) -> int:
    for cluster in options.operator:
        if _CLUSTER.fullmatch(cluster) is None:
            return _complain(f"--operator: {cluster!r} is no name of a cluster", 2)
    if not 1 <= options.days <= certificates.CA_DAYS:
        return _complain(f"--days: {options.days} is not from 1 to {certificates.CA_DAYS}, which the CA lasts", 2)
    if not (options.host or options.operator or options.only_this_ca):
        return _complain("give --host, --operator or both", 2)
    if options.new_ca and options.host:
        return _complain("--new-ca goes without --host: operators cannot check the bridge's new certificate yet", 2)
    try:
        for line in certificates.make(
            options.dir, options.host, options.operator, dt.timedelta(days=options.days),
            new_ca=options.new_ca, only_this_ca=options.only_this_ca,
        ):  # fmt: skip
            print(line)
    except (OSError, ValueError) as error:
        return _complain(f"{options.dir}: {error}", 1)
    return 0


def _complain(message: str, code: int) -> int:
    print(f"isthmus-bridge: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="isthmus-bridge", description="Isthmus at an HPC site.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("serve", help="take requests and submit jobs")
    one.add_argument("--policy", type=Path, required=True, metavar="FILE", help="the site's policy (YAML)")
    one.add_argument("--listen", metavar="HOST:PORT", help="instead of the policy's")
    one.add_argument("--connect", action="append", default=[], metavar="HOST:PORT",
                     help="dial this operator's gateway, and listen nowhere unless told to; repeatable; instead of the"
                          " policy's gateways")  # fmt: skip
    one.add_argument("--proxy", metavar="URL", help="the HTTP proxy that leads to the gateways of --connect,"
                     " http://HOST:PORT (default: what https_proxy says)")  # fmt: skip
    one.add_argument("--metrics-listen", metavar="HOST:PORT", help="instead of the policy's; `off`: none")
    one.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    one.set_defaults(command=_serve)

    one = commands.add_parser("check", help="check a policy, and tell what identities may do under it")
    one.add_argument("--policy", type=Path, required=True, metavar="FILE", help="the site's policy (YAML)")
    one.add_argument("--identity", metavar="URI", help="this one only, e.g. isthmus://operator/prod")
    one.set_defaults(command=_check)

    one = commands.add_parser("doctor", help="look whether Slurm and the gateways can be used from here")
    one.add_argument("--policy", type=Path, required=True, metavar="FILE", help="the site's policy (YAML)")
    one.add_argument("--connect", action="append", default=[], metavar="HOST:PORT",
                     help="look at this gateway instead of the policy's; repeatable")  # fmt: skip
    one.add_argument("--proxy", metavar="URL", help="the HTTP proxy that leads to the gateways of --connect")
    one.set_defaults(command=_doctor)

    one = commands.add_parser("status", help="the live pools, as the running bridge sees them")
    one.add_argument("--policy", type=Path, required=True, metavar="FILE", help="the site's policy (YAML)")
    one.set_defaults(command=_status)

    one = commands.add_parser("end", help="have the running bridge end all live pools of one caller")
    one.add_argument("--policy", type=Path, required=True, metavar="FILE", help="the site's policy (YAML)")
    one.add_argument("--identity", required=True, metavar="URI", help="the caller, e.g. isthmus://operator/prod")
    one.add_argument("--reason", required=True, metavar="TEXT", help="why; the caller's users read it")
    one.set_defaults(command=_end)

    one = commands.add_parser("sudoers", help="print the sudo rule by which the bridge may become its local users")
    one.add_argument("--policy", type=Path, required=True, metavar="FILE", help="the site's policy (YAML)")
    one.add_argument("--bridge-user", metavar="NAME", help="who runs the bridge (default: whoever runs this)")
    one.set_defaults(command=_sudoers)

    one = commands.add_parser("schema", help="print the policy's JSON schema, for editors and checks")
    one.set_defaults(command=_schema)

    one = commands.add_parser("certs", help="make the site's CA and certificates; again: add to them, or renew")
    one.add_argument("--dir", type=Path, required=True, help="where to write them")
    one.add_argument("--host", action="append", default=[], metavar="NAME", help="name or address of the bridge")
    one.add_argument("--operator", action="append", default=[], metavar="CLUSTER", help="a cluster that may call")
    one.add_argument("--days", type=int, default=365, help="how long they are valid (default: %(default)s)")
    authority = one.add_mutually_exclusive_group()
    authority.add_argument("--new-ca", action="store_true",
                           help="make a CA that takes the present one's place; both are trusted")  # fmt: skip
    authority.add_argument("--only-this-ca", action="store_true", help="trust no CA but the newest any more")
    one.set_defaults(command=_certs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
