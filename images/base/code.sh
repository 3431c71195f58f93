#!/bin/sh
# Install the named projects (./FOLDER, below /build) for the venv /opt/isthmus into /build/root: the layer on top of the
# dependencies, which are not needed here.
set -eu

# shellcheck source=pip.sh
. /build/base/pip.sh
export PIP_NO_INDEX=1
cd /build
/opt/tools/bin/pip wheel -q --no-deps --no-build-isolation -w /build/dist "$@"
/opt/tools/bin/pip --python /opt/isthmus/bin/python install -q --no-deps --root /build/root /build/dist/*.whl
python3 /build/base/compact.py /build/root/opt/isthmus --installed-as /opt/isthmus
