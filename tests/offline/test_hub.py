"""``requant convert --push-to-hub``: refused before any work, and nothing but a finished folder is uploaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests import tiny
from vllm_requant.cli import app
from vllm_requant.offline import hub, save

FAST = ("--base", "rtn", "--outliers", "0", "--significant", "0")


class Hub:
    """In the place of ``HfApi``; remembers what it was asked for.

    Attributes:
        me: answer to ``whoami``.
        made: repositories, with whether they are private.
        files: what was uploaded.
    """

    def __init__(self) -> None:
        self.me: dict[str, Any] = {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": "write"}}}
        self.made: list[tuple[str, bool]] = []
        self.files: dict[str, bytes] = {}
        self.failure: Exception | None = None

    def whoami(self) -> dict[str, Any]:
        if self.failure:
            raise self.failure
        return self.me

    def create_repo(self, repo: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        assert (repo_type, exist_ok) == ("model", True)
        self.made.append((repo, private))

    def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> Any:
        if self.failure:
            raise self.failure
        assert repo_id == self.made[-1][0]
        self.files = {str(path.relative_to(folder_path)): path.read_bytes() for path in folder_path.rglob("*")}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Hub:
    there = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: there)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    return there


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


def convert(source: Path, output: Path, *flags: str) -> Result:
    return CliRunner().invoke(app, ["convert", str(source), "-o", str(output), *FAST, *flags])


def test_exactly_the_files_of_the_folder_are_uploaded(fake: Hub, source: Path, tmp_path: Path) -> None:
    done = convert(source, tmp_path / "out", "--push-to-hub", "us/model", "--private")
    assert done.exit_code == 0, done.output
    assert "uploaded to https://hub/us/model" in done.stdout
    assert fake.made == [("us/model", True)]
    assert fake.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "README.md", "SHA256SUMS"} <= set(fake.files)


def test_nothing_is_uploaded_unless_asked_for(fake: Hub, source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "out").exit_code == 0
    assert convert(source, tmp_path / "other", "--push-to-hub", "me/model", "--dry-run").exit_code == 0
    assert (fake.made, fake.files) == ([], {})


def test_nothing_is_uploaded_when_the_conversion_fails(
    fake: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(save, "write_tensors", broken)
    assert convert(source, tmp_path / "out", "--push-to-hub", "me/model").exit_code == 1
    assert (fake.made, fake.files) == ([], {})


def test_a_failed_upload_leaves_the_checkpoint_and_says_how_to_go_on(
    fake: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "whoami", lambda: fake.me)
    fake.failure = ConnectionError("connection\nlost")
    done = convert(source, tmp_path / "out", "--push-to-hub", "me/model")
    assert done.exit_code == 1
    out = tmp_path / "out"
    assert f"connection lost; {out} is complete, upload it with: hf upload me/model {out}" in done.stderr
    assert (out / "config.json").exists()


@pytest.mark.parametrize(
    ("repo", "says"),
    [
        ("model", "write OWNER/NAME"),
        ("me/a/b", "Repo id must be"),
        ("me/mo del", "Repo id must use"),
        ("them/model", "the token is of me, who may write to me, us"),
    ],
)
def test_repositories_that_cannot_be_written_are_refused_first(
    fake: Hub, source: Path, tmp_path: Path, repo: str, says: str
) -> None:
    done = convert(source, tmp_path / "out", "--push-to-hub", repo)
    assert done.exit_code == 1
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_tokens_that_cannot_write_are_refused_first(
    fake: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(message: str) -> None:
        done = convert(source, tmp_path / "out", "--push-to-hub", "me/model")
        assert done.exit_code == 1
        assert message in done.stderr
        assert not (tmp_path / "out").exists()

    fake.me["auth"]["accessToken"]["role"] = "read"
    says("may only read")
    fake.failure = OSError("no token found")
    says("hf auth login")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    says("HF_HUB_OFFLINE is set")


def test_private_alone_is_refused(source: Path, tmp_path: Path) -> None:
    done = convert(source, tmp_path / "out", "--private")
    assert done.exit_code == 2
    assert "goes with --push-to-hub" in done.stderr
