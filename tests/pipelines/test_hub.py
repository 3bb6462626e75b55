"""Push a pipeline to the stand-in Hub and load it by its name, each in a new process."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import TOKEN, StandInHub
from new_process import run_forked
from small_parts import error_message
from tiny_models import seeded, tiny_pipeline

from pipelines.latent_generation import LatentGenerationPipeline
from training_harness.errors import UserError

BEGIN = """
import json, sys, torch
from PIL import Image
from pipelines import LatentGenerationPipeline
from training_harness.errors import UserError

def error_message(call):
    try:
        call()
    except UserError as error:
        return str(error)
"""

PUSH = """
pipeline = LatentGenerationPipeline.from_pretrained("pipeline")
grid = Image.new("L", (8, 8))
print(json.dumps({
    "first": pipeline.push_to_hub("stand-in/tiny", metrics={"psnr": 20.0}, samples=grid),
    "unchanged": pipeline.push_to_hub("stand-in/tiny", metrics={"psnr": 20.0}, samples=grid),
    "second": pipeline.push_to_hub("stand-in/tiny", metrics={"psnr": 21.0}, samples=grid, commit_message="Better"),
    "private": pipeline.push_to_hub("stand-in/secret", private=True),
    "nameless": pipeline.push_to_hub("plain"),
    "bad name": error_message(lambda: pipeline.push_to_hub("a/b/c")),
    "refused": error_message(lambda: pipeline.push_to_hub("stand-in/refused", token="hf_of_nobody")),
    "no token": error_message(lambda: pipeline.push_to_hub("stand-in/refused", token=False)),
}))
"""

EDIT = """
from huggingface_hub import HfApi, hf_hub_download
pipeline = LatentGenerationPipeline.from_pretrained("pipeline")
pipeline.push_to_hub("stand-in/mine", metrics={"psnr": 20.0})
card = open(hf_hub_download("stand-in/mine", "README.md"), encoding="utf-8").read()
edited = card.replace("library_name", "license: mit\\nlibrary_name") + "\\nA sentence of mine.\\n"
HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="stand-in/mine")
pipeline.push_to_hub("stand-in/mine", metrics={"psnr": 21.0})
print(json.dumps({}))
"""

PULL = """
images = {}
for name, token in (("stand-in/tiny", None), ("stand-in/secret", True), ("stand-in/plain", None)):
    pipeline = LatentGenerationPipeline.from_pretrained(name, token=token)
    images[name] = pipeline("dog", 3, generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.save(images, "images.pt")
load = LatentGenerationPipeline.from_pretrained
first = sys.argv[1]
load("stand-in/tiny", revision=first, cache_dir="another cache")
print(json.dumps({
    "missing": error_message(lambda: load("stand-in/nothing")),
    "secret": error_message(lambda: load("stand-in/secret", token="hf_of_nobody", cache_dir="third cache")),
    "revision": error_message(lambda: load("stand-in/tiny", revision="nowhere")),
}))
"""


class HubSession:
    """Results of one push and one pull, shared by all tests."""

    def __init__(self, hub: StandInHub, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        tiny_pipeline().save_pretrained(folder / "pipeline")
        self.pushed = self.run(PUSH)
        self.pulled = self.run(PULL, self.pushed["first"].rpartition("/")[2])

    def run(self, program: str, *arguments: str) -> dict[str, Any]:
        environment = self.hub.environment(self.folder / "home")
        process = run_forked("-c", BEGIN + program, *arguments, folder=self.folder, **environment)
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubSession]:
    with StandInHub() as hub:
        yield HubSession(hub, tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("name", ["stand-in/tiny", "stand-in/secret", "stand-in/plain"])
def test_a_pushed_pipeline_samples_the_same_images_when_loaded_by_its_name(session: HubSession, name: str) -> None:
    images = torch.load(session.folder / "images.pt", weights_only=True)[name]
    expected = tiny_pipeline()("dog", 3, generator=seeded(0), output_type="pt").images
    assert torch.equal(images, expected)


def test_the_repository_holds_the_files_of_the_pipeline_and_a_card_with_its_name(session: HubSession) -> None:
    files = session.hub.repos["stand-in/tiny"].files
    parts = {f"{part}/{file}" for part in ("tokenizer", "prior") for file in ("config.json", "model.safetensors")}
    assert set(files) == parts | {"model_index.json", "README.md", "metrics.json", "samples.png"}
    assert 'from_pretrained("stand-in/tiny")' in files["README.md"].decode()


def test_a_name_without_owner_belongs_to_the_user_and_the_card_has_the_full_name(session: HubSession) -> None:
    assert 'from_pretrained("stand-in/plain")' in session.hub.repos["stand-in/plain"].files["README.md"].decode()


def test_pushing_again_commits_changes_and_an_unchanged_pipeline_makes_no_commit(session: HubSession) -> None:
    first, unchanged, second = (session.pushed[name] for name in ("first", "unchanged", "second"))
    assert first == unchanged != second
    repo = session.hub.repos["stand-in/tiny"]
    assert len(repo.commits) == 3  # the empty commit, the first and the second push
    assert first.endswith(list(repo.commits)[1])
    assert json.loads(repo.files["metrics.json"]) == {"psnr": 21.0}


def test_text_that_the_owner_added_to_the_card_stays_when_the_pipeline_is_pushed_again(session: HubSession) -> None:
    session.run(EDIT)
    card = session.hub.repos["stand-in/mine"].files["README.md"].decode()
    assert card.startswith("---\nlicense: mit\n")
    assert card.endswith("\nA sentence of mine.\n")
    assert "21.00" in card
    assert "20.00" not in card


def test_a_private_repository_is_private(session: HubSession) -> None:
    assert session.hub.repos["stand-in/secret"].private
    assert not session.hub.repos["stand-in/tiny"].private
    assert "stand-in/secret is neither a local folder nor a pipeline on the Hub" in session.pulled["secret"]


@pytest.mark.parametrize("case", ["missing", "secret", "revision"])
def test_a_failed_pull_is_a_one_line_error_that_says_what_to_do(session: HubSession, case: str) -> None:
    message = session.pulled[case]
    assert message is not None
    assert "\n" not in message
    assert "expected a folder or a repository that you can read; run `hf auth login` if it is private" in message


@pytest.mark.parametrize("case", ["bad name", "refused", "no token"])
def test_a_rejected_push_is_a_one_line_error_that_says_what_to_do(session: HubSession, case: str) -> None:
    message = session.pushed[case]
    assert message is not None
    assert message.startswith("could not push to ")
    assert "\n" not in message
    assert "log in with `hf auth login` or set HF_TOKEN" in message
    assert TOKEN not in message
    assert "stand-in/refused" not in session.hub.repos


def test_the_error_for_a_push_in_offline_mode_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set") as caught:
        tiny_pipeline().push_to_hub("me/tiny", token="hf_x")
    error_message(caught)


def test_an_unreachable_hub_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port, where no server listens
    with pytest.raises(UserError, match="could not push to me/tiny") as push_error:
        tiny_pipeline().push_to_hub("me/tiny", token="hf_x")
    with pytest.raises(UserError, match="me/tiny is neither a local folder nor a pipeline on the Hub") as pull_error:
        LatentGenerationPipeline.from_pretrained("me/tiny", cache_dir=tmp_path)
    assert "\n" not in f"{push_error.value}{pull_error.value}"
