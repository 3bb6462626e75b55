"""The real Hub client pushes to and pulls from the stand-in Hub, and gets the errors of the real Hub.

Each test runs its client in a new process (see hub_stand_in) and reads the JSON in the last line of its output.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from textwrap import dedent
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener
from urllib.request import Request as HTTPRequest

import pytest
from hub_stand_in import TOKEN, StandInHub

pytestmark = pytest.mark.slow  # of the stand-in only: what the project does with a Hub is tested in test_hub

REPO = "stand-in/tiny"
FILES = {
    "README.md": "---\nlicense: apache-2.0\n---\n# ein Häuschen\n".encode(),
    "decoder/config.json": b'{"width": 8}',
    "decoder/model.safetensors": (8).to_bytes(8, "little")
    + b"{}      "
    + bytes(range(256)) * 4096,  # 1 MiB of "weights"
}
PUSH = f"""
    from huggingface_hub import HfApi
    HfApi().create_repo("{REPO}", exist_ok=True)
    result = HfApi().upload_folder(repo_id="{REPO}", folder_path="pushed").oid
"""

Client = Callable[..., Any]


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with StandInHub() as hub:
        yield hub


@pytest.fixture
def client(hub: StandInHub, tmp_path: Path) -> Client:
    """Return a function that runs code in a new process and returns its `result`; the folder has FILES in `pushed/`."""
    for name, content in FILES.items():
        (tmp_path / "pushed" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pushed" / name).write_bytes(content)

    def run(code: str, token: str | None = TOKEN) -> Any:
        environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": token or ""}
        program = dedent(code) + "\nimport json\nprint(json.dumps(result))"
        completed = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert completed.returncode == 0, completed.stderr
        return json.loads(completed.stdout.splitlines()[-1])

    return run


def errors_of(*calls: str) -> str:
    """Return code whose result has, for each call, the class and HTTP status of its exception, or None."""
    return f"""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    def error_of(call):
        try:
            call()
        except Exception as error:
            return [type(error).__name__, error.response.status_code]
    result = [error_of(call) for call in ({"".join(f"lambda: {call}, " for call in calls)})]
    """


def test_a_pushed_folder_comes_back_byte_for_byte(hub: StandInHub, client: Client, tmp_path: Path) -> None:
    client(PUSH)
    listed, snapshot, single, info = client(f"""
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        info = HfApi().model_info("{REPO}")
        result = [
            HfApi().list_repo_files("{REPO}"),
            snapshot_download("{REPO}"),
            hf_hub_download("{REPO}", "decoder/model.safetensors", cache_dir="another cache"),
            [info.id, info.sha, [sibling.rfilename for sibling in info.siblings]],
        ]
    """)
    assert hub.repos[REPO].files == FILES
    assert listed == sorted(FILES)
    assert info == [REPO, hub.repos[REPO].head, sorted(FILES)]
    downloaded = {
        str(path.relative_to(snapshot)): path.read_bytes() for path in Path(snapshot).rglob("*") if path.is_file()
    }
    assert downloaded == FILES
    assert (tmp_path / single).read_bytes() == FILES["decoder/model.safetensors"]


def test_only_the_weights_use_lfs(hub: StandInHub, client: Client) -> None:
    client(PUSH)
    assert list(hub.objects) == [sha256(FILES["decoder/model.safetensors"]).hexdigest()]
    assert {path: blob.lfs for path, blob in hub.repos[REPO].commits[hub.repos[REPO].head].items()} == {
        path: path.endswith(".safetensors") for path in FILES
    }


def test_a_second_push_commits_only_changed_files(hub: StandInHub, client: Client, tmp_path: Path) -> None:
    first = client(PUSH)
    (tmp_path / "pushed/decoder/config.json").write_bytes(b'{"width": 16}')
    second = client(PUSH)
    assert client(PUSH) == second != first
    assert list(hub.repos[REPO].commits)[1:] == [first, second]
    assert hub.repos[REPO].files == FILES | {"decoder/config.json": b'{"width": 16}'}
    assert [method for method, _ in hub.requests].count("PUT") == 1, "the weights were uploaded again"
    texts = client(f"""
        from huggingface_hub import hf_hub_download
        revisions = ("{first}", "main", "{second}")
        files = [hf_hub_download("{REPO}", "decoder/config.json", revision=revision) for revision in revisions]
        result = [open(file).read() for file in files]
    """)
    assert texts == ['{"width": 8}', '{"width": 16}', '{"width": 16}']


def test_files_and_folders_can_be_deleted(hub: StandInHub, client: Client) -> None:
    client(PUSH)
    remaining = client(f"""
        from huggingface_hub import HfApi
        HfApi().delete_file("README.md", "{REPO}")
        after_the_file = HfApi().list_repo_files("{REPO}")
        HfApi().delete_folder("decoder", "{REPO}")
        result = [after_the_file, HfApi().list_repo_files("{REPO}")]
    """)
    assert remaining == [["decoder/config.json", "decoder/model.safetensors"], []]


def test_missing_repos_files_and_revisions_raise_the_errors_of_the_real_hub(client: Client) -> None:
    client(PUSH)
    missing = errors_of(
        'snapshot_download("stand-in/nowhere")',
        'HfApi().model_info("stand-in/nowhere")',
        f'HfApi().dataset_info("{REPO}")',
        f'hf_hub_download("{REPO}", "nothing.bin")',
        f'list(HfApi().list_repo_tree("{REPO}", "nothing"))',
        f'hf_hub_download("{REPO}", "README.md", revision="{"0" * 40}")',
        f'hf_hub_download("{REPO}", "README.md")',
    )
    no_repo, no_entry = ["RepositoryNotFoundError", 404], ["RemoteEntryNotFoundError", 404]
    assert client(missing) == [no_repo] * 3 + [no_entry] * 2 + [["RevisionNotFoundError", 404], None]
    assert client("""
        from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError
        result = issubclass(RemoteEntryNotFoundError, EntryNotFoundError)
    """)


@pytest.mark.parametrize("token", [None, "hf_of_another_user"])
def test_clients_without_the_token_can_read_but_not_write(hub: StandInHub, client: Client, token: str | None) -> None:
    client(PUSH)
    before = hub.repos[REPO].head
    writes_and_reads = errors_of(
        'HfApi().create_repo("stand-in/other")',
        f'HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="{REPO}")',
        f'HfApi().delete_file("README.md", "{REPO}")',
        f'snapshot_download("{REPO}")',
    )
    *writes, read = client(writes_and_reads, token=token)
    assert [status for _, status in writes] == [401, 401, 401]
    assert read is None
    assert list(hub.repos) == [REPO]
    assert hub.repos[REPO].head == before


def test_a_private_repo_needs_the_token(hub: StandInHub, client: Client) -> None:
    client(f"""
        from huggingface_hub import HfApi
        result = HfApi().create_repo("{REPO}", private=True)
    """)
    calls = errors_of(f'HfApi().model_info("{REPO}")')
    assert hub.repos[REPO].private
    assert client(calls) == [None]
    assert client(calls, token=None) == [["RepositoryNotFoundError", 404]]


def test_creating_a_repo_twice_needs_exist_ok(client: Client) -> None:
    create = f'HfApi().create_repo("{REPO}"'
    assert client(errors_of(f"{create})", f"{create})", f"{create}, exist_ok=True)")) == [
        None,
        ["HfHubHTTPError", 409],
        None,
    ]


def test_a_card_with_invalid_yaml_is_an_error_before_the_upload(
    hub: StandInHub, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "pushed/README.md").write_text("---\nlicense: [apache-2.0\n---\n")
    with pytest.raises(AssertionError, match=r"Invalid metadata in README\.md"):
        client(PUSH)
    assert hub.repos[REPO].files == {}
    assert not hub.objects


def test_an_lfs_object_must_be_announced_and_complete(hub: StandInHub, client: Client) -> None:
    client(PUSH)
    content = b"\0 weights"
    oid = sha256(content).hexdigest()

    def status(method: str, path: str, body: bytes) -> int:
        request = HTTPRequest(hub.endpoint + path, body, {"Authorization": f"Bearer {TOKEN}"}, method=method)
        try:
            with build_opener(ProxyHandler({})).open(request) as reply:
                return reply.status
        except HTTPError as error:
            with error:
                return error.code

    def commit() -> int:
        file = {"path": "b.bin", "algo": "sha256", "oid": oid, "size": len(content)}
        lines = [{"key": "header", "value": {"summary": "b"}}, {"key": "lfsFile", "value": file}]
        return status("POST", f"/api/models/{REPO}/commit/main", "\n".join(map(json.dumps, lines)).encode())

    verify = json.dumps({"oid": oid, "size": len(content)}).encode()
    batch = json.dumps({"operation": "upload", "objects": [{"oid": oid, "size": len(content)}]}).encode()
    assert status("PUT", f"/lfs/{oid}", content) == 403
    assert status("POST", f"/{REPO}.git/info/lfs/objects/batch", batch) == 200
    assert status("PUT", f"/lfs/{oid}", content[:-1]) == 400
    assert status("POST", "/lfs/verify", verify) == 404
    assert commit() == 400
    assert hub.repos[REPO].files == FILES
    assert status("PUT", f"/lfs/{oid}", content) == 200
    assert status("POST", "/lfs/verify", verify) == 200
    assert commit() == 200
    assert hub.repos[REPO].files == FILES | {"b.bin": content}


def test_a_transformers_model_comes_back_by_its_repo_id(hub: StandInHub, client: Client) -> None:
    equal = client(f"""
        import torch
        from transformers import LlamaConfig, LlamaModel
        shape = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=16)
        ours = LlamaModel(LlamaConfig(**shape))
        ours.push_to_hub(repo_id="{REPO}")
        theirs = LlamaModel.from_pretrained("{REPO}").state_dict()
        result = {{name: torch.equal(value, theirs[name]) for name, value in ours.state_dict().items()}}
    """)
    assert equal
    assert all(equal.values()), equal
    assert {"config.json", "model.safetensors"} <= set(hub.repos[REPO].files)


def test_a_data_set_comes_back_by_its_repo_id(hub: StandInHub, client: Client) -> None:
    labels = client(f"""
        from datasets import Dataset, load_dataset
        Dataset.from_dict({{"label": [3, 1, 2]}}).push_to_hub("{REPO}")
        result = list(load_dataset("{REPO}", split="train")["label"])
    """)
    assert labels == [3, 1, 2]
    assert list(hub.repos) == [f"datasets/{REPO}"]


def test_the_client_ignores_the_hub_settings_of_the_user(
    hub: StandInHub, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", "/dev/null")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    client(PUSH)
    snapshot = client(f"""
        from huggingface_hub import snapshot_download
        result = snapshot_download("{REPO}")
    """)
    assert hub.repos[REPO].files == FILES
    assert Path(snapshot).is_relative_to(tmp_path / "home")
