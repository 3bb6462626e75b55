"""The stand-in Hub, asked by the real client: what was pushed comes back, and what the Hub refuses is refused.

Each claim runs its client in a process of its own (see hub_stand_in) and reads back the JSON that it prints last.
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
from urllib.request import Request as Send

import pytest
from hub_stand_in import TOKEN, StandInHub

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
    """Runs code in a new Python process, in a folder that holds FILES as `pushed/`, and returns its `result`."""
    for name, content in FILES.items():
        (tmp_path / "pushed" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pushed" / name).write_bytes(content)

    def run(code: str, token: str | None = TOKEN) -> Any:
        environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": token or ""}
        program = dedent(code) + "\nimport json\nprint(json.dumps(result))"
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def errors_of(*calls: str) -> str:
    """Code whose result is, for each call, the exception's class and HTTP status, or None where it raised nothing."""
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
    came = {str(path.relative_to(snapshot)): path.read_bytes() for path in Path(snapshot).rglob("*") if path.is_file()}
    assert came == FILES
    assert (tmp_path / single).read_bytes() == FILES["decoder/model.safetensors"]


def test_only_the_weights_go_through_lfs(hub: StandInHub, client: Client) -> None:
    client(PUSH)
    assert list(hub.objects) == [sha256(FILES["decoder/model.safetensors"]).hexdigest()]
    assert {path: blob.lfs for path, blob in hub.repos[REPO].commits[hub.repos[REPO].head].items()} == {
        path: path.endswith(".safetensors") for path in FILES
    }


def test_a_second_push_commits_what_changed_and_an_unchanged_one_commits_nothing(
    hub: StandInHub, client: Client, tmp_path: Path
) -> None:
    first = client(PUSH)
    (tmp_path / "pushed/decoder/config.json").write_bytes(b'{"width": 16}')
    second = client(PUSH)
    assert client(PUSH) == second != first
    assert list(hub.repos[REPO].commits)[1:] == [first, second]
    assert hub.repos[REPO].files == FILES | {"decoder/config.json": b'{"width": 16}'}
    assert [method for method, _ in hub.requests].count("PUT") == 1, "the weights were sent again"
    texts = client(f"""
        from huggingface_hub import hf_hub_download
        revisions = ("{first}", "main", "{second}")
        files = [hf_hub_download("{REPO}", "decoder/config.json", revision=revision) for revision in revisions]
        result = [open(file).read() for file in files]
    """)
    assert texts == ['{"width": 8}', '{"width": 16}', '{"width": 16}']


def test_deleting_takes_a_file_and_a_folder_away(hub: StandInHub, client: Client) -> None:
    client(PUSH)
    left = client(f"""
        from huggingface_hub import HfApi
        HfApi().delete_file("README.md", "{REPO}")
        after_the_file = HfApi().list_repo_files("{REPO}")
        HfApi().delete_folder("decoder", "{REPO}")
        result = [after_the_file, HfApi().list_repo_files("{REPO}")]
    """)
    assert left == [["decoder/config.json", "decoder/model.safetensors"], []]


def test_what_is_missing_raises_the_errors_of_the_real_hub(client: Client) -> None:
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


@pytest.mark.parametrize("token", [None, "hf_of_somebody_else"])
def test_without_the_token_one_may_read_and_not_write(hub: StandInHub, client: Client, token: str | None) -> None:
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


def test_a_private_repo_is_seen_with_the_token_alone(hub: StandInHub, client: Client) -> None:
    client(f"""
        from huggingface_hub import HfApi
        result = HfApi().create_repo("{REPO}", private=True)
    """)
    look = errors_of(f'HfApi().model_info("{REPO}")')
    assert hub.repos[REPO].private
    assert client(look) == [None]
    assert client(look, token=None) == [["RepositoryNotFoundError", 404]]


def test_creating_a_repo_twice_needs_exist_ok(client: Client) -> None:
    create = f'HfApi().create_repo("{REPO}"'
    assert client(errors_of(f"{create})", f"{create})", f"{create}, exist_ok=True)")) == [
        None,
        ["HfHubHTTPError", 409],
        None,
    ]


def test_a_card_whose_header_is_no_yaml_is_refused_before_anything_is_sent(
    hub: StandInHub, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "pushed/README.md").write_text("---\nlicense: [apache-2.0\n---\n")
    with pytest.raises(AssertionError, match=r"Invalid metadata in README\.md"):
        client(PUSH)
    assert hub.repos[REPO].files == {}
    assert not hub.objects


def test_an_lfs_object_is_taken_when_announced_and_whole(hub: StandInHub, client: Client) -> None:
    client(PUSH)
    content = b"\0 weights"
    oid = sha256(content).hexdigest()

    def status(method: str, path: str, body: bytes) -> int:
        send = Send(hub.endpoint + path, body, {"Authorization": f"Bearer {TOKEN}"}, method=method)
        try:
            with build_opener(ProxyHandler({})).open(send) as reply:
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


def test_the_users_own_hub_settings_do_not_reach_the_client(
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
