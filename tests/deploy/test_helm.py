"""The Helm chart: it renders to valid objects, refuses wrong values, and keeps what operators rely on.

No cluster is needed; Helm itself comes as the package helm-python-sdk.
"""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.custom_resources import SCHEMAS

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/vllm-requant"
RULES = ROOT / "deploy/prometheus/rules/vllm-requant.rules.yml"
VALUE_SETS = sorted(path.stem for path in (CHART / "ci").glob("*.yaml"))
# the oldest that Chart.yaml admits, and the newest that the validator knows
KUBERNETES = ["1.30", "1.37"]
RELEASE, NAMESPACE = "demo", "inference"
Object = dict[str, Any]

every_set = pytest.mark.parametrize("name", ["default", *VALUE_SETS])
multi_node = pytest.mark.parametrize("name", ["multi-node-native", "multi-node-ray"])


@cache
def _chart(folder: Path = CHART) -> Any:
    return helm.Chart.load(folder)


def values_of(name: str) -> Object:
    return {} if name == "default" else yaml.safe_load((CHART / f"ci/{name}.yaml").read_text())


def merged(base: Object, *changes: Object) -> Object:
    """``base`` with what the others say instead."""
    result = deepcopy(base)
    for change in changes:
        for key, value in change.items():
            nested = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if nested else value
    return result


def render(values: Object, folder: Path = CHART) -> list[Object]:
    texts = _chart(folder).render(values, name=RELEASE, namespace=NAMESPACE)
    loaded = [yaml.safe_load_all(text) for path, text in texts.items() if path.endswith(".yaml")]
    return [document for documents in loaded for document in documents if document]


@cache
def objects(name: str) -> list[Object]:
    """What a value set renders to. Not to be changed."""
    return render(values_of(name))


def of_kind(documents: list[Object], kind: str) -> list[Object]:
    return [document for document in documents if document["kind"] == kind]


def pod_templates(documents: list[Object]) -> list[Object]:
    found = [d["spec"]["template"] for d in documents if d["kind"] in ("Deployment", "Job")]
    for group in of_kind(documents, "LeaderWorkerSet"):
        template = group["spec"]["leaderWorkerTemplate"]
        found += [template["leaderTemplate"], template["workerTemplate"]]
    return found


def component(template: Object) -> str:
    return template["metadata"]["labels"]["app.kubernetes.io/component"]


def template_of(documents: list[Object], wanted: str) -> Object:
    [template] = [template for template in pod_templates(documents) if component(template) == wanted]
    return template


def container_of(documents: list[Object], wanted: str) -> Object:
    [container] = template_of(documents, wanted)["spec"]["containers"]
    return container


def containers(template: Object) -> list[Object]:
    return template["spec"]["containers"] + template["spec"].get("initContainers", [])


def within(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys and their values, however deep."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from within(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from within(inner)


def selects(selector: Object, labels: Object) -> bool:
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "In" for expression in expressions)
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


def selected(selector: Object, documents: list[Object]) -> set[str]:
    return {
        component(template)
        for template in pod_templates(documents)
        if selects(selector, template["metadata"]["labels"])
    }


# what validators say


