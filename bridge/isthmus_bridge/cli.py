"""The command line: ``isthmus-bridge serve | check | doctor | status | audit | end | sudoers | schema | certs | …``."""

import argparse
import datetime as dt
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from isthmus_contracts.manifests.manifest import ManifestError
from isthmus_contracts.wire.parties import PartyError

from . import __version__, logs
from .admin import certificates, check, doctor, orders, privacy, strict_modes
from .audit import show
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

# The part after isthmus://operator/ in a certificate.
_CLUSTER = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


# Seconds to wait for a running bridge, which polls for orders once a second.
_ORDER_PATIENCE = 15.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Return the exit code: 0 for success, 1 for failure, 2 for wrong usage or policy."""
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
        policy = privacy.require(require(_policy(options)))
        for line in strict_modes.require(policy, options.policy):
            log.warning("%s", line)
        return policy

    serve(reread(), reread)
    return 0


def _policy(options: argparse.Namespace) -> Policy:
    """Return the policy of the file, with the settings that the command line overrides."""
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
        # Validate the whole again: addresses from the command line must be valid in the policy, too.
        policy = _changed(policy, changes)
    return policy


def _one_proxy(options: argparse.Namespace) -> None:
    if options.proxy and not options.connect:
        raise PolicyError("--proxy needs --connect; for the gateways in the policy, set gateways[].proxy there")


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
    for warning in (*(one.line for one in found if not one.blocks_serving), *privacy.warnings(policy)):
        print(f"warning: {warning}")
    blocking = (one.line for one in found if one.blocks_serving)
    for problem in (*blocking, *check.problems(policy), *check.readable(policy, options.policy)):
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


def _audit(options: argparse.Namespace) -> int:
    path = load(options.policy).audit_path
    selection = show.Selection(options.job, options.key, options.event)
    good = True
    try:
        if options.verify or options.hash:
            good, lines = show.verification(path, options.hash)
        else:
            lines = show.as_json(path, selection) if options.json else show.as_table(path, selection)
        for line in lines:
            print(line)
    except show.AuditError as error:
        return _complain(str(error), 1)
    except BrokenPipeError:  # of `| head`
        sys.stderr.close()
    return 0 if good else 1


def _root(options: argparse.Namespace) -> int:
    policy = load(options.policy)
    try:
        print(privacy.root_line(policy))
    except (OSError, PartyError) as error:
        return _complain(str(error), 1)
    return 0


def _digest(options: argparse.Namespace) -> int:
    try:
        print(privacy.digest_line(options.manifest, options.code))
    except (OSError, ManifestError) as error:
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
        return _complain(f"--bridge-user: {bridge!r} is not an ordinary user; name the user who runs the bridge", 2)
    if not (users := local_users(policy)):
        return _complain(f"{options.policy}: no identity names a local user, so no sudo rule is needed", 1)
    try:
        lines = list(fragment(policy, bridge, users))
    except RuleError as error:
        return _complain(str(error), 1)
    if path := changeable(code_paths()):
        _complain(f"warning: users other than root can change {path}, and with it what these rules let {bridge} run", 0)
    print("\n".join(lines))
    return 0


def _schema(options: argparse.Namespace) -> int:
    print(schema(), end="")
    return 0


def _certs(options: argparse.Namespace) -> int:
    for cluster in options.operator:
        if _CLUSTER.fullmatch(cluster) is None:
            return _complain(f"--operator: {cluster!r} is not a valid name of a cluster", 2)
    if not 1 <= options.days <= certificates.CA_DAYS:
        return _complain(f"--days: must be from 1 to {certificates.CA_DAYS} (the CA's life), not {options.days}", 2)
    if not (options.host or options.operator or options.only_this_ca):
        return _complain("give --host, --operator or both", 2)
    if options.new_ca and options.host:
        return _complain(
            "--new-ca cannot be used with --host: operators cannot verify the bridge's new certificate yet", 2
        )
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

    one = commands.add_parser("serve", help="serve requests and submit jobs")
    one.add_argument("--policy", type=Path, required=True, metavar="FILE", help="the site's policy (YAML)")
    one.add_argument("--listen", metavar="HOST:PORT", help="listen here instead of at the policy's address")
    one.add_argument("--connect", action="append", default=[], metavar="HOST:PORT",
                     help="dial this operator's gateway instead of the policy's, and do not listen without --listen;"
                          " repeatable")  # fmt: skip
    one.add_argument("--proxy", metavar="URL", help="the HTTP proxy for the gateways of --connect, http://HOST:PORT"
                     " (default: $https_proxy)")  # fmt: skip
    one.add_argument(
        "--metrics-listen",
        metavar="HOST:PORT",
        help="serve metrics here instead of at the policy's address; `off`: do not",
    )
    one.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    one.set_defaults(command=_serve)

    one = commands.add_parser("check", help="check a policy and show what each identity may do")
    one.add_argument("--policy", type=Path, required=True, metavar="FILE", help="the site's policy (YAML)")
    one.add_argument("--identity", metavar="URI", help="show this identity only, e.g. isthmus://operator/prod")
    one.set_defaults(command=_check)

    one = commands.add_parser("doctor", help="check that Slurm and the gateways can be used from this machine")
    one.add_argument("--policy", type=Path, required=True, metavar="FILE", help="the site's policy (YAML)")
    one.add_argument("--connect", action="append", default=[], metavar="HOST:PORT",
                     help="check this gateway instead of the policy's; repeatable")  # fmt: skip
    one.add_argument("--proxy", metavar="URL", help="the HTTP proxy for the gateways of --connect")
    one.set_defaults(command=_doctor)

    one = commands.add_parser("status", help="show the live pools of the running bridge")
    one.add_argument("--policy", type=Path, required=True, metavar="FILE", help="the site's policy (YAML)")
    one.set_defaults(command=_status)

    _add_privacy_commands(commands)

    one = commands.add_parser("end", help="end all live pools of one caller, through the running bridge")
    one.add_argument("--policy", type=Path, required=True, metavar="FILE", help="the site's policy (YAML)")
    one.add_argument("--identity", required=True, metavar="URI", help="the caller, e.g. isthmus://operator/prod")
    one.add_argument("--reason", required=True, metavar="TEXT", help="the reason, which the caller's users see")
    one.set_defaults(command=_end)

    one = commands.add_parser("sudoers", help="print the sudo rule that lets the bridge act as its local users")
    one.add_argument("--policy", type=Path, required=True, metavar="FILE", help="the site's policy (YAML)")
    one.add_argument("--bridge-user", metavar="NAME", help="the user who runs the bridge (default: the current user)")
    one.set_defaults(command=_sudoers)

    one = commands.add_parser("schema", help="print the policy's JSON schema, for editors and checks")
    one.set_defaults(command=_schema)

    one = commands.add_parser("certs", help="create the site's CA and certificates, add to them, or renew them")
    one.add_argument("--dir", type=Path, required=True, help="the directory to write to")
    one.add_argument(
        "--host", action="append", default=[], metavar="NAME", help="a name or address of the bridge; repeatable"
    )
    one.add_argument(
        "--operator",
        action="append",
        default=[],
        metavar="CLUSTER",
        help="a cluster whose operator gets a certificate; repeatable",
    )
    one.add_argument(
        "--days", type=int, default=365, help="validity of the certificates in days (default: %(default)s)"
    )
    authority = one.add_mutually_exclusive_group()
    authority.add_argument("--new-ca", action="store_true",
                           help="create a CA that replaces the current one; both are trusted")  # fmt: skip
    authority.add_argument("--only-this-ca", action="store_true", help="stop trusting all CAs but the newest")
    one.set_defaults(command=_certs)
    return parser


def _add_privacy_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    one = commands.add_parser("audit", help="show or verify the log of what was submitted, denied, and left the site")
    one.add_argument("--policy", type=Path, required=True, metavar="FILE", help="the site's policy (YAML)")
    one.add_argument("--job", default="", metavar="NAME", help="show this job only: NAMESPACE/NAME, or its UID")
    one.add_argument("--key", default="", metavar="KEY", help="show this pool only, by its key")
    one.add_argument("--event", default="", metavar="EVENT", help="show these events only, such as denied or left")
    one.add_argument("--json", action="store_true", help="print JSON lines with all fields instead of a table")
    one.add_argument("--verify", action="store_true", help="check that no line was changed or removed")
    one.add_argument("--hash", default="", metavar="SHA256",
                     help="check also that the log still holds the line with this hash (of an earlier --verify)",
                     )  # fmt: skip
    one.set_defaults(command=_audit)

    one = commands.add_parser("root", help="print this site's root for secure aggregation, for other sites' policies")
    one.add_argument("--policy", type=Path, required=True, metavar="FILE", help="the site's policy (YAML)")
    one.set_defaults(command=_root)

    one = commands.add_parser("digest", help="print the digest of a manifest's program, for privacy.code_digests")
    one.add_argument("manifest", type=Path, metavar="MANIFEST", help="the FederatedJob (YAML)")
    one.add_argument("--code", type=Path, metavar="DIR",
                     help="the files of task.code, if the manifest's file does not hold their ConfigMap")  # fmt: skip
    one.set_defaults(command=_digest)


if __name__ == "__main__":
    sys.exit(main())
