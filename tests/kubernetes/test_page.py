"""What docs/kubernetes.md tells a cluster's owner to type names objects that the chart makes or asks for."""

import re

import pytest
from chart import ROOT, Object, example, pods, render, secrets_of
from documents import blocks

TEXT = "\n".join(block.text for block in blocks(ROOT / "docs" / "kubernetes.md"))


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return render(example("one-host"))


def test_the_secrets_are_those_that_the_pods_mount(objects: list[Object]) -> None:
    made = dict(re.findall(r"create secret generic (\S+) --from-file secrets/(\S+)", TEXT))
    files = {
        "superlink": {"ca.crt", "server.crt", "server.key", "superexec.secret"},
        "superexec": {"ca.crt", "superexec.secret"},
        "cli": {"ca.crt"},
    }
    wanted = {(name, key) for pod in pods(objects) for _, name, key in secrets_of(pod)}
    assert {name for name, _ in wanted} == set(made)
    for name, key in wanted:
        assert key in files.get(made[name], {"ca.crt", "node.key", "node.key.pub"}), (name, key)


def test_the_certificate_names_the_services(objects: list[Object]) -> None:
    (command,) = re.findall(r"^quickbloom secrets .*--nodes.*$", TEXT, re.MULTILINE)
    services = {found["metadata"]["name"] for found in objects if found["kind"] == "Service"} - {"quickbloom-metrics"}
    assert set(re.findall(r"--host (\S+)", command)) == services | {"fl.example.org"}


def test_objects_that_are_named_are_there(objects: list[Object]) -> None:
    kinds = {"cronjob": "CronJob", "deploy": "Deployment", "statefulset": "StatefulSet", "service": "Service"}
    there = {(found["kind"], found["metadata"]["name"]) for found in objects}
    named = re.findall(r"\b(cronjob|deploy|statefulset|service)/(\S+)", TEXT)
    assert len(named) >= 4
    for kind, name in named:
        assert (kinds[kind], name) in there, f"{kind}/{name}"
