"""The Helm chart: what it renders is valid, starts the programs of docker-compose.yml, and gives no pod more than it needs."""

import importlib.util
import json
import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from chart import CHART, EXAMPLES, ROOT, Object, Pod, example, helm, pods, render, secrets_of

from quickbloom import __version__
from quickbloom.client_app.cli import cli as edge
from quickbloom.client_app.join import node_settings
from quickbloom.common.config.run import parse_node_config, parse_run_config
from quickbloom.server_app.cli.main import cli
from quickbloom.server_app.deployment.secrets import create, public_keys
from quickbloom.server_app.launch.settings import parse_assignments

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
METRICS = yaml.safe_load((ROOT / "docker" / "metrics.yml").read_text())["services"]["metrics"]
EVERY = pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
FOREIGN = {"Certificate", "ServiceMonitor"}
"""Objects of cert-manager and of Prometheus' operator, whose schemas are not Kubernetes' own."""
LONG_RUNNING = {"superlink", "superexec", "supernode", "metrics"}


def load(file: Path) -> list[Object]:
    return render(yaml.safe_load(file.read_text()))


def of(objects: list[Object], component: str) -> Pod:
    """The first pod of a component."""
    return next(pod for pod in pods(objects) if pod.component == component)


def named(objects: list[Object], kind: str, name: str = "") -> Object:
    return next(found for found in objects if found["kind"] == kind and found["metadata"]["name"].endswith(name))


