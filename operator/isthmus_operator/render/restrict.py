"""Checks of pods against the restricted Pod Security Standard, and for other service accounts.

The admin can allow exceptions in four groups. The whole pod is checked, since a template can also remove settings.
"""

from collections.abc import Iterator, Mapping
from typing import Any

HOST_PATH = "host-path"
HOST_NAMESPACES = "host-namespaces"
PRIVILEGED = "privileged"
SERVICE_ACCOUNT = "service-account"
ALLOWANCES = (HOST_PATH, HOST_NAMESPACES, PRIVILEGED, SERVICE_ACCOUNT)

_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
_CAPABILITIES = {"NET_BIND_SERVICE"}
_SECCOMP = ("RuntimeDefault", "Localhost")
_APPARMOR = ("RuntimeDefault", "Localhost")
# Used by Kubernetes before 1.30, and by later versions if the field is not set.
_APPARMOR_ANNOTATION = "container.apparmor.security.beta.kubernetes.io/"
_SELINUX_TYPES = (None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
_SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem",
}  # fmt: skip

_Finding = tuple[str, str, str]  # path, description, and the allowance that it needs


def violations(pod: Mapping[str, Any], allowed: frozenset[str]) -> list[str]:
    """Return a problem for each setting of a pod that needs an allowance: ``spec.…: what; how to allow it``."""
    spec = pod.get("spec") or {}
    return [
        f"{path}: {what} is not allowed here; the platform's admin can allow {need} (operator.allowInTemplates)"
        for path, what, need in (
            *_of_annotations(pod),
            *_of_pod(spec),
            *_of_volumes(spec),
            *_of_containers(spec),
        )
        if need not in allowed
    ]


def _of_annotations(pod: Mapping[str, Any]) -> Iterator[_Finding]:
    annotations = _mapping(_mapping(pod.get("metadata")).get("annotations"))
    for key, profile in annotations.items():
        named = profile in ("", "runtime/default") or str(profile).startswith("localhost/")
        if key.startswith(_APPARMOR_ANNOTATION) and not named:
            yield f"metadata.annotations[{key}]", f"the AppArmor profile {profile!r}", PRIVILEGED


def _of_pod(spec: Mapping[str, Any]) -> Iterator[_Finding]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield f"spec.{field}", field, HOST_NAMESPACES
    for field in ("serviceAccountName", "serviceAccount"):
        if spec.get(field) not in (None, "", "default"):
            yield f"spec.{field}", f"the service account {spec[field]!r}", SERVICE_ACCOUNT
    if spec.get("automountServiceAccountToken"):
        yield "spec.automountServiceAccountToken", "a token of the service account", SERVICE_ACCOUNT
    security = _mapping(spec.get("securityContext"))
    for number, item in enumerate(_mappings(security.get("sysctls"))):
        name = item.get("name")
        if not isinstance(name, str) or name not in _SYSCTLS:
            yield f"spec.securityContext.sysctls[{number}]", f"the sysctl {name!r}", PRIVILEGED
    yield from _of_context("spec.securityContext", security)


def _of_volumes(spec: Mapping[str, Any]) -> Iterator[_Finding]:
    for volume in _mappings(spec.get("volumes")):
        for kind in sorted(set(volume) - _VOLUMES - {"name"}):
            if volume[kind] is not None:
                need = HOST_PATH if kind == "hostPath" else PRIVILEGED
                yield f"spec.volumes[{volume.get('name')}].{kind}", f"a volume of type {kind}", need
        for number, source in enumerate(_mappings(_mapping(volume.get("projected")).get("sources"))):
            if source.get("serviceAccountToken") is not None:
                path = f"spec.volumes[{volume.get('name')}].projected.sources[{number}].serviceAccountToken"
                yield path, "a token of the service account", SERVICE_ACCOUNT


def _of_containers(spec: Mapping[str, Any]) -> Iterator[_Finding]:
    around = _mapping(spec.get("securityContext"))
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in _mappings(spec.get(kind)):
            # By name: a number would differ from the template's, since the pod's own containers come first.
            path = f"spec.{kind}[{container.get('name')}]"
            for item, port in enumerate(_mappings(container.get("ports"))):
                if port.get("hostPort"):
                    yield f"{path}.ports[{item}].hostPort", "a port of the node", HOST_NAMESPACES
            security = _mapping(container.get("securityContext"))
            path += ".securityContext"
            yield from _of_context(path, security)
            yield from _of_container(path, security, around)


def _of_context(path: str, security: Mapping[str, Any]) -> Iterator[_Finding]:
    """Check the part of a security context that pods and containers share."""
    if security.get("runAsUser") == 0:
        yield f"{path}.runAsUser", "running as root", PRIVILEGED
    if _mapping(security.get("windowsOptions")).get("hostProcess"):
        yield f"{path}.windowsOptions.hostProcess", "hostProcess", PRIVILEGED
    profile = _mapping(security.get("appArmorProfile"))
    if profile and profile.get("type") not in _APPARMOR:
        yield f"{path}.appArmorProfile", "running without an AppArmor profile", PRIVILEGED
    labels = _mapping(security.get("seLinuxOptions"))
    if labels.get("type") not in _SELINUX_TYPES or labels.get("user") or labels.get("role"):
        yield f"{path}.seLinuxOptions", "an SELinux user, role or type of one's own", PRIVILEGED


def _of_container(path: str, security: Mapping[str, Any], around: Mapping[str, Any]) -> Iterator[_Finding]:
    if security.get("privileged"):
        yield f"{path}.privileged", "privileged", PRIVILEGED
    if security.get("allowPrivilegeEscalation") is not False:
        yield f"{path}.allowPrivilegeEscalation", "gaining privileges", PRIVILEGED
    capabilities = _mapping(security.get("capabilities"))
    if "ALL" not in (capabilities.get("drop") or ()):
        yield f"{path}.capabilities.drop", "keeping capabilities", PRIVILEGED
    added = sorted({str(name) for name in capabilities.get("add") or ()} - _CAPABILITIES)
    if added:
        yield f"{path}.capabilities.add", f"adding {', '.join(added)}", PRIVILEGED
    if security.get("procMount") not in (None, "Default"):
        yield f"{path}.procMount", "an unmasked /proc", PRIVILEGED
    if security.get("runAsNonRoot", around.get("runAsNonRoot")) is not True:
        yield f"{path}.runAsNonRoot", "running as root", PRIVILEGED
    profile = _mapping(security.get("seccompProfile") or around.get("seccompProfile"))
    if profile.get("type") not in _SECCOMP:
        yield f"{path}.seccompProfile", "running without a seccomp profile", PRIVILEGED


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item if isinstance(item, Mapping) else {} for item in value] if isinstance(value, list) else []
