"""YAML, shell scripts and documents of deploy/."""

import re
from pathlib import Path

import pytest

from tests.deploy.tools import DEPLOY, ROOT, program, run

DOCUMENTS = sorted(DEPLOY.rglob("*.md"))


def test_yaml_is_tidy() -> None:
    assert run(program("yamllint"), "--strict", "-c", DEPLOY / ".yamllint", DEPLOY) == ""


def test_shell_scripts_are_clean() -> None:
    scripts = [ROOT / ".ci" / "run", *DEPLOY.rglob("*.sh")]
    run(program("shellcheck"), *scripts)


def anchors(document: Path) -> set[str]:
    """Those that headings make."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", document.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(DEPLOY)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(DEPLOY)))
def test_files_that_commands_name_exist(document: Path) -> None:
    for name in re.findall(r"(?<![\w/.])(deploy/[\w./-]+\w)", document.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name