def health() -> Any:
    """The module docker/healthcheck.py."""
    spec = importlib.util.spec_from_file_location("healthcheck", ROOT / "docker" / "healthcheck.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@EVERY
def test_helm_has_no_remark_but_on_the_icon(file: Path) -> None:
    defaults: Object = {}
    for values in (defaults, yaml.safe_load(file.read_text())):
        report = helm().lint(CHART, values, strict=True)
        assert [found["error"] for found in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("version", ["1.27", "1.37"])
@EVERY
def test_the_objects_are_valid_for_kubernetes(file: Path, version: str) -> None:
    check = pytest.importorskip("kubernetes_validate")
    for found in load(file):
        if found["kind"] not in FOREIGN:
            check.validate(found, version, strict=True)


def test_an_object_with_a_field_that_kubernetes_does_not_know_is_found() -> None:
    check = pytest.importorskip("kubernetes_validate")
    wrong = named(load(EXAMPLES[0]), "StatefulSet")
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(check.ValidationError):
        check.validate(wrong, "1.37", strict=True)


@EVERY
def test_no_name_is_given_twice(file: Path) -> None:
    names = [(found["kind"], found["metadata"]["name"]) for found in load(file)]
    assert len(names) == len(set(names))


@EVERY
def test_no_container_runs_as_root_or_writes_to_its_root_file_system(file: Path) -> None:
    user = int(re.findall(r"useradd --uid (\d+)", (ROOT / "docker" / "Dockerfile").read_text())[0])
    for pod in pods(load(file)):
        of_pod, of_container = pod.spec["securityContext"], pod.container["securityContext"]
        assert not {"initContainers", "hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & set(pod.spec)
        assert of_pod["runAsNonRoot"] is True
        assert (of_pod["runAsUser"], of_pod["runAsGroup"], of_pod["fsGroup"]) == (user, user, user)
        assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert of_container["readOnlyRootFilesystem"] is True
        assert of_container["allowPrivilegeEscalation"] is False
        assert of_container["capabilities"] == {"drop": ["ALL"]}
        assert not {"runAsUser", "runAsNonRoot", "seccompProfile"} & set(of_container)
        assert pod.spec["automountServiceAccountToken"] is False
        assert pod.spec["enableServiceLinks"] is False  # their variables would begin with QUICKBLOOM_
        assert not any("hostPath" in volume for volume in pod.spec["volumes"])


@EVERY
def test_a_pod_writes_to_its_volumes_alone(file: Path) -> None:
    scratch = {"/tmp", "/app/.flwr"}
    kept = {"superlink": {"/app/state"}, "superexec": {"/app/quickbloom-runs"}, "supernode": {"/app/data"}}
    for pod in pods(load(file)):
        written = {mount["mountPath"] for mount in pod.container["volumeMounts"] if not mount.get("readOnly")}
        assert written == ({"/tmp"} if pod.component == "metrics" else scratch | kept.get(pod.component, set()))
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        for mount in pod.container["volumeMounts"]:
            lasting = "persistentVolumeClaim" in volumes[mount["name"]]
            assert lasting == (mount["mountPath"] in kept.get(pod.component, set()) | {"/data", "/app/quickbloom-runs"})


def test_secrets_are_given_to_those_who_need_them() -> None:
    for pod in pods(render(example("one-host"))):
        node = pod.labels.get("quickbloom/node", "")
        given = {
            "superlink": {(key, "quickbloom-superlink") for key in ("ca.crt", "server.crt", "server.key", "superexec.secret")},
            "superexec": {(key, "quickbloom-superexec") for key in ("ca.crt", "superexec.secret")},
            "supernode": {(key, f"quickbloom-{node}") for key in ("ca.crt", "node.key")},
            "run": {("ca.crt", "quickbloom-cli")},
            "metrics": set(),
        }
        found = secrets_of(pod)
        if pod.component == "register":
            found = {one for one in found if one[0].startswith("/secrets/")}
            given["register"] = given["run"]
            public = {one for one in secrets_of(pod) if one[0].startswith("/public/")}
            assert {key for _, _, key in public} == {"ca.crt", "node.key.pub"}
        assert found == {(f"/secrets/{key}", name, key) for key, name in given[pod.component]}


def test_with_cert_manager_the_certificate_comes_from_its_secret_and_its_key_goes_to_the_superlink_alone() -> None:
    objects = render(example("three-hospitals"))
    certificate = named(objects, "Certificate")
    tls = certificate["spec"]["secretName"]
    assert secrets_of(of(objects, "superlink")) == {
        ("/secrets/ca.crt", tls, "ca.crt"),
        ("/secrets/server.crt", tls, "tls.crt"),
        ("/secrets/server.key", tls, "tls.key"),
        ("/secrets/superexec.secret", "quickbloom-superexec", "superexec.secret"),
    }
    for pod in pods(objects):
        assert ("tls.key" in {key for _, _, key in secrets_of(pod)}) == (pod.component == "superlink")
    hospital = [pod for pod in pods(objects) if pod.labels.get("quickbloom/node") == "hospital-c"]
    assert secrets_of(hospital[0]) == {("/secrets/ca.crt", tls, "ca.crt"), ("/secrets/node.key", "federation-key", "node.key")}


def test_a_key_that_is_mounted_by_another_pod_would_be_seen() -> None:
    objects = render(example("one-host"))
    found = secrets_of(of(objects, "superlink"))
    volume = {"projected": {"sources": [{"secret": {"name": "other", "items": [{"key": "a", "path": "b"}]}}]}}
    pod = of(objects, "superlink")
    spec = {
        **pod.spec,
        "volumes": [v if v["name"] != "secrets" else {"name": "secrets", **volume} for v in pod.spec["volumes"]],
    }
    assert secrets_of(Pod("superlink", {}, spec)) == {("/secrets/b", "other", "a")} != found


@EVERY
def test_what_goes_on_has_probes_that_exist_and_everything_has_resources(file: Path) -> None:
    checks, ports = health().CHECKS, {"/healthz", "/readyz"}
    for pod in pods(load(file)):
        container = pod.container
        probes = [container[name] for name in ("readinessProbe", "livenessProbe", "startupProbe") if name in container]
        assert ({"readinessProbe", "livenessProbe"} <= set(container)) == (pod.component in LONG_RUNNING)
        for probe in probes:
            if "httpGet" in probe:
                assert probe["httpGet"]["path"] in ports
                continue
            program, what, *_ = probe["exec"]["command"][3:]
            assert (program, what in checks) == ("/opt/quickbloom/healthcheck.py", True)
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]


def test_a_node_that_waits_for_its_server_is_not_killed() -> None:
    node = of(render(example("hospital")), "supernode").container
    assert node["livenessProbe"]["exec"]["command"][-1] == "join"  # a process; the port is open once the server has answered
    assert node["readinessProbe"]["exec"]["command"][-1] == "supernode"
    assert "startupProbe" not in node


def test_the_programs_are_those_of_compose() -> None:
    objects = render(example("one-host"))
    address = {"0.0.0.0": "superlink-control", "quickbloom-superlink-control:8000": "superlink-control:8000"}
    for component, service in {"superlink": COMPOSE["superlink"], "superexec": COMPOSE["superexec"]}.items():
        assert [address.get(word, word) for word in of(objects, component).container["args"]] == service["command"]
    assert of(objects, "register").container["args"] == COMPOSE["register"]["command"]
    # A cluster has figures of certificates from whoever makes them.
    assert [*of(objects, "metrics").container["args"], "--server", "superlink:9092"] == METRICS["command"]
    for number, pod in enumerate([pod for pod in pods(objects) if pod.component == "supernode"], 1):
        words = [word.replace("quickbloom-superlink", "superlink") for word in pod.container["args"]]
        assert words[:6] == COMPOSE[f"supernode-{number}"]["command"][:6]
        assert set(words) == set(COMPOSE[f"supernode-{number}"]["command"])


@EVERY
def test_commands_and_settings_are_understood_by_the_programs(file: Path) -> None:
    for pod in pods(load(file)):
        program, *words = pod.container["args"]
        if program == "python":
            assert (ROOT / "docker" / Path(words[0]).name).exists()
            continue
        command: Any = typer.main.get_command(edge if program == "quickbloom-edge" else cli).commands[words[0]]  # type: ignore[attr-defined]
        options = command.make_context("command", words[1:]).params
        assigned = [word for flag, word in pairwise(words) if flag == "--set"]
        if words[0] == "join":
            parse_node_config(node_settings(dict(word.split("=", 1) for word in assigned)))
        elif words[0] == "run":
            parse_run_config(parse_assignments(assigned, options["algorithm"] or "reptile"))


def test_numbers_reach_the_command_line_as_they_were_written() -> None:
    settings = {"max-update-norm": 2500000, "inner-lr": 0.05, "report": False, "own.missing": "none,na"}
    words = of(render({"runs": [{"name": "a", "settings": settings}]}), "run").container["args"]
    assert words[4::2] == ["--set"] * 4
    assert set(words[5::2]) == {"max-update-norm=2500000", "inner-lr=0.05", "report=false", "own.missing=none,na"}


def test_a_run_is_a_job_that_somebody_starts_and_that_is_not_tried_again() -> None:
    objects = render(example("three-hospitals"))
    by_hand, weekly = (named(objects, "CronJob", name)["spec"] for name in ("outcome", "weekly"))
    assert (by_hand["suspend"], weekly["suspend"], weekly["schedule"]) == (True, False, "0 3 * * 0")
    for spec in (by_hand, weekly):
        assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0
        assert spec["jobTemplate"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    on = of(render({"runs": [{"name": "on", "resume": "/app/quickbloom-runs/x"}]}), "run").container["args"]
    assert on == ["quickbloom", "run", "--connection", "superlink", "--resume", "/app/quickbloom-runs/x"]


def test_the_connection_leads_to_the_control_service_by_a_name_of_the_certificate() -> None:
    objects = render(example("three-hospitals"))
    connection = tomllib.loads(named(objects, "ConfigMap", "connection")["data"]["config.toml"])["superlink"]["superlink"]
    host, port = connection["address"].split(":")
    service = named(objects, "Service", host)
    assert (service["spec"]["type"], [one["port"] for one in service["spec"]["ports"]]) == ("ClusterIP", [int(port)])
    names = named(objects, "Certificate")["spec"]["dnsNames"]
    nodes = of(objects, "supernode").container["args"][3].split(":")[0]
    assert {host, nodes, "localhost", "fl.example.org"} <= set(names)
    assert connection["root-certificates"] in {path for path, _, _ in secrets_of(of(objects, "run"))}


def test_addresses_stand_in_the_certificate_as_addresses() -> None:
    issuer = {"enabled": True, "issuer": {"name": "ca"}}
    spec = named(
        render({"tls": {"hosts": ["fl.example.org", "203.0.113.5", "2001:db8::5"], "certManager": issuer}}), "Certificate"
    )["spec"]
    assert spec["ipAddresses"] == ["127.0.0.1", "203.0.113.5", "2001:db8::5"]
    assert spec["dnsNames"][-1] == "fl.example.org"
    assert not [name for name in spec["dnsNames"] if name[0].isdigit()]


@pytest.mark.parametrize("kind", ["ClusterIP", "LoadBalancer"])
def test_only_the_port_for_nodes_is_ever_opened_to_the_outside(kind: str) -> None:
    objects = render({"superlink": {"fleet": {"type": kind}}, "metrics": {"enabled": True}})
    open_to = {found["metadata"]["name"]: found["spec"] for found in objects if found["kind"] == "Service"}
    assert {name: spec["type"] for name, spec in open_to.items()} == {
        "quickbloom-superlink": kind,
        "quickbloom-superlink-control": "ClusterIP",
        "quickbloom-metrics": "ClusterIP",
    }
    assert [port["port"] for port in open_to["quickbloom-superlink"]["ports"]] == [9092]


def test_what_register_sees_is_what_the_command_registers(tmp_path: Path) -> None:
    values = example("many-devices") | {"nodes": {"list": [{"name": "node-1"}]}}
    objects = render(values)
    create(tmp_path / "made", ["node-1"], ["a"], 1)
    secrets = {"quickbloom-cli": "cli", "quickbloom-node-1": "nodes/node-1"}
    maps = {found["metadata"]["name"]: found["data"] for found in objects if found["kind"] == "ConfigMap"}
    (public,) = [volume for volume in of(objects, "register").spec["volumes"] if volume["name"] == "public"]
    for source in public["projected"]["sources"]:
        for kind, part in source.items():
            for item in part["items"]:
                path = tmp_path / "public" / item["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == "configMap":
                    path.write_text(maps[part["name"]][item["key"]])
                else:
                    path.write_bytes((tmp_path / "made" / secrets[part["name"]] / item["key"]).read_bytes())
    assert set(public_keys(tmp_path / "public")) == {"node-1", "device-1"}


def test_another_node_is_registered_by_another_job_and_a_second_rendering_by_the_same() -> None:
    def job(values: Object) -> str:
        return str(named(render(values), "Job")["metadata"]["name"])

    one, two = {"nodes": {"list": [{"name": "a"}]}}, {"nodes": {"list": [{"name": "a"}, {"name": "b"}]}}
    assert job(one) == job(one) != job(two)
    key = example("many-devices")["register"]["publicKeys"]["device-1"]
    assert job({"register": {"publicKeys": {"d": key}}}) != job({"register": {"publicKeys": {"d": key + "x"}}})


def test_claims_of_results_and_of_the_database_stay_when_the_release_goes() -> None:
    objects = render(example("one-host"))
    assert named(objects, "PersistentVolumeClaim")["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert "persistentVolumeClaimRetentionPolicy" not in named(objects, "StatefulSet", "superlink")["spec"]  # kept by default
    own = render({"superlink": {"storage": {"existingClaim": "mine"}}, "superexec": {"runs": {"existingClaim": "runs"}}})
    assert not [found for found in own if found["kind"] == "PersistentVolumeClaim"]
    claims = {pod.component: [v.get("persistentVolumeClaim") for v in pod.spec["volumes"]] for pod in pods(own)}
    assert {"claimName": "mine"} in claims["superlink"]
    assert {"claimName": "runs"} in claims["superexec"]


def test_drains_wait_for_the_server_and_its_runs_and_take_one_node_at_a_time() -> None:
    objects = render(example("one-host"))
    budgets = {found["metadata"]["name"]: found["spec"] for found in objects if found["kind"] == "PodDisruptionBudget"}
    allowed = {name.removeprefix("quickbloom-"): spec.get("maxUnavailable", 0) for name, spec in budgets.items()}
    assert allowed == {"superlink": 0, "superexec": 0, "supernode": 1, "run": 0}
    for name, spec in budgets.items():
        chosen = spec["selector"]["matchLabels"].items()
        assert {pod.component for pod in pods(objects) if chosen <= pod.labels.items()} == {name.removeprefix("quickbloom-")}


def test_figures_are_read_where_the_results_are_and_can_be_found_by_either_prometheus() -> None:
    one = of(render(example("one-host")), "metrics")
    near = one.spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0]["labelSelector"]
    assert near["matchLabels"]["app.kubernetes.io/component"] == "superexec"
    assert "affinity" not in of(render(example("many-devices")), "metrics").spec  # ReadWriteMany
    objects = render(example("three-hospitals"))
    monitor, service = named(objects, "ServiceMonitor"), named(objects, "Service", "metrics")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    deployment = named(objects, "Deployment", "metrics")["spec"]["template"]["metadata"]["annotations"]
    assert deployment["prometheus.io/port"] == "9464"


def test_a_release_of_nodes_alone_has_no_server_and_opens_nothing() -> None:
    objects = render(example("hospital"))
    assert {pod.component for pod in pods(objects)} == {"supernode"}
    assert not [found for found in objects if found["kind"] in ("Service", "CronJob", "Job")]
    assert "--data" in of(objects, "supernode").container["args"]


def test_names_stay_within_what_kubernetes_takes() -> None:
    values = {"nodes": {"list": [{"name": "n" * 16}]}, "runs": [{"name": "r" * 16}], "metrics": {"enabled": True}}
    for found in render(values, release="a" * 53):
        limit = 52 if found["kind"] in ("StatefulSet", "CronJob") else 63  # a suffix is added to these
        assert len(found["metadata"]["name"]) <= limit, found["metadata"]["name"]


def test_the_chart_has_the_version_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
    assert of(render({}), "superlink").container["image"] == f"quickbloom:{__version__}"


def test_every_value_has_a_default_and_a_rule() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(rule: Object, value: Any, path: str) -> None:
        rule = schema["$defs"][rule["$ref"].removeprefix("#/$defs/")] if "$ref" in rule else rule
        if not isinstance(value, dict) or not rule.get("properties"):
            return
        assert rule["additionalProperties"] is False, path
        assert set(rule["properties"]) - {"global"} == set(value), path
        for key, part in value.items():
            compare(rule["properties"][key], part, f"{path}.{key}")

    compare(schema, values, "")


REFUSED: list[tuple[Object, str]] = [
    ({"superlnk": {}}, "superlnk"),
    ({"superlink": {"replicas": 2}}, "replicas"),
    ({"superlink": {"fleet": {"type": "Ingress"}}}, "/superlink/fleet/type"),
    ({"superlink": {"fleet": {"nodePort": 9092}}}, "/superlink/fleet/nodePort"),
    ({"superlink": {"fleet": {"sources": ["everybody"]}}}, "/superlink/fleet/sources/0"),
    ({"superlink": {"storage": {"size": "5 GB"}}}, "/superlink/storage/size"),
    ({"superexec": {"runs": {"accessMode": "ReadOnlyMany"}}}, "/superexec/runs/accessMode"),
    ({"server": "yes"}, "/server"),
    ({"tls": {"hosts": ["https://fl.example.org"]}}, "/tls/hosts/0"),
    ({"nodes": {"list": [{"secret": "a"}]}}, "name"),
    ({"nodes": {"list": [{"name": "Ward_7"}]}}, "/nodes/list/0/name"),
    ({"nodes": {"list": [{"name": "a", "data": {"claim": "a", "file": "../secrets/node.key"}}]}}, "/nodes/list/0/data/file"),
    ({"nodes": {"list": [{"name": "a", "data": {"file": "a.csv"}}]}}, "claim"),
    ({"nodes": {"list": [{"name": "a", "settings": {"State-Dir": "/tmp"}}]}}, "State-Dir"),
    ({"nodes": {"server": "https://fl.example.org"}}, "/nodes/server"),
    ({"runs": [{"name": "a", "settings": {"rounds": [1, 2]}}]}, "/runs/0/settings/rounds"),
    ({"runs": [{"name": "a", "resume": "/app/quickbloom-runs/x", "settings": {"rounds": 3}}]}, "/runs/0"),
    ({"runs": [{"name": "a", "resume": "/etc/passwd"}]}, "/runs/0/resume"),
    ({"register": {"publicKeys": {"a": "-----BEGIN OPENSSH PRIVATE KEY-----"}}}, "/register/publicKeys/a"),
    ({"metrics": {"from": []}}, "/metrics/from"),
]


@pytest.mark.parametrize(("values", "where"), REFUSED, ids=[where for _, where in REFUSED])
def test_a_wrong_value_is_refused_with_its_place(values: Object, where: str) -> None:
    with pytest.raises(helm().HelmValuesError, match=re.escape(where)):
        render(values)


CONTRADICTIONS: list[tuple[Object, str]] = [
    ({"server": False}, "`nodes.server` must be HOST:PORT"),
    ({"server": False, "nodes": {"server": "a:9092"}, "runs": [{"name": "a"}]}, "`runs` are started where the server is"),
    ({"tls": {"hosts": ["fl.example.org"]}}, "`tls.hosts` goes with `tls.certManager.enabled`"),
    ({"tls": {"certManager": {"enabled": True}}}, "`tls.certManager.issuer.name` must name an issuer"),
    ({"nodes": {"list": [{"name": "a"}, {"name": "a"}]}}, "`nodes.list` must name each node once, got a twice"),
    ({"runs": [{"name": "a"}, {"name": "a"}]}, "`runs` must name each run once, got a twice"),
    (
        {"metrics": {"enabled": True}, "superexec": {"runs": {"accessMode": "ReadWriteOncePod"}}},
        "`metrics.enabled` needs a second pod",
    ),
    (
        {"nodes": {"list": [{"name": "a", "data": {"claim": "a", "file": "a.csv"}, "partition": {"id": 0, "of": 2}}]}},
        "node a has either `data` or a `partition`",
    ),
]


@pytest.mark.parametrize(("values", "words"), CONTRADICTIONS, ids=[words for _, words in CONTRADICTIONS])
def test_values_that_do_not_go_together_are_refused_in_one_sentence(values: Object, words: str) -> None:
    with pytest.raises(helm().HelmError, match=re.escape(words)):
        render(values)
