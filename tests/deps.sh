#!/bin/sh
# deps.sh PACKAGE.. - install the Debian packages that are missing, or print the exact command and stop.
set -u
if ! command -v dpkg-query >/dev/null 2>&1; then
    # not Debian: trust the compiler to say what is missing
    exit 0
fi
missing=
for p in "$@"; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' && continue
    case $p in # another package, or a file from elsewhere, may provide it
    gcc) command -v cc >/dev/null 2>&1 && continue ;;
    python3) command -v python3 >/dev/null 2>&1 && continue ;;
    python3-pip) python3 -m pip --version >/dev/null 2>&1 && continue ;;
    python3-numpy) python3 -c 'import numpy' 2>/dev/null && continue ;;
    python3-zstandard) python3 -c 'import zstandard' 2>/dev/null && continue ;;
    pkg-config) command -v pkg-config >/dev/null 2>&1 && continue ;;
    esac
    missing="$missing $p"
done
[ -z "$missing" ] && exit 0
sudo=
[ "$(id -u)" = 0 ] || sudo=sudo
if [ -n "$sudo" ] && ! sudo -n true 2>/dev/null; then
    echo "missing packages; run:  sudo apt-get update && sudo apt-get install -y --no-install-recommends$missing" >&2
    exit 1
fi
echo "installing:$missing" >&2
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq >/dev/null 2>&1
if ! $sudo apt-get install -y -qq --no-install-recommends $missing >/tmp/kvtrace-apt.$$ 2>&1; then
    tail -3 /tmp/kvtrace-apt.$$ >&2
    rm -f /tmp/kvtrace-apt.$$
    echo "could not install:$missing" >&2
    exit 1
fi
rm -f /tmp/kvtrace-apt.$$
