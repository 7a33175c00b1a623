#!/bin/sh
# Readies this machine for the tests with containers: an engine, the base image, a local wheel of torch if pip has one.
# Where root finds no engine it installs Debian's and starts it. Does nothing that is done.
set -eu
cd "$(dirname "$0")/.."
IMAGE=python:3.11-slim-bookworm
export DEBIAN_FRONTEND=noninteractive

skipped() {
    echo "$1: the tests with containers will be skipped"
    exit 0
}

if ! docker info > /dev/null 2>&1; then
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
        skipped "no Docker engine answers, and only root on Debian can install one here"
    fi
    if ! command -v dockerd > /dev/null || ! command -v docker-compose > /dev/null; then
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends docker.io docker-compose iptables; } > /dev/null \
            || skipped "no Docker engine answers, and Debian's packages docker.io and docker-compose cannot be installed"
    fi
    setsid nohup dockerd > /var/log/dockerd.log 2>&1 < /dev/null &
    for _ in $(seq 60); do /usr/bin/docker info > /dev/null 2>&1 && break || sleep 1; done
    /usr/bin/docker info > /dev/null 2>&1 || skipped "dockerd does not start here, see /var/log/dockerd.log"
fi

# A newer client elsewhere on the PATH may lack what the engine's own has.
PATH=/usr/bin:$PATH
if ! docker image inspect "$IMAGE" > /dev/null 2>&1 && ! timeout 60 docker pull --quiet "$IMAGE" > /dev/null 2>&1; then
    if [ -f ../shared/docker/make-base-image.sh ]; then
        command -v mmdebstrap > /dev/null || apt-get install -y -qq --no-install-recommends mmdebstrap > /dev/null
        bash ../shared/docker/make-base-image.sh "$IMAGE" > /dev/null
    else
        skipped "the image $IMAGE can neither be pulled nor made"
    fi
fi

for folder in $(python3 -m pip config get global.find-links 2> /dev/null) ${PIP_FIND_LINKS:-}; do
    for wheel in "$folder"/torch-*.whl; do
        [ -f "$wheel" ] && { ln -f "$wheel" docker/wheels/ 2> /dev/null || cp -n "$wheel" docker/wheels/; }
    done
done
exit 0
