"""Who reaches whom in the cluster: the network policies of the chart, against the networks of docker-compose.yml."""

import pytest
import yaml
from chart import ROOT, Object, Pod, enters, example, leaves, pods, reaches, render

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
SERVICES = {"superexec": "superexec", "register": "register", "run": "cli", "supernode": "supernode-1"}
"""The service of docker-compose.yml that a component is."""
CONTROL, FLEET, FIGURES = 8000, 9092, 9464
STRANGERS = (Pod("", {}, name="of the same namespace"), Pod("", {}, space="other", name="of another namespace"))


def by_component(objects: list[Object]) -> dict[str, Pod]:
    return {pod.component: pod for pod in pods(objects)}


def everything() -> list[Object]:
    """Objects of a release that has every component."""
    return render(example("one-host"))


def test_pods_reach_those_ports_that_they_reach_in_compose() -> None:
    objects = everything()
    found = by_component(objects)
    assert set(found) == {*SERVICES, "superlink", "metrics"}
    for component, service in SERVICES.items():
        networks = set(COMPOSE[service]["networks"])
        assert reaches(objects, found[component], found["superlink"], CONTROL) == ("control" in networks), component
        assert reaches(objects, found[component], found["superlink"], FLEET) == ("fleet" in networks), component


@pytest.mark.parametrize("name", ["one-host", "three-hospitals"])
def test_no_node_reaches_the_port_on_which_runs_are_started_nor_another_node(name: str) -> None:
    objects = render(example(name))
    nodes = [pod for pod in pods(objects) if pod.component == "supernode"]
    others = [pod for pod in pods(objects) if pod not in nodes]
    assert len(nodes) == 3
    for node in nodes:
        assert [pod.component for pod in others if reaches(objects, node, pod, FLEET)] == ["superlink"]
        for port in (CONTROL, FIGURES, 9091, 9094, 22):
            assert not any(reaches(objects, node, pod, port) for pod in pods(objects))
        assert not any(reaches(objects, other, node, port) for other in others for port in (CONTROL, FLEET, 9094))


def test_both_ends_keep_a_node_from_the_port_on_which_runs_are_started() -> None:
    objects = everything()
    found = by_component(objects)
    node, superlink = found["supernode"], found["superlink"]
    assert not leaves(objects, node, superlink, CONTROL)
    assert not enters(objects, node, superlink, CONTROL)


def test_strangers_reach_nothing_and_prometheus_the_figures_alone() -> None:
    objects = everything()
    for pod in pods(objects):
        for port in (CONTROL, FLEET, FIGURES, 9094):
            assert not any(reaches(objects, stranger, pod, port) for stranger in STRANGERS), (pod.name, port)
            prometheus = Pod("", {}, space="monitoring")
            assert reaches(objects, prometheus, pod, port) == (pod.component == "metrics" and port == FIGURES)


def test_only_names_are_resolved_outside() -> None:
    objects = everything()
    resolver = Pod("", {"k8s-app": "kube-dns"}, space="kube-system")
    for pod in pods(objects):
        asks = pod.component in SERVICES
        assert reaches(objects, pod, resolver, 53, "UDP") == reaches(objects, pod, resolver, 53) == asks
        assert not reaches(objects, pod, resolver, 443)
        assert not any(reaches(objects, pod, "198.51.100.7", port) for port in (53, 443, FLEET, CONTROL))


def test_without_policies_a_node_would_reach_it() -> None:
    """What the tests above look for can be seen."""
    objects = render(example("one-host") | {"networkPolicy": {"enabled": False}})
    found = by_component(objects)
    assert reaches(objects, found["supernode"], found["superlink"], CONTROL)


def test_devices_outside_reach_the_fleet_api_from_their_networks_and_nothing_else() -> None:
    objects = render(example("many-devices"))
    found = by_component(objects)
    assert reaches(objects, "203.0.113.9", found["superlink"], FLEET)
    assert not reaches(objects, "192.0.2.1", found["superlink"], FLEET)
    assert not any(reaches(objects, "203.0.113.9", pod, CONTROL) for pod in found.values())
    anywhere = render({"superlink": {"fleet": {"type": "LoadBalancer"}}})
    assert reaches(anywhere, "192.0.2.1", by_component(anywhere)["superlink"], FLEET)
    assert not reaches(anywhere, "192.0.2.1", by_component(anywhere)["superlink"], CONTROL)


def test_a_hospitals_node_reaches_its_server_and_nobody_reaches_it() -> None:
    objects = render(example("hospital"))
    (node,) = pods(objects)
    assert reaches(objects, node, "203.0.113.5", FLEET)
    assert not reaches(objects, node, "203.0.113.5", CONTROL)
    assert not reaches(objects, node, "203.0.113.6", FLEET)
    assert not any(reaches(objects, stranger, node, port) for stranger in (*STRANGERS, "203.0.113.5") for port in (9094, FLEET))


def test_further_rules_are_added() -> None:
    rule = {"to": [{"ipBlock": {"cidr": "192.0.2.10/32"}}], "ports": [{"port": 443, "protocol": "TCP"}]}
    objects = render({"superexec": {"egress": [rule]}, "nodes": {"egress": [rule], "list": [{"name": "a"}]}})
    for component, pod in by_component(objects).items():
        assert reaches(objects, pod, "192.0.2.10", 443) == (component in ("superexec", "supernode"))
