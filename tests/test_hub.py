"""A first use online, against a small hub on this machine; what is told before, checked after, and refused."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
from huggingface_hub import constants
from transformer_lens.model_bridge import TransformerBridge

from helpers import fetch, hub, models, saes
from helpers.models import load_model

COMMIT, NAME = "1" * 40, "someone/model"
LISTED_AS_LFS = ".safetensors"


@dataclass
class Hub:
    """A repository that is served, the requests that came for it, and faults to give it."""

    folder: Path
    cache: Path
    asked: list[str] = field(default_factory=list)
    gated: bool = False
    swapped: dict[str, bytes] = field(default_factory=dict)  # what a file's download brings instead

    def content(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def listed(self) -> list[dict]:
        """As the hub lists files: git's hash for small ones, SHA-256 for large ones."""
        found = []
        for name in self.files():
            content = self.content(name)
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"type": "file", "path": name, "size": len(content), "oid": blob}
            if name.endswith(LISTED_AS_LFS):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            found.append(entry)
        return found

    def etag(self, name: str) -> str:
        entry = next(entry for entry in self.listed() if entry["path"] == name)
        return entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]

    def downloads(self) -> list[str]:
        return [line.rpartition("/")[2] for line in self.asked if line.startswith("GET") and "/resolve/" in line]


