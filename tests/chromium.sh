#!/bin/sh
# A Chromium for the tests of the reports: where root finds none it installs Debian's. Does nothing that is done.
set -eu
export DEBIAN_FRONTEND=noninteractive
for program in "${QUICKBLOOM_CHROMIUM:-}" chromium-headless-shell chromium chromium-browser google-chrome google-chrome-stable; do
    if [ -n "$program" ] && command -v "$program" > /dev/null; then exit 0; fi
done
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
    echo "no Chromium, and only root on Debian can install one here: the tests in a browser will be skipped"
elif ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium-headless-shell; } > /dev/null 2>&1; then
    echo "Debian's package chromium-headless-shell cannot be installed: the tests in a browser will be skipped"
fi
exit 0
