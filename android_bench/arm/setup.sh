#!/usr/bin/env bash
# Sets up the emulated ARM system in the cache (MOBILEQAT_CACHE, or ~/.cache/mobileqat): no root, nothing installed.
# Arguments are passed on, such as --runtime litert. PYTHON is the Python that has mobileqat.
set -euo pipefail
exec "${PYTHON:-python3}" -m mobileqat.bench.sysroot "$@"
