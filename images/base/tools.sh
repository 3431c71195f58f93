#!/bin/sh
# Makes two venvs: /opt/tools with what builds, and /opt/isthmus, still empty, which the image will hold (and no pip).
set -eu

# shellcheck source=pip.sh
. /build/base/pip.sh
python3 -m venv /opt/tools
python3 -m venv --without-pip /opt/isthmus
/opt/tools/bin/pip install -q pip setuptools
