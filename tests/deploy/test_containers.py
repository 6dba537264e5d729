"""Images and compose files: valid, in step with the project, and the steps of the build replayed without an engine."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.tools import DEPLOY, ROOT, program, run

DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile.*"))
COMPOSE = DEPLOY / "compose"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def stages(dockerfile: Path, folder: Path) -> list[list[tuple[str, str]]]:
    """Instructions and their values by stage; what comes before the first is left out."""
    parser = pytest.importorskip("dockerfile_parse").DockerfileParser(path=str(folder), fileobj=None, env_replace=False)
    parser.content = dockerfile.read_text()
    found: list[list[tuple[str, str]]] = []
    for line in parser.structure:
        if line["instruction"] == "FROM":
            found.append([])
        if found and line["instruction"] != "COMMENT":
            found[-1].append((line["instruction"], line["value"]))
    return found


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the checkout out of the build; knows the patterns that stand there."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
            if re.match(rf"{pattern}(/|$)", path):
                out = not line.startswith("!")
    return out


def test_images_are_built_as_hadolint_likes_it() -> None:
    assert len(DOCKERFILES) == 2
    run(program("hadolint"), "--failure-threshold", "info", *DOCKERFILES)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda file: file.suffix[1:])
def test_images_are_what_the_readme_says(dockerfile: Path, tmp_path: Path) -> None:
    build, final = stages(dockerfile, tmp_path)
    assert build[0][1] == "${BASE} AS wheel"
    assert final[0][1] == "${BASE}"
    values = {instruction: value for instruction, value in final}  # the last of each
    assert values["USER"] == "2000:0"
    assert json.loads(values["ENTRYPOINT"]) == ["requant"]
    assert "/health" in values["HEALTHCHECK"]
    copied = [value for instruction, value in final if instruction in ("COPY", "ADD")]
    assert copied == ["--from=wheel /wheels /wheels"], "no model in it"
    extras = {extra: set(PROJECT["optional-dependencies"][extra]) for extra in ("cpu", "cuda")}
    vllm = {name for extra in extras.values() for name in extra if name.startswith("vllm")}
    (install,) = [value for instruction, value in final if "pip install" in value]
    assert set(re.findall(r'"([\w-]+[<>=][^"]*)"', install)) == extras["cpu"] - vllm == extras["cuda"] - vllm
    # the tag is a vLLM that the extra allows
    (base,) = re.findall(r"(?m)^ARG BASE=(\S+)$", dockerfile.read_text())
    version = re.search(r":v(\d+\.\d+)\.", base)
    assert version is not None and any(version[1] in requirement for requirement in vllm)


def test_both_images_are_made_alike(tmp_path: Path) -> None:
    assert stages(DOCKERFILES[0], tmp_path) == stages(DOCKERFILES[1], tmp_path)


def test_what_is_copied_exists_and_is_not_ignored(tmp_path: Path) -> None:
    for value in copied_from_the_checkout(tmp_path):
        assert (ROOT / value).exists(), value
        assert not ignored(value), value
    for path in (
        "vllm_requant/cli/serve.py",
        "kernels/cpu/avx2.cpp",
        "offline/recipes/x.toml",
        "kernels/gpu/tuned/a.json",
    ):
        assert not ignored(path)
    for path in (".git/config", ".venv/bin/python", "tests/tiny.py", "deploy/docker/Dockerfile.cpu", ".cache/x", "run"):
        assert ignored(path)
    for path in ("kernels/cpu/_kernels.abi3.so", "vllm_requant/cli/__pycache__/x.pyc", "kernels/bench/results/x.json"):
        assert ignored(path)


def copied_from_the_checkout(folder: Path) -> list[str]:
    build, _ = stages(DOCKERFILES[0], folder)
    return [source for instruction, value in build if instruction == "COPY" for source in value.split()[:-1]]


@pytest.mark.timeout(300)
def test_the_steps_of_the_build_run(tmp_path: Path) -> None:
    """Those of both stages, of the files that are copied and no others, in an environment of their own.

    Three things differ. What the base image brings (torch, vLLM) is this environment's, seen through a .pth file, so
    that nothing is downloaded: pip gets no index, no isolation for the build and no dependencies. The native code is
    compiled without optimization, which takes a sixth of the time. apt-get and useradd are left out.
    """
    context, wheels, base = tmp_path / "src", tmp_path / "wheels", tmp_path / "base"
    context.mkdir()
    wheels.mkdir()
    for source in copied_from_the_checkout(tmp_path):
        for path in [ROOT / source] if (ROOT / source).is_file() else sorted((ROOT / source).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if (path.is_file() or path.is_symlink()) and not ignored(name):
                (context / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, context / name, follow_symlinks=False)
    assert not list(context.rglob("*.so"))
    project = context / "pyproject.toml"
    project.write_text(project.read_text().replace('"-O3"', '"-O0"'))

    run(sys.executable, "-m", "venv", "--without-pip", base)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(base), "platbase": str(base)}))
    (site / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {"PATH": f"{base / 'bin'}:{os.environ['PATH']}", "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
    replayed = []
    build, final = stages(DOCKERFILES[0], tmp_path)
    for folder, (instruction, value) in [(context, step) for step in build] + [(tmp_path, step) for step in final]:
        if instruction != "RUN" or "apt-get" in value or "useradd" in value:
            continue
        command = value.replace("/wheels", str(wheels)).replace("--no-cache-dir", "--no-cache-dir -q")
        command = command.replace("pip wheel", "pip wheel --no-build-isolation")
        # by hand: the checkout, installed in this environment, would count as the same version
        command = command.replace("pip install", "pip install --no-deps --ignore-installed").replace(
            '"gguf>=0.17" "accelerate>=1.10"', ""
        )
        command = command.replace("rm -r", "ls")
        replayed.append((command, run("sh", "-euc", command, cwd=folder, **environment)))
    (wheel,) = wheels.glob("*.whl")
    assert re.fullmatch(r"vllm_requant-[\d.]+-cp311-abi3-linux_x86_64\.whl", wheel.name)
    assert [command.split()[0] for command, _ in replayed] == ["python3", "python3", "requant"]
    assert replayed[-1][1].startswith(f"requant {PROJECT['version']}")

    # what was loaded is the wheel's, native libraries included, and it computes
    code = """
