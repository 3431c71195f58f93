# Sourced by the other scripts: pip's options. Files of the build host are used and not kept in the image:
# /run/secrets/pip-conf (pip's configuration), /run/secrets/ca-bundle (certificates to trust) and /run/wheels (wheels).
# shellcheck shell=sh
export PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export PIP_CONSTRAINT=/build/constraints.txt
[ ! -e /run/secrets/pip-conf ] || export PIP_CONFIG_FILE=/run/secrets/pip-conf
[ ! -e /run/secrets/ca-bundle ] || export PIP_CERT=/run/secrets/ca-bundle SSL_CERT_FILE=/run/secrets/ca-bundle
[ -z "$(ls -A /run/wheels 2>/dev/null)" ] || export PIP_FIND_LINKS=/run/wheels
