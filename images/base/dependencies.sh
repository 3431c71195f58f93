#!/bin/sh
# Installs into /opt/isthmus the third-party packages that the named projects (folders of /build) need, in the versions of
# constraints.txt. Nothing of Isthmus itself: that is a later and smaller layer.
set -eu

# shellcheck source=pip.sh
. /build/base/pip.sh
python3 /build/base/requirements.py "$@" >/build/requirements.txt
# PyPI's torch for Linux is a CUDA build: the wanted one is on an index of its own, unless the wheel is at hand.
if grep -q '^torch==' /build/requirements.txt && ! ls /run/wheels/torch-*"+$TORCH_BUILD"-* >/dev/null 2>&1; then
    extra=$(/opt/tools/bin/pip config get global.extra-index-url 2>/dev/null || true)
    export PIP_EXTRA_INDEX_URL="$extra $TORCH_INDEX/$TORCH_BUILD"
fi
/opt/tools/bin/pip --python /opt/isthmus/bin/python install --only-binary :all: -r /build/requirements.txt
/opt/tools/bin/pip --python /opt/isthmus/bin/python check
python3 /build/base/compact.py /opt/isthmus
