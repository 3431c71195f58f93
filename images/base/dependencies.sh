#!/bin/sh
# Install the third-party dependencies of the named projects (folders of /build) into /opt/isthmus, in the versions of
# constraints.txt. Isthmus itself is a later, smaller layer.
set -eu

# shellcheck source=pip.sh
. /build/base/pip.sh
python3 /build/base/requirements.py "$@" >/build/requirements.txt
# PyPI's torch for Linux is a CUDA build. Other builds are on separate indexes, unless a wheel is given.
if grep -q '^torch==' /build/requirements.txt && ! ls /run/wheels/torch-*"+$TORCH_BUILD"-* >/dev/null 2>&1; then
    extra=$(/opt/tools/bin/pip config get global.extra-index-url 2>/dev/null || true)
    export PIP_EXTRA_INDEX_URL="$extra $TORCH_INDEX/$TORCH_BUILD"
fi
/opt/tools/bin/pip --python /opt/isthmus/bin/python install --only-binary :all: -r /build/requirements.txt
/opt/tools/bin/pip --python /opt/isthmus/bin/python check
python3 /build/base/compact.py /opt/isthmus