import torch, vllm_requant
from vllm_requant import kernels
from vllm_requant.kernels import cpu
from vllm_requant.offline import native
print(vllm_requant.__file__, cpu.__file__, native.__file__, kernels.kernel_path("uniform", "cpu"), sep="\\n")
"""
    lines = run(base / "bin" / "python", "-c", code, cwd=tmp_path, **environment).splitlines()
    assert all(line.startswith(str(site)) for line in lines[-4:-1]), lines
    assert lines[-1].startswith("cpu-")
    installed = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert {"vllm_requant/kernels/cpu/_kernels.abi3.so", "vllm_requant/offline/native/_native.abi3.so"} <= installed
    assert {"vllm_requant/kernels/gpu/cuda/matvec.cu", "vllm_requant/offline/native/viterbi.cu"} <= installed
    plugins = run(base / "bin" / "python", "-c", PLUGINS, cwd=tmp_path, **environment).split()
    assert plugins == ["vllm_requant.serving:register", "vllm_requant.serving.metrics:RequantMetrics"]


PLUGINS = """
from importlib.metadata import entry_points
for group in ("vllm.general_plugins", "vllm.stat_logger_plugins"):
    print(*{entry.value for entry in entry_points(group=group) if entry.name == "requant"})
"""


def compose(*files: str) -> dict[str, Any]:
    """The services of one file over another, variables as in .env.example."""
    yaml = pytest.importorskip("yaml")
    settings = {"VLLM_API_KEY": "secret", "GRAFANA_PASSWORD": "secret"}
    for line in (COMPOSE / ".env.example").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            settings[name] = value or settings.get(name, "")

    def value(match: re.Match[str]) -> str:
        name, operator, rest = match.groups()
        if operator == ":?":
            return settings[name]
        return settings.get(name, rest or "")

    services: dict[str, Any] = {}
    for file in files:
        text = re.sub(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}", value, (COMPOSE / file).read_text(encoding="utf-8"))
        assert "${" not in text
        for name, service in yaml.safe_load(text)["services"].items():
            services[name] = services.get(name, {}) | service
    return services


def test_compose_files_follow_the_specification() -> None:
    run(program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", *sorted(COMPOSE.glob("*.yaml")))


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")], ids=["cpu", "gpu"])
def test_services_are_closed(files: tuple[str, ...]) -> None:
    services = compose(*files)
    assert set(services) == {"convert", "server", "server-next", "gateway", "node-exporter", "prometheus", "grafana"}
    for name, service in services.items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service and "network_mode" not in service
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith(".") and source != "./models":
                assert (COMPOSE / source).exists(), source
    server, convert = services["server"], services["convert"]
    assert server["user"] == convert["user"] == "2000:0"
    assert "./models:/models:ro" in server["volumes"], "the server cannot write there"
    assert "./models:/models" in convert["volumes"]
    assert convert["profiles"] == ["convert"]
    assert "secret" not in json.dumps(server["command"]), "the key is in the environment"
    assert server["environment"]["VLLM_API_KEY"] == "secret"
    assert (server["build"]["context"], "gpu" in files[-1]) == ("../..", "cuda" in server["build"]["dockerfile"])
    assert (COMPOSE / "../.." / server["build"]["dockerfile"]).is_file()
    assert ("deploy" in server) == ("gpu" in files[-1])
    following = services["server-next"]
    assert following["profiles"] == ["upgrade"]
    alike = [{key: value for key, value in one.items() if key not in ("command", "ports", "profiles")}
             for one in (server, following)]  # fmt: skip
    assert alike[0] == alike[1]
    commands = [re.sub(r"serve /models/\S*", "", one["command"]).split() for one in (server, following)]
    assert commands[0] == commands[1]
    assert following["ports"] == []


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")], ids=["cpu", "gpu"])
def test_a_compose_program_reads_the_same(files: tuple[str, ...], tmp_path: Path) -> None:
    """Debian's, which needs no engine for it; it is older than ``name``, which the copy leaves out."""
    yaml = pytest.importorskip("yaml")
    program("docker-compose")
    shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("helm", ".env"))
    folder = tmp_path / "deploy" / "compose"
    main = folder / "compose.yaml"
    main.write_text(re.sub(r"(?m)^name: .*\n", "", main.read_text()))
    secrets = {"VLLM_API_KEY": "secret", "GRAFANA_PASSWORD": "secret"}
    command = [program("docker-compose"), "--env-file", ".env.example"]
    command += [word for profile in ("convert", "upgrade", "gateway") for word in ("--profile", profile)]
    command += [word for file in files for word in ("-f", file)]
    read = yaml.safe_load(run(*command, "config", cwd=folder, **secrets))["services"]
    ours = compose(*files)
    assert read.keys() == ours.keys()
    for name, service in read.items():
        assert service["image"] == ours[name]["image"]
        assert service.get("read_only") == ours[name].get("read_only")
        words = [one.get("command", []) for one in (service, ours[name])]
        assert len({" ".join(shlex.split(one) if isinstance(one, str) else one) for one in words}) == 1
        variables = [one.get("environment", {}) for one in (service, ours[name])]
        assert len({tuple(sorted((key, str(value)) for key, value in one.items())) for one in variables}) == 1
    without = subprocess.run([*command, "config"], cwd=folder, capture_output=True, text=True)
    assert without.returncode != 0, "secrets are asked for"
    assert "see .env.example" in without.stderr


