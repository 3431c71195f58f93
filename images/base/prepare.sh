#!/bin/sh
# Prepare any Debian-like base: a python3 that can create venvs, the user of Isthmus, and the mount points of read-only
# roots and Charliecloud. $APT_PACKAGES are installed in addition.
set -eu

packages=${APT_PACKAGES:-}
# In Debian, ensurepip is in the package python3-venv.
python3 -c 'import ensurepip, venv' 2>/dev/null || packages="python3 python3-venv $packages"
[ -d /etc/ssl/certs ] && [ -n "$(ls -A /etc/ssl/certs)" ] || packages="ca-certificates $packages"

if [ -n "$(echo "$packages" | tr -d ' ')" ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q update
    # shellcheck disable=SC2086  # a list of packages
    apt-get -q install --yes --no-install-recommends $packages
    apt-get clean
    rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache
fi
python3 -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "the base image needs Python 3.11 or newer")'

grep -q '^isthmus:' /etc/passwd || {
    echo 'isthmus:x:65532:' >>/etc/group
    echo 'isthmus:x:65532:65532:Isthmus:/work:/usr/sbin/nologin' >>/etc/passwd
}
mkdir -p /dev /proc /sys /tmp /work /mnt
chmod 1777 /tmp
chown 65532:65532 /work
