#!/bin/sh
# Programs that tests use beside Python's packages: a Chromium for the reports, Prometheus for `quickbloom metrics`. Where root
# finds none it installs Debian's. Does nothing that is done.
set -eu
export DEBIAN_FRONTEND=noninteractive

install() {
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
        echo "no $1, and only root on Debian can install one here: $2 will be skipped"
    elif ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$1"; } > /dev/null 2>&1; then
        echo "Debian's package $1 cannot be installed: $2 will be skipped"
    fi
}

found=
for program in "${QUICKBLOOM_CHROMIUM:-}" chromium-headless-shell chromium chromium-browser google-chrome google-chrome-stable; do
    if [ -n "$program" ] && command -v "$program" > /dev/null; then found=yes; fi
done
[ -n "$found" ] || install chromium-headless-shell "the tests in a browser"
command -v promtool > /dev/null || install prometheus "the tests with Prometheus"
exit 0
