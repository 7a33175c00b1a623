"""The Helm chart as a cluster would see it: rendered by Helm itself, and its network policies read as Kubernetes reads them."""

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "docker" / "helm" / "quickbloom"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
SPACE = "fl"
"""The namespace of the release."""

Object = dict[str, Any]


def helm() -> Any:
    """Helm as a library; skips where there is none for this machine."""
    return pytest.importorskip("helm_python", reason="needs helm-python-sdk, which has no wheel for this machine")


def example(name: str) -> Object:
    """The values of a file in examples/."""
    values: Object = yaml.safe_load((CHART / "examples" / f"{name}.yaml").read_text())
    return values


def render(values: Mapping[str, Any], release: str = "quickbloom") -> list[Object]:
    """All objects that `helm install` would make. Raises Helm's error for values that are refused."""
    chart = helm().Chart.load(CHART)
    chart.validate_schema(dict(values))
    texts = chart.render(dict(values), name=release, namespace=SPACE)
    return [found for name, text in texts.items() if name.endswith(".yaml") for found in yaml.safe_load_all(text) if found]


@dataclass(frozen=True)
class Pod:
    """A pod of one of the objects, or a stranger's."""

    component: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any] = field(default_factory=dict)
    space: str = SPACE
    name: str = ""

    @property
    def container(self) -> Object:
        """Its only container."""
        (found,) = self.spec["containers"]
        return dict(found)


def pods(objects: list[Object]) -> list[Pod]:
    """The pods of all workloads, with the volumes of claims that they are given."""
    return list(_pods(objects))


def _pods(objects: list[Object]) -> Iterator[Pod]:
    for found in objects:
        spec = found.get("spec", {})
        if found["kind"] == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        if "template" in spec:
            labels = spec["template"]["metadata"]["labels"]
            pod = spec["template"]["spec"]
            claims = [claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])]
            pod = {**pod, "volumes": pod["volumes"] + [{"name": name, "persistentVolumeClaim": {}} for name in claims]}
            yield Pod(labels["app.kubernetes.io/component"], labels, pod, name=found["metadata"]["name"])


def secrets_of(pod: Pod) -> set[tuple[str, str, str]]:
    """(path in the container, secret, key) of everything that a pod is given of secrets, by volume or by variable."""
    found = set()
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    container = pod.container
    assert "envFrom" not in container
    assert not any("valueFrom" in variable for variable in container.get("env", []))
    for mount in container["volumeMounts"]:
        volume = volumes[mount["name"]]
        assert "secret" not in volume, "a whole secret is mounted, not keys of it"
        for source in volume.get("projected", {}).get("sources", []):
            for item in source.get("secret", {}).get("items", []):
                found.add((f"{mount['mountPath']}/{item['path']}", source["secret"]["name"], item["key"]))
            assert "secret" not in source or source["secret"].get("items"), "a whole secret is mounted, not keys of it"
    return found


def reaches(objects: list[Object], source: Pod | str, target: Pod | str, port: int, protocol: str = "TCP") -> bool:
    """Whether the network policies let `source` connect to `target`; either may be an address outside of the cluster."""
    out = isinstance(source, str) or leaves(objects, source, target, port, protocol)
    return out and (isinstance(target, str) or enters(objects, source, target, port, protocol))


def leaves(objects: list[Object], source: Pod, target: Pod | str, port: int, protocol: str = "TCP") -> bool:
    """Whether the policies of the pod that connects allow it."""
    return _allowed(_policies(objects), "egress", source, target, port, protocol)


def enters(objects: list[Object], source: Pod | str, target: Pod, port: int, protocol: str = "TCP") -> bool:
    """Whether the policies of the pod that is connected to allow it."""
    return _allowed(_policies(objects), "ingress", target, source, port, protocol)


def _policies(objects: list[Object]) -> list[Object]:
    return [found["spec"] for found in objects if found["kind"] == "NetworkPolicy"]


def _allowed(policies: list[Object], way: str, pod: Pod, other: Pod | str, port: int, protocol: str) -> bool:
    """Without a policy for a pod all is allowed; else what some rule of some policy allows."""
    ours = [found for found in policies if pod.space == SPACE and _selects(found["podSelector"], pod.labels)]
    ours = [found for found in ours if way.capitalize() in found["policyTypes"]]
    rules = [rule for found in ours for rule in found.get(way, [])]
    return not ours or any(_port(rule, port, protocol) and _peer(rule, way, other) for rule in rules)


def _port(rule: Object, port: int, protocol: str) -> bool:
    return "ports" not in rule or any(
        one.get("protocol", "TCP") == protocol and one.get("port", port) == port for one in rule["ports"]
    )


def _peer(rule: Object, way: str, other: Pod | str) -> bool:
    peers = rule.get("from" if way == "ingress" else "to", [])
    if not peers:
        return True
    if isinstance(other, str):
        blocks = [ipaddress.ip_network(peer["ipBlock"]["cidr"]) for peer in peers if "ipBlock" in peer]
        return any(ipaddress.ip_address(other) in block for block in blocks)
    return any(_is_meant(peer, other) for peer in peers)


def _is_meant(peer: Object, pod: Pod) -> bool:
    if "ipBlock" in peer:
        return False  # meant for addresses outside
    spaces = {"kubernetes.io/metadata.name": pod.space}
    there = _selects(peer["namespaceSelector"], spaces) if "namespaceSelector" in peer else pod.space == SPACE
    return there and _selects(peer.get("podSelector", {}), pod.labels)


def _selects(selector: Object, labels: Mapping[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, f"this reader does not know {selector}"
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