def test_the_gateway_of_compose_is_configured(tmp_path: Path) -> None:
    """With this machine in the place of the service's name, which only compose knows."""
    for file in ("nginx.conf", "../compose/nginx/upstream.conf", "../compose/nginx/listen.conf"):
        text = (DEPLOY / "nginx" / file).read_text().replace("server server:8000", "server 127.0.0.1:8000")
        (tmp_path / Path(file).name).write_text(text.replace("/tmp/", f"{tmp_path}/"))
    assert "syntax is ok" in run(program("nginx"), "-t", "-c", tmp_path / "nginx.conf")


def test_the_conversion_of_compose_is_a_command_that_exists(tmp_path: Path) -> None:
    """On a folder that is no model: flags are parsed and metrics files looked at before it is found out."""
    words = shlex.split(compose("compose.yaml")["convert"]["command"])
    assert words[:2] == ["convert", "/models/SmolLM2-135M-Instruct"]
    words = [word.replace("/models", str(tmp_path)).replace("/metrics", str(tmp_path)) for word in words]
    done = subprocess.run([sys.executable, "-m", "vllm_requant.cli", *words], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "SmolLM2-135M-Instruct" in done.stderr
    assert "No such option" not in done.stderr


def test_secrets_are_asked_for_and_kept_out_of_git() -> None:
    text = (COMPOSE / "compose.yaml").read_text()
    example = (COMPOSE / ".env.example").read_text()
    for name in ("VLLM_API_KEY", "GRAFANA_PASSWORD"):
        assert f"${{{name}:?" in text
        assert f"\n{name}=\n" in example
    assert run("git", "check-ignore", "deploy/compose/.env").strip() == "deploy/compose/.env"