@pytest.fixture
def online(model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that serves a copy of the tiny GPT-2 at one commit, and an empty cache."""
    served = Hub(Path(shutil.copytree(model_folder("gpt2"), tmp_path / "served")), tmp_path / "cache")
    (served.folder / "pytorch_model.bin").write_bytes(b"pickled")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            served.asked.append(f"{self.command} {path}")
            if path == "/":
                self.answer(b"a hub")
            elif not path.startswith((f"/api/models/{NAME}", f"/{NAME}/")):
                self.answer(b"{}", 401, X_Error_Code="RepoNotFound")
            elif served.gated:
                self.answer(b"{}", 403, X_Error_Code="GatedRepo")
            elif path.startswith(f"/api/models/{NAME}/tree/"):
                self.answer(json.dumps(served.listed()).encode(), Content_Type="application/json")
            elif path.startswith(f"/api/models/{NAME}"):
                files = [{"rfilename": name} for name in served.files()]
                body = {"id": NAME, "sha": COMMIT, "siblings": files}
                self.answer(json.dumps(body).encode(), Content_Type="application/json")
            else:
                name = path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")
                body = served.swapped.get(name, served.content(name))
                self.answer(body, ETag=f'"{served.etag(name)}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(served.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "*")
    yield served
    server.shutdown()
    server.server_close()


def snapshot_of(online: Hub) -> Path:
    return online.cache / "models--someone--model" / "snapshots" / COMMIT


def test_a_first_use_says_what_comes_and_a_second_needs_no_network(online, monkeypatch, capfd):
    model = load_model(f"{NAME}@{COMMIT}")
    said = capfd.readouterr().err
    wanted = [name for name in online.files() if name != "pytorch_model.bin"]
    size = sum(len(online.content(name)) for name in wanted)
    assert f"{len(wanted)} files, {size / 1e6:.3g} MB, will be downloaded from {NAME} at revision {COMMIT[:12]}" in said
    assert str(online.cache) in said and said.index("will be downloaded") < said.rindex("%|")
    assert sorted(online.downloads()) == wanted and model.cfg.n_layers == 3
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    online.asked.clear()
    load_model(f"{NAME}@{COMMIT}")
    assert not online.asked and not capfd.readouterr().err


def test_any_revision_is_told_and_kept_as_the_commit_that_it_is(online, capfd):
    load_model(NAME)
    assert COMMIT[:12] in capfd.readouterr().err and snapshot_of(online).is_dir()


def test_a_download_that_was_cut_off_goes_on_with_what_is_missing(online, capfd):
    load_model(f"{NAME}@{COMMIT}")
    (snapshot_of(online) / "tokenizer.json").unlink()
    shutil.rmtree(online.cache / "models--someone--model" / "trees", ignore_errors=True)
    online.asked.clear()
    capfd.readouterr()
    load_model(f"{NAME}@{COMMIT}")
    assert online.downloads() in ([], ["tokenizer.json"])  # the blob is still there
    assert (snapshot_of(online) / "tokenizer.json").is_file()


def cut_off(online: Hub) -> Path:
    """The cached weights lose their second half."""
    file = snapshot_of(online) / "model.safetensors"
    file.resolve().write_bytes(online.content("model.safetensors")[:1000])
    return file


def test_a_damaged_file_of_the_cache_is_fetched_anew(online):
    load_model(f"{NAME}@{COMMIT}")
    file = cut_off(online)
    online.asked.clear()
    load_model(f"{NAME}@{COMMIT}")
    assert "model.safetensors" in online.downloads() and file.read_bytes() == online.content("model.safetensors")


def test_offline_a_damaged_file_is_named(online, monkeypatch):
    load_model(f"{NAME}@{COMMIT}")
    file = cut_off(online)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=rf"cannot be loaded.*{file} is damaged \(.*HF_HUB_OFFLINE forbids"):
        load_model(f"{NAME}@{COMMIT}")


def test_what_comes_with_another_checksum_is_refused_and_not_kept(online):
    content = bytearray(online.content("model.safetensors"))
    content[-1] ^= 1
    online.swapped["model.safetensors"] = bytes(content)
    for _ in range(2):
        with pytest.raises(OSError, match=r"model\.safetensors of someone/model came with another checksum"):
            load_model(f"{NAME}@{COMMIT}")
    online.swapped.clear()
    load_model(f"{NAME}@{COMMIT}")


def test_a_gated_model_says_where_to_consent_and_how_to_log_in(online):
    online.gated = True
    with pytest.raises(OSError, match=r"someone/model is gated: consent to its licence on http.*hf auth login"):
        load_model(NAME)


def test_what_the_hub_does_not_have_is_said(online):
    with pytest.raises(OSError, match=r"the hub has no someone/other, or keeps it private"):
        load_model("someone/other")


def test_a_disk_without_room_is_refused_before_anything_comes(online, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000))
    with pytest.raises(OSError, match=r"MB are needed in .*cache, and 10 kB are free: set HF_HOME to another disk"):
        load_model(NAME)
    assert not online.downloads()


def test_weights_that_are_pickled_are_not_fetched_and_refused(online):
    (online.folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"holds no safetensors weights\. Pickled weights are not read"):
        load_model(NAME)
    assert "pytorch_model.bin" not in online.downloads()


def test_a_part_of_the_weights_that_is_missing_is_named(online):
    shutil.move(online.folder / "model.safetensors", online.folder / "model-00001-of-00002.safetensors")
    parts = {"one": "model-00001-of-00002.safetensors", "two": "model-00002-of-00002.safetensors"}
    (online.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    with pytest.raises(OSError, match=r"lacks model-00002-of-00002\.safetensors, a part of the weights"):
        load_model(NAME)


@pytest.fixture
def with_own_saes(online: Hub, model_with_saes: TransformerBridge) -> Hub:
    """The hub's model and its SAEs have a row in the cache's table of known models."""
    shutil.copytree(model_with_saes.cfg.folder / "saes", online.folder, dirs_exist_ok=True)
    known = models.known_models()
    row = known.loc["gpt2-small"].to_dict() | {"aliases": "", "sae_hub_id": NAME, "sae_revision": COMMIT}
    table = pd.DataFrame([row | {"hub_id": NAME, "revision": COMMIT}], pd.Index(["tiny"], name="name"))
    online.cache.mkdir()
    table.to_csv(online.cache / "models.csv")
    models._models_of.cache_clear()
    return online


def test_everything_that_notebooks_need_is_fetched_at_once(with_own_saes, monkeypatch):
    fetch.fetch("tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetch.fetch("tiny")
    model = load_model("tiny")
    assert [saes.sae_folder(model, depth).name for depth in (0, 3)] == [
        "blocks.0.hook_resid_pre",
        "blocks.2.hook_resid_post",
    ]


def test_fetching_says_what_is_wrong_in_one_line(online, monkeypatch):
    monkeypatch.setenv("MODELS", f"{NAME} no-such-model")
    with pytest.raises(SystemExit, match=r"^Unknown model 'no-such-model'\. Did you mean"):
        fetch.main()
    assert snapshot_of(online).is_dir()