@every_set
def test_lint_has_nothing_to_say(name: str) -> None:
    report = helm.lint(CHART, values_of(name), strict=True, namespace=NAMESPACE, kube_version=f"v{KUBERNETES[0]}.0")
    assert report["total_charts_linted"] == 1 and not report["errors"]
    # 1 is information: charts without an icon
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("version", KUBERNETES)
@every_set
def test_kubernetes_accepts_every_object(name: str, version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    own = [document for document in objects(name) if document["kind"] not in SCHEMAS]
    # those of a group's pods lie in an object that Kubernetes does not know
    pods = [
        {"apiVersion": "v1", "kind": "PodTemplate", "template": template} for template in pod_templates(objects(name))
    ]
    for document in own + pods:
        assert validator.validate(document, version, strict=True).startswith(version)


@every_set
def test_other_controllers_accept_theirs(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    for document in objects(name):
        if document["kind"] in SCHEMAS:
            jsonschema.validate(document, SCHEMAS[document["kind"]])


def test_value_sets_have_every_kind() -> None:
    kinds = {document["kind"] for name in VALUE_SETS for document in objects(name)}
    assert kinds >= set(SCHEMAS) | {
        *("Deployment", "Service", "ServiceAccount", "PersistentVolumeClaim", "Job", "Secret"),
        *("PodDisruptionBudget", "NetworkPolicy", "HorizontalPodAutoscaler"),
    }


# values


def _described(schema: Object, defaults: Any, path: str = "") -> Iterator[str]:
    """Complaints about one value and those in it."""
    if "description" not in schema and path:
        yield f"{path} is not described"
    if "properties" in schema:
        if schema.get("additionalProperties") is not False:
            yield f"{path} takes any key"
        for key in schema["properties"].keys() ^ defaults.keys() - {"global"}:
            if key != "global":
                yield f"{path}.{key} is in only one of values.yaml and its schema"
        for key in schema["properties"].keys() & defaults.keys():
            yield from _described(schema["properties"][key], defaults[key], f"{path}.{key}")


def test_every_value_has_a_default_and_a_description() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    assert list(_described(schema, defaults)) == []
    assert set(defaults) > {"image", "server", "conversion"}


@pytest.mark.parametrize(
    "path, value",
    [
        ("server.replica", 2),
        ("server.replicas", "two"),
        ("server.replicas", -1),
        ("server.port", 80),
        ("server.activationBits", 4),
        ("server.extraArgs", "--enforce-eager"),
        ("server.env.A", 1),
        ("server.resources.limits.memory", True),
        ("server.rollingUpdate.maxSurge", "many"),
        ("checkpoint.name", ""),
        ("checkpoint.name", "../other"),
        ("storage.mountPath", "models"),
        ("storage.accessModes", ["ReadOnlyMany"]),
        ("image.digest", "sha256:abc"),
        ("image.tag", "a:b"),
        ("apiKey", "key"),
        # one second is not enough for a busy server
        ("probes.liveness.timeoutSeconds", 1),
        ("shutdown.drainSeconds", 0),
        ("networkPolicy.gateway", [{}]),
        ("podDisruptionBudget.maxUnavailable", 0),
        ("security.runAsUser", 0),
        ("autoscaling.minReplicas", 0),
        ("autoscaling.type", "both"),
        ("autoscaling.type", ["keda", "hpa"]),
        ("autoscaling.hpa.enabled", True),
        ("multiNode.size", 1),
        ("multiNode.executor", "mpi"),
        ("conversion.backoffLimit", 1.5),
        ("conversion.source.mountPath", "/"),
        ("nonsense", 1),
    ],
)
def test_a_wrong_value_is_refused_by_name(path: str, value: Any) -> None:
    keys = path.split(".")
    values: Any = value
    for key in reversed(keys):
        values = {key: values}
    with pytest.raises(helm.HelmError) as refusal:
        render(values)
    message = str(refusal.value)
    assert "schema" in message
    # of an unknown key the message names the object and the key
    parent = "".join(f"/{key}" for key in keys[:-1])
    assert f"at '{parent}/{keys[-1]}" in message or (f"at '{parent}'" in message and f"'{keys[-1]}'" in message)


CONVERSION = {"conversion": {"enabled": True, "model": "m"}}


@pytest.mark.parametrize(
    "values, said",
    [
        ({"apiKey": {"value": "a", "secretName": "b"}}, "apiKey.value and apiKey.secretName"),
        ({"autoscaling": {"minReplicas": 5}}, "autoscaling.minReplicas (5) is more than autoscaling.maxReplicas (4)"),
        ({"server": {"gpus": 2, "tensorParallelSize": 4}}, "server.gpus is 2, but a pod runs 4 ranks"),
        ({"server": {"tensorParallelSize": 3}, "multiNode": {"enabled": True}}, "multiNode.size (2) does not divide"),
        ({"server": {"rollingUpdate": {"maxSurge": 0}}}, "server.rollingUpdate"),
        ({"server": {"extraArgs": ["--api-key=secret"]}}, "server.extraArgs: --api-key is the chart's"),
        ({"server": {"extraArgs": ["--shutdown_timeout", "900"]}}, "server.extraArgs: --shutdown_timeout is"),
        ({"server": {"extraArgs": ["-tp=2"]}}, "server.extraArgs: -tp is the chart's"),
        ({"server": {"podLabels": {"app.kubernetes.io/name": "m"}}}, "server.podLabels: app.kubernetes.io/name"),
        ({"server": {"env": {"VLLM_API_KEY": "secret"}}}, "server.env: VLLM_API_KEY is a secret"),
        ({"conversion": {"enabled": True}}, "conversion.model"),
        (merged(CONVERSION, {"conversion": {"hubToken": {"secretName": "a"}}}), "conversion.fromHub"),
        (merged(CONVERSION, {"conversion": {"args": ["--overwrite"]}}), "conversion.args: --overwrite"),
        (merged(CONVERSION, {"conversion": {"args": ["--output=/models/x"]}}), "conversion.args: --output is"),
    ],
)
def test_values_that_contradict_each_other_are_refused(values: Object, said: str) -> None:
    with pytest.raises(helm.HelmError) as refusal:
        render(values)
    assert said in str(refusal.value)


def test_keda_and_the_autoscaler_exclude_each_other() -> None:
    def scalers(kind: str) -> list[str]:
        documents = render({"autoscaling": {"type": kind}})
        [deployment] = of_kind(documents, "Deployment")
        # a number in the manifest would undo what was scaled at every upgrade
        assert ("replicas" in deployment["spec"]) == (kind == "")
        return [d["kind"] for d in documents if d["kind"] in ("ScaledObject", "HorizontalPodAutoscaler")]

    assert [scalers(kind) for kind in ("", "keda", "hpa")] == [[], ["ScaledObject"], ["HorizontalPodAutoscaler"]]


# what holds whatever is rendered


@every_set
def test_nothing_but_a_conversion_can_write_checkpoints(name: str) -> None:
    for template in pod_templates(objects(name)):
        claims = {
            v["name"]: v["persistentVolumeClaim"] for v in template["spec"]["volumes"] if "persistentVolumeClaim" in v
        }
        assert "models" in claims
        for container in containers(template):
            mounts = {mount["name"]: mount for mount in container["volumeMounts"] if mount["name"] in claims}
            assert "models" in mounts
            for volume, mount in mounts.items():
                writes = component(template) == "conversion" and volume == "models"
                assert mount.get("readOnly", False) is not writes
                assert claims[volume].get("readOnly", False) is not writes


@every_set
def test_the_key_is_in_a_secret_and_nowhere_else(name: str) -> None:
    values, documents = values_of(name).get("apiKey", {}), objects(name)
    others = [document for document in documents if document["kind"] != "Secret"]
    if key := values.get("value"):
        [secret] = of_kind(documents, "Secret")
        assert base64.b64decode(secret["data"]["api-key"]).decode() == key
        assert key not in json.dumps(others) and base64.b64encode(key.encode()).decode() not in json.dumps(others)
    for template in pod_templates(documents):
        for container in containers(template):
            assert not any("api-key" in argument for argument in container.get("args", []) + container["command"])
            given = (
                [variable for variable in container["env"] if variable["name"] == "VLLM_API_KEY"]
                if "env" in container
                else []
            )
            if container["name"] == "server" and values:
                [variable] = given
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["key"] == values.get("secretKey", "api-key")
                assert reference["name"] == values.get("secretName", f"{RELEASE}-vllm-requant-api-key")
            else:
                assert given == []


@every_set
def test_a_pod_has_time_to_finish(name: str) -> None:
    documents = objects(name)
    for template in pod_templates(documents):
        grace = template["spec"]["terminationGracePeriodSeconds"]
        [container] = template["spec"]["containers"]
        if component(template) == "conversion":
            assert grace >= 30
            continue
        before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        [drain] = [
            int(argument.removeprefix("--shutdown-timeout="))
            for argument in container_of(documents, "server")["args"]
            if argument.startswith("--shutdown-timeout=")
        ]
        assert before >= 1 and drain >= 1
        if component(template) == "worker":
            # still there when the leader's last request ends
            assert before >= container_of(documents, "server")["lifecycle"]["preStop"]["sleep"]["seconds"] + drain
            assert grace >= before + 30
        else:
            # after the last request processes have to end, which takes vLLM longer than one would think
            assert grace >= before + drain + 30


@every_set
def test_servers_are_probed_patiently(name: str) -> None:
    for template in pod_templates(objects(name)):
        [container] = template["spec"]["containers"]
        probes = {kind: container.get(f"{kind}Probe") for kind in ("startup", "readiness", "liveness")}
        if component(template) != "server":
            assert not any(probes.values())
            continue
        for probe in probes.values():
            # /v1 would ask for a key
            assert probe["httpGet"] == {"path": "/health", "port": "http"}
            assert probe["timeoutSeconds"] > 1
        assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 600
        for deployment in of_kind(objects(name), "Deployment"):
            started = probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"]
            assert deployment["spec"]["progressDeadlineSeconds"] > started
        # an overloaded server drops out of the service before it is killed
        failing = {k: p["periodSeconds"] * p["failureThreshold"] for k, p in probes.items()}
        assert failing["readiness"] < failing["liveness"]


@every_set
def test_every_selector_finds_the_pods_it_means(name: str) -> None:
    documents = objects(name)
    everything = {component(template) for template in pod_templates(documents)}
    serving = everything - {"conversion"}
    for document in documents:
        spec = document.get("spec", {})
        match document["kind"]:
            case "Deployment":
                assert selects(spec["selector"], spec["template"]["metadata"]["labels"])
                assert selected(spec["selector"], documents) == {"server"}
            case "Service":
                # of a group only its leader answers
                assert selected({"matchLabels": spec["selector"]}, documents) == {"server"}
            case "PodMonitor":
                assert selected(spec["selector"], documents) == {"server"}
                labels = template_of(documents, "server")["metadata"]["labels"]
                # rules and dashboards ask for this job
                assert labels[spec["jobLabel"]] == "vllm-requant"
                assert set(spec["podTargetLabels"]) <= set(labels)
            case "PodDisruptionBudget":
                assert selected(spec["selector"], documents) == serving
    isolated = [selected(policy["spec"]["podSelector"], documents) for policy in of_kind(documents, "NetworkPolicy")]
    assert set().union(*isolated) == everything and all(isolated)
    for template in pod_templates(documents):
        for constraint in template["spec"].get("topologySpreadConstraints", []):
            assert selected(constraint["labelSelector"], documents) == {component(template)}


@every_set
def test_what_is_named_elsewhere_is_there(name: str) -> None:
    documents = objects(name)
    for template in pod_templates(documents):
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        mounted = {mount["name"] for container in containers(template) for mount in container["volumeMounts"]}
        assert mounted == volumes
    [account] = of_kind(documents, "ServiceAccount")
    assert all(
        template["spec"]["serviceAccountName"] == account["metadata"]["name"] for template in pod_templates(documents)
    )
    claims = {d["metadata"]["name"] for d in of_kind(documents, "PersistentVolumeClaim")}
    storage = values_of(name).get("storage", {})
    assert claims == (set() if "existingClaim" in storage else {f"{RELEASE}-vllm-requant-models"})
    scaled = of_kind(documents, "Deployment") + of_kind(documents, "LeaderWorkerSet")
    for scaler in of_kind(documents, "ScaledObject") + of_kind(documents, "HorizontalPodAutoscaler"):
        [target] = scaled
        assert scaler["spec"]["scaleTargetRef"] == {
            "apiVersion": target["apiVersion"],
            "kind": target["kind"],
            "name": target["metadata"]["name"],
        }
    if name != "conversion-only":
        ports = {port["name"] for port in container_of(documents, "server")["ports"]}
        [service] = of_kind(documents, "Service")
        used = {port["targetPort"] for port in service["spec"]["ports"]}
        used |= {
            endpoint["port"] for m in of_kind(documents, "PodMonitor") for endpoint in m["spec"]["podMetricsEndpoints"]
        }
        assert used == ports == {"http"}


@every_set
def test_pods_are_restricted(name: str) -> None:
    for key, value in within(objects(name)):
        assert key not in ("hostPath", "hostNetwork", "hostPID", "hostIPC", "hostPort")
        assert (key, value) != ("privileged", True)
    for account in of_kind(objects(name), "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    for template in pod_templates(objects(name)):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(template):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            # device runtimes write into the container
            on_a_device = any("/" in resource for resource in container["resources"]["limits"])
            assert context["readOnlyRootFilesystem"] is not on_a_device
        for container in spec["containers"]:
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
            home = next(variable["value"] for variable in container["env"] if variable["name"] == "HOME")
            assert {home, "/tmp"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
        shared = [volume for volume in spec["volumes"] if volume["name"] == "shm"]
        assert all(volume["emptyDir"]["medium"] == "Memory" for volume in shared)
        assert bool(shared) is (component(template) != "conversion")


@every_set
def test_images_are_pinned(name: str) -> None:
    for template in pod_templates(objects(name)):
        for container in containers(template):
            image = container["image"]
            assert re.search(r"@sha256:[0-9a-f]{64}$|:(?!latest$)[\w.-]+$", image), image


def test_the_image_fits_the_device() -> None:
    image = {name: container_of(objects(name), "server")["image"] for name in ("cpu", "tensor-parallel", "gpu")}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert image["cpu"] == f"vllm-requant:{version}-cpu"
    assert image["tensor-parallel"] == f"vllm-requant:{version}-cuda"
    assert image["gpu"].startswith("registry.example/vllm-requant@sha256:")


# network


@every_set
def test_only_named_peers_get_in(name: str) -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())["networkPolicy"]
    for policy in of_kind(objects(name), "NetworkPolicy"):
        spec = policy["spec"]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        if policy["metadata"]["name"].endswith("-conversion"):
            assert spec["ingress"] == []
        elif policy["metadata"]["name"].endswith("-peers"):
            assert spec["ingress"] == [{"from": [{"podSelector": spec["podSelector"]}]}]
            assert {"to": [{"podSelector": spec["podSelector"]}]} in spec["egress"]
        else:
            [rule] = spec["ingress"]
            assert rule["from"] == defaults["gateway"] + defaults["prometheus"]
            assert rule["ports"] == [{"protocol": "TCP", "port": "http"}]
        # a rule without peers is open to the world; only what fetches a model has one
        world = [rule for rule in spec["egress"] if "to" not in rule]
        fetches = policy["metadata"]["name"].endswith("-conversion") and name == "conversion"
        assert world == ([{"ports": [{"protocol": "TCP", "port": 443}]}] if fetches else [])
        assert all(rule["from"] for rule in spec["ingress"])


def test_without_peers_the_network_is_closed() -> None:
    [policy] = of_kind(render({"networkPolicy": {"gateway": [], "prometheus": [], "dns": []}}), "NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert not policy["spec"]["ingress"] and not policy["spec"]["egress"]


# monitoring


def test_the_rules_are_those_of_prometheus() -> None:
    [rule] = of_kind(objects("gpu"), "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(RULES.read_text())
    assert any("{{ $labels" in value for _, value in within(rule["spec"]) if isinstance(value, str))


def test_the_rules_are_in_the_package(tmp_path: Path) -> None:
    archive = _chart().save(tmp_path)
    with helm.Chart.load(archive) as packed:
        files = {file["name"]: file["data"] for file in packed.files}
    assert RULES.read_bytes() in (base64.b64decode(files["files/rules.yml"]), files["files/rules.yml"].encode())


def test_the_queue_is_that_of_the_release() -> None:
    [scaled] = of_kind(objects("autoscaled-keda"), "ScaledObject")
    [trigger] = scaled["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    assert query.startswith("sum(vllm:num_requests_waiting{")
    [monitor] = of_kind(objects("autoscaled-keda"), "PodMonitor")
    [label] = monitor["spec"]["podTargetLabels"]
    # as Prometheus spells a label of Kubernetes
    assert f'{re.sub("[^a-z]", "_", label)}="{RELEASE}"' in query and f'namespace="{NAMESPACE}"' in query


# upgrades


def test_another_checkpoint_is_a_rolling_update() -> None:
    before, after = (render({"checkpoint": {"name": name}, "server": {"servedModelName": "m"}}) for name in ("a", "b"))
    [old], [new] = of_kind(before, "Deployment"), of_kind(after, "Deployment")
    assert old["spec"]["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    assert container_of(before, "server")["args"][0] == "/models/a"
    changed = deepcopy(new)
    changed["spec"]["template"]["spec"]["containers"][0]["args"][0] = "/models/a"
    assert changed == old != new
    assert [d for d in before if d != old] == [d for d in after if d != new]


@multi_node
def test_groups_are_replaced_without_a_gap(name: str) -> None:
    [group] = of_kind(objects(name), "LeaderWorkerSet")
    assert group["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_another_key_is_another_pod() -> None:
    annotations = [
        template_of(render({"apiKey": {"value": key}}), "server")["metadata"]["annotations"]["checksum/api-key"]
        for key in ("a", "b", "a")
    ]
    assert annotations[0] == annotations[2] != annotations[1]


def test_another_version_of_the_chart_alone_restarts_nothing(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(CHART, tmp_path / "chart"))
    text = (copy / "Chart.yaml").read_text()
    (copy / "Chart.yaml").write_text(re.sub(r"(?m)^version: .*$", "version: 9.9.9", text))
    for name in ("conversion", "multi-node-native"):
        before, after = objects(name), render(values_of(name), copy)
        assert before != after
        assert pod_templates(before) == pod_templates(after)
        assert [job["metadata"]["name"] for job in of_kind(before, "Job")] == [
            job["metadata"]["name"] for job in of_kind(after, "Job")
        ]


def test_another_conversion_is_another_job() -> None:
    def job(*changes: Object) -> str:
        [found] = of_kind(render(merged(values_of("conversion"), *changes)), "Job")
        return found["metadata"]["name"]

    assert job() == job({"server": {"replicas": 3}}) == job({"conversion": {"backoffLimit": 1}})
    others = [
        job({"checkpoint": {"name": "other"}}),
        job({"conversion": {"args": ["--bits", "4"]}}),
        job({"conversion": {"model": "other"}}),
    ]
    assert len({job(), *others}) == 4


# command lines, read by those that will get them


def expanded(container: Object, rank: int = 0) -> list[str]:
    """The command line as the kubelet starts it, in the pod of that rank."""
    variables = {"LWS_WORKER_INDEX": str(rank), "LWS_LEADER_ADDRESS": "demo-0.demo.inference", "LWS_GROUP_SIZE": "2"}
    line = container["command"] + container.get("args", [])
    return [re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], argument) for argument in line]


def run(line: list[str], tmp_path: Path, **environment: str) -> list[list[str]]:
    """Run a container's script with programs that only write down how they were called.

    Returns:
        The command lines of these.
    """
    calls = tmp_path / "calls"
    for program in ("requant", "ray"):
        recorder = tmp_path / program
        # a NUL after each argument, and a line after each call
        recorder.write_text(f'#!/bin/sh\nprintf "%s\\0" "{program}" "$@" >> "{calls}"\necho >> "{calls}"\n')
        recorder.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(line, check=True, timeout=20, env={"PATH": path, **environment})
    written = calls.read_text().splitlines() if calls.exists() else []
    return [call.rstrip("\0").split("\0") for call in written]


def served_by(line: list[str]) -> Any:
    """What vLLM makes of the command line of ``requant serve``."""
    import typer

    from vllm_requant.cli import app
    from vllm_requant.cli.serve import server_arguments
    from vllm_requant.serving.server import parse

    assert line[:2] == ["requant", "serve"]
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    context = command.make_context("serve", line[2:])
    given = server_arguments(context.params["model"], context.args, activation_bits=context.params["activation_bits"])
    [module] = [i for i, argument in enumerate(given) if argument == "-m"]
    pytest.importorskip("vllm", reason="vLLM is not installed")
    vllm, arguments = parse(given[module + 2 :])
    vllm.validate(arguments)
    return arguments


@pytest.mark.parametrize(
    "name", ["default", *(name for name in VALUE_SETS if name not in ("conversion-only", "multi-node-ray"))]
)
def test_requant_serve_accepts_the_servers_arguments(name: str) -> None:
    values = merged(yaml.safe_load((CHART / "values.yaml").read_text()), values_of(name))
    arguments = served_by(expanded(container_of(objects(name), "server")))
    server = values["server"]
    assert arguments.model_tag == f"/models/{values['checkpoint']['name']}"
    assert arguments.served_model_name == [server["servedModelName"] or values["checkpoint"]["name"]]
    assert arguments.port == container_of(objects(name), "server")["ports"][0]["containerPort"]
    assert arguments.shutdown_timeout == values["shutdown"]["drainSeconds"]
    assert arguments.tensor_parallel_size == server["tensorParallelSize"]
    assert arguments.pipeline_parallel_size == server["pipelineParallelSize"]
    assert arguments.max_model_len == server["maxModelLen"]
    assert arguments.api_key is None
    bits = (arguments.additional_config or {}).get("requant", {}).get("activation_bits", 16)
    assert bits == server["activationBits"]


def test_native_ranks_agree_and_workers_have_no_frontend() -> None:
    documents = objects("multi-node-native")
    leader = served_by(expanded(container_of(documents, "server"), 0))
    worker = served_by(expanded(container_of(documents, "worker"), 1))
    assert (leader.node_rank, worker.node_rank) == (0, 1) and worker.headless and not leader.headless
    assert worker.model_tag == leader.model_tag
    own = {"node_rank", "headless", "host", "port", "shutdown_timeout"}
    own |= {"disable_access_log_for_endpoints", "disable_fastapi_docs"}
    shared = (vars(leader).keys() & vars(worker).keys()) - own
    assert {"nnodes", "master_addr", "master_port", "tensor_parallel_size", "quantization"} <= shared
    assert {key: vars(leader)[key] for key in shared} == {key: vars(worker)[key] for key in shared}
    [group] = of_kind(documents, "LeaderWorkerSet")
    assert leader.nnodes == group["spec"]["leaderWorkerTemplate"]["size"]


def test_a_ray_leader_starts_a_cluster_and_serves(tmp_path: Path) -> None:
    line = expanded(container_of(objects("multi-node-ray"), "server"))
    ray, server = run(line, tmp_path, VLLM_HOST_IP="10.0.0.7")
    assert ray[:2] == ["ray", "start"]
    assert {"--head", "--port=6379", "--node-ip-address=10.0.0.7"} <= set(ray)
    assert "--block" not in ray
    arguments = served_by(server)
    assert arguments.distributed_executor_backend == "ray" and arguments.nnodes == 1
    assert (arguments.tensor_parallel_size, arguments.pipeline_parallel_size) == (4, 3)
    assert arguments.additional_config == {"requant": {"activation_bits": 8}}


def test_a_ray_worker_waits_for_its_leader(tmp_path: Path) -> None:
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        port = head.getsockname()[1]
        container = container_of(
            render(merged(values_of("multi-node-ray"), {"multiNode": {"rayPort": port}})), "worker"
        )
        line = [argument.replace("demo-0.demo.inference", "127.0.0.1") for argument in expanded(container, 1)]
        # nobody listens yet
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(line, timeout=1.5, env={"PATH": os.environ["PATH"]})
        head.listen()
        [ray] = run(line, tmp_path, VLLM_HOST_IP="10.0.0.8")
    assert ray[:2] == ["ray", "start"]
    assert {f"--address=127.0.0.1:{port}", "--node-ip-address=10.0.0.8", "--block"} <= set(ray)


@pytest.mark.parametrize("name", ["conversion", "conversion-only"])
def test_the_job_begins_goes_on_or_has_nothing_to_do(name: str, tmp_path: Path) -> None:
    import typer

    from vllm_requant.cli import app

    values = merged(values_of(name), {"storage": {"mountPath": str(tmp_path / "models")}})
    line = expanded(container_of(render(values), "conversion"))
    output = tmp_path / "models" / values["checkpoint"]["name"]
    output.parent.mkdir()

    def converted() -> Object:
        (tmp_path / "calls").unlink(missing_ok=True)
        [call] = run(line, tmp_path)
        assert call[:2] == ["requant", "convert"]
        command = typer.main.get_command(app).commands["convert"]  # type: ignore[attr-defined]
        return command.make_context("convert", call[2:]).params

    first = converted()
    assert (first["model"], first["output"]) == (values["conversion"]["model"], output)
    assert first["resume"] is False and first["overwrite"] is False and first["work_dir"] is None
    if name == "conversion":
        assert (first["bits"], first["base"], first["stream"]) == (3, "qtip", True)
    else:
        assert (first["target_bpw"], first["low_memory"]) == (4.25, True)

    # as an earlier pod left it
    from vllm_requant.offline.work import default_folder

    work = default_folder(output)
    work.mkdir()
    assert converted() == first
    (work / "arguments.json").write_text("{}")
    assert converted() == first | {"resume": True}

    output.mkdir()
    (output / "config.json").write_text("{}")
    (tmp_path / "calls").unlink()
    assert run(line, tmp_path) == []


def test_failed_conversions_are_tried_again_unless_it_is_of_no_use() -> None:
    [job] = of_kind(objects("conversion"), "Job")
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    usage, eviction = job["spec"]["podFailurePolicy"]["rules"]
    assert usage["action"] == "FailJob" and usage["onExitCodes"]["values"] == [2]
    assert usage["onExitCodes"]["containerName"] == container_of(objects("conversion"), "conversion")["name"]
    assert eviction["action"] == "Ignore"


def test_a_server_waits_for_the_checkpoint_that_is_being_made(tmp_path: Path) -> None:
    values = merged(values_of("conversion"), {"storage": {"mountPath": str(tmp_path)}})
    [waiting] = template_of(render(values), "server")["spec"]["initContainers"]
    folder = tmp_path / values["checkpoint"]["name"]
    line = expanded(waiting)
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(line, timeout=1)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    subprocess.run(line, check=True, timeout=10)
    assert "initContainers" not in template_of(objects("cpu"), "server")["spec"]


def test_a_gated_model_gets_its_token_and_a_local_one_no_hub() -> None:
    gated = {variable["name"]: variable for variable in container_of(objects("conversion"), "conversion")["env"]}
    assert gated["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}
    assert "HF_HUB_OFFLINE" not in gated
    local = {variable["name"]: variable for variable in container_of(objects("conversion-only"), "conversion")["env"]}
    assert local["HF_HUB_OFFLINE"]["value"] == "1" and "HF_TOKEN" not in local


def test_only_leaders_get_the_key_and_have_a_port() -> None:
    documents = objects("multi-node-native")
    worker = container_of(documents, "worker")
    assert "ports" not in worker
    assert "VLLM_API_KEY" in {variable["name"] for variable in container_of(documents, "server")["env"]}


def test_extra_manifests_are_expanded() -> None:
    [notes] = of_kind(objects("conversion"), "ConfigMap")
    assert notes["metadata"]["name"] == f"{RELEASE}-notes"
    assert notes["data"] == {"checkpoint": "llama-1b-3bit"}


@every_set
def test_notes_say_what_is_open(name: str) -> None:
    texts = _chart().render(values_of(name), name=RELEASE, namespace=NAMESPACE)
    [notes] = [text for path, text in texts.items() if path.endswith("NOTES.txt")]
    serves = values_of(name).get("server", {}).get("enabled", True)
    assert ("No API key is set" in notes) == (serves and "apiKey" not in values_of(name))
    assert f"-n {NAMESPACE}" in notes
