#!/bin/sh
# Create two venvs: /opt/tools with the build tools, and the empty /opt/isthmus, which becomes part of the image.
set -eu

# shellcheck source=pip.sh
. /build/base/pip.sh
python3 -m venv /opt/tools
python3 -m venv --without-pip /opt/isthmus
/opt/tools/bin/pip install -q pip setuptools
