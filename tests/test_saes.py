"""SAEs read from sae-lens' own files: what comes back, what is refused with which message, what is warned of."""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from huggingface_hub import constants
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from helpers import saes
from helpers.activations import every_token, site
from helpers.models import known_models, load_model, uncentred, untrained_twin
from helpers.prompts import neutral_texts
from helpers.saes import (
    NoSAEs,
    dashboard,
    decoder_rows,
    explanation,
    has_saes,
    load_sae,
    reconstruction,
    release,
    sae_folder,
)

EYE = torch.eye(32)
PERFECT = torch.cat([EYE, -EYE])
CENTRING = EYE - 1 / 32  # takes the mean off
pytestmark = pytest.mark.filterwarnings("ignore:\\s*This SAE has non-empty")  # from sae-lens' own loader
READERS = pytest.mark.parametrize("read", [load_sae, decoder_rows])
KINDS = [
    pytest.param(StandardSAE, StandardSAEConfig, {}, id="standard"),
    pytest.param(TopKSAE, TopKSAEConfig, {"k": 40}, id="topk"),
    pytest.param(JumpReLUSAE, JumpReLUSAEConfig, {}, id="jumprelu"),
]


@pytest.fixture(scope="module")
def own(with_saes: Callable[..., TransformerBridge]) -> TransformerBridge:
    """A tiny GPT-2 with perfect SAEs of this file's own."""
    return with_saes()


@pytest.fixture
def ours(own: TransformerBridge) -> Iterator[TransformerBridge]:
    """The same, whose SAEs may be broken: they are put back."""
    folder, kept = own.cfg.folder / "saes", own.cfg.folder / "kept"
    shutil.copytree(folder, kept)
    yield own
    shutil.rmtree(folder, ignore_errors=True)
    kept.rename(folder)


@pytest.fixture(scope="module")
def llama(with_saes: Callable[..., TransformerBridge]) -> TransformerBridge:
    return with_saes("llama")


@pytest.fixture(scope="module")
def shifted(with_saes: Callable[..., TransformerBridge]) -> TransformerBridge:
    """A GPT-2 of the same name whose raw stream is above 0 at every coordinate of depth 0.

    A ReLU per coordinate, its SAE there, keeps all of that stream and loses half of the centred one.
    """
    folder = with_saes(rows={0: EYE}).cfg.folder
    hf = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        hf.transformer.wpe.weight.add_(5)
    hf.save_pretrained(folder)
    return load_model(str(folder))


@pytest.fixture
def named(own: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put the tiny model among the known ones, with these entries in its row of models.csv."""

    def enter(**row: str) -> None:
        known = known_models()
        known.loc[own.cfg.model_name] = dict.fromkeys(known.columns, "") | row
        monkeypatch.setattr(saes, "known_models", lambda: known)

    return enter


def edit(folder: Path, **metadata: object) -> None:
    """Change cfg.json: keys of the configuration itself where it has them, else of its metadata."""
    config = json.loads((folder / "cfg.json").read_text())
    for key, value in metadata.items():
        (config if key in config else config["metadata"])[key] = value
    (folder / "cfg.json").write_text(json.dumps(config))


# What comes back


@pytest.mark.parametrize(("kind", "config", "options"), KINDS)
def test_an_sae_does_what_sae_lens_own_does(ours, small_sae, kind, config, options):
    rows = PERFECT + 0.01 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    small_sae(rows, site(ours, 2), kind=kind, config=config, **options).save_model(sae_folder(ours, 2))
    found, expected = load_sae(ours, 2), SAE.load_from_disk(sae_folder(ours, 2))
    assert type(found) is type(expected) is kind
    for (name, weight), (other, wanted) in zip(found.named_parameters(), expected.named_parameters()):
        assert name == other and torch.equal(weight, wanted)
    acts = every_token(ours, ["The dog ran after me."], [2])[:, 0]
    assert torch.equal(found.encode(acts), expected.encode(acts))
    assert (found.encode(acts) != 0).any()
    assert found.cfg.metadata.hook_name == "blocks.2.hook_resid_pre"


@pytest.mark.parametrize("key", ["hook_point", "hook_name"])
def test_an_sae_in_the_layout_of_older_releases_is_read(ours, named, key):
    """All in one level, as the SAEs of gpt2-small are; the stream, which the file leaves out, is in models.csv."""
    named(sae_release="the-release", sae_stream="centred")
    old = {key: site(ours, 3), "d_in": 32, "d_sae": 64, "dtype": "torch.float32", "activation_fn_str": "relu"}
    (sae_folder(ours, 3) / "cfg.json").write_text(json.dumps(old))
    sae = load_sae(ours, 3)
    assert torch.equal(sae.W_dec, load_file(sae_folder(ours, 3) / "sae_weights.safetensors")["W_dec"])
    assert torch.equal(sae.W_dec, decoder_rows(ours, 3))
    assert sae.cfg.metadata.hook_name == "blocks.2.hook_resid_post"


def test_every_depth_has_its_own_sae(model_with_saes):
    rows = [load_sae(model_with_saes, depth).W_dec for depth in range(4)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(rows) for b in rows[:i])


def test_an_sae_is_in_eval_mode_without_gradients(model_with_saes):
    sae = load_sae(model_with_saes, 1)
    assert not any(part.training for part in sae.modules())
    assert not any(weight.requires_grad for weight in sae.parameters())


def test_half_precision_comes_back_as_float32(ours, small_sae):
    small_sae(PERFECT / 3, site(ours, 1), encoder=3 * PERFECT.T, dtype="float16").save_model(sae_folder(ours, 1))
    stored = load_file(sae_folder(ours, 1) / "sae_weights.safetensors")["W_dec"]
    assert stored.dtype == torch.float16
    assert {weight.dtype for weight in load_sae(ours, 1).parameters()} == {torch.float32}
    for rows in (load_sae(ours, 1).W_dec, decoder_rows(ours, 1)):
        assert rows.dtype == torch.float32 and torch.equal(rows, stored.float())


@pytest.mark.parametrize("features", [None, [5, 2, 63, 0], [7, 7, 1, 7], [9], []])
def test_decoder_rows_are_those_of_the_loaded_sae(model_with_saes, features):
    expected = load_sae(model_with_saes, 2).W_dec
    expected = expected if features is None else expected[features]
    found = decoder_rows(model_with_saes, 2, features)
    assert found.shape == expected.shape and torch.equal(found, expected)


def test_every_family_takes_saes_of_its_own_stream(llama, model_with_saes):
    for model in (llama, model_with_saes):
        table = reconstruction(model, {depth: load_sae(model, depth) for depth in range(4)})
        assert (table.explained_variance[table.used] > 0.9999).all()


# How well SAEs fit


def test_reconstruction_is_measured_on_both_streams(ours, small_sae):
    """The SAE that takes the mean off is perfect on the centred stream, and on the raw one all but its mean is right.

    It fires on every token as often as the stream has a coordinate above 0 or below.
    """
    sae = small_sae(PERFECT, site(ours, 3), encoder=CENTRING @ PERFECT.T)
    table = reconstruction(ours, {3: sae}).set_index("stream")
    acts = every_token(uncentred(ours), neutral_texts(), [3])[:, 0].double()
    left_out = acts.mean(-1, keepdim=True).expand_as(acts)
    missed = left_out.pow(2).sum() / (acts - acts.mean(0)).pow(2).sum()
    assert list(table.index) == ["centred", "raw"] and table.used.tolist() == [True, False]
    assert (table.depth == 3).all()
    assert table.explained_variance["centred"] == pytest.approx(1, abs=1e-6)
    assert table.explained_variance["raw"] == pytest.approx(1 - missed.item(), abs=1e-5)
    assert table.l0.tolist() == pytest.approx([32, 32], abs=0.01)


def test_l0_counts_the_features_that_fire(model, small_sae):
    bias = torch.where(torch.arange(32) < 5, 1e6, -1e6)
    assert reconstruction(model, {0: small_sae(EYE, site(model, 0), bias=bias)}).l0.tolist() == [5, 5]


def test_models_with_rms_norm_use_the_raw_stream(llama):
    table = reconstruction(llama, {1: load_sae(llama, 1)})
    assert table.stream[table.used].tolist() == ["raw"]


def test_streams_of_different_models_are_not_mixed_up(own, shifted, llama, small_sae):
    """Also not those of two models with the same name, and whichever comes first."""
    half = {0: small_sae(EYE, site(own, 0))}
    assert own.cfg.model_name == shifted.cfg.model_name
    first = [reconstruction(model, half) for model in (own, shifted, llama)]
    again = [reconstruction(model, half) for model in (llama, shifted, own)]
    assert all(table.equals(other) for table, other in zip(first, again[::-1]))
    values = [table.explained_variance[1] for table in first]
    assert values[1] > max(values[0], values[2]) + 0.1 and values[0] != values[2]


def test_the_stream_of_a_twin_is_its_own(own, small_sae):
    """Its folder holds the trained weights, whose stream is another: embeddings eight times larger (see conftest)."""
    twin = untrained_twin(str(own.cfg.folder))
    sae = small_sae(EYE, site(twin, 0), bias=torch.full((32,), -0.5))  # fires above 0.5, where the twin never is
    table = reconstruction(twin, {0: sae})
    fires = (every_token(twin, neutral_texts(), [0]) > 0.5).float().sum(-1).mean().item()
    assert table.l0[table.used].item() == pytest.approx(fires, abs=1e-6)


def test_a_good_sae_loads_without_a_warning(model_with_saes, llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (model_with_saes, llama):
            load_sae(model, 0)


def test_an_sae_of_another_model_fits_poorly_and_is_warned_of(ours, small_sae, generator):
    """Random decoder rows, which have nothing to do with what its encoder reads: no stream is better than its mean."""
    sae = small_sae(torch.randn(48, 32, generator=generator), site(ours, 1), torch.randn(32, 48, generator=generator))
    sae.save_model(sae_folder(ours, 1))
    value = reconstruction(ours, {1: sae}).explained_variance[0]
    message = f"The SAE at depth 1 explains {value:.2f} of the variance of neutral text: it probably belongs to another"
    with pytest.warns(UserWarning, match=re.escape(message)):
        load_sae(ours, 1)


def test_an_sae_of_the_raw_stream_is_warned_of_whatever_its_file_says(shifted):
    assert every_token(uncentred(shifted), neutral_texts(), [0]).min() > 0
    with pytest.warns(UserWarning, match=r"The SAE at depth 0 explains 0\.\d\d of .*, but 1\.00 on the raw stream"):
        load_sae(shifted, 0)


def test_an_sae_of_the_centred_stream_is_warned_of_whatever_its_file_says(with_saes):
    model = with_saes("llama", {1: torch.cat([CENTRING, -CENTRING])})
    with pytest.warns(UserWarning, match=r"The SAE at depth 1 explains 0\.9\d of .*, but 1\.00 on the centred stream"):
        load_sae(model, 1)


# What is refused


def test_a_model_has_saes_in_its_folder_in_its_row_or_not_at_all(ours, model, named):
    assert has_saes(ours) is True and has_saes(model) is False
    shutil.rmtree(ours.cfg.folder / "saes")
    assert has_saes(ours) is False
    named(sae_release="tiny/saes", sae_hub_id="some/repository")
    assert has_saes(ours) is True


def test_a_model_without_saes_names_those_that_have_some(model):
    with pytest.raises(
        NoSAEs, match=r"no SAEs for local--tiny-gpt2. Known ones: bookworm, gpt2-small.*subfolder `saes`"
    ):
        load_sae(model, 0)


@READERS
def test_a_depth_that_the_model_lacks_is_refused(own, read):
    with pytest.raises(ValueError, match="depth 4 is out of range: local--tiny-gpt2 has depths 0 to 3"):
        read(own, 4)


@READERS
@pytest.mark.parametrize("lost", ["cfg.json", "sae_weights.safetensors"])
def test_a_missing_file_is_named_with_the_saes_that_are_there(ours, read, lost):
    (sae_folder(ours, 1) / lost).unlink()
    message = (
        f"no SAE at blocks.1.hook_resid_pre: {lost} is missing .*SAEs there: .*blocks.0.hook_resid_pre, .*blocks.2"
    )
    with pytest.raises(FileNotFoundError, match=message):
        read(ours, 1)


@READERS
def test_a_depth_without_an_sae_is_named_with_the_saes_that_are_there(ours, read):
    for depth in (0, 1, 3):
        shutil.rmtree(sae_folder(ours, depth))
    with pytest.raises(
        FileNotFoundError, match=r"no SAE at blocks.2.hook_resid_post.*there: blocks.2.hook_resid_pre\."
    ):
        read(ours, 3)
    shutil.rmtree(sae_folder(ours, 2))
    with pytest.raises(FileNotFoundError, match=r"SAEs there: none\."):
        read(ours, 2)


@pytest.mark.parametrize("bad", [-1, 64, 1000])
def test_a_feature_out_of_range_is_refused(model_with_saes, bad):
    with pytest.raises(IndexError, match=f"feature {bad} is out of range: the SAE at depth 3 has 0 to 63"):
        decoder_rows(model_with_saes, 3, [0, bad])


@READERS
def test_another_width_is_refused(ours, small_sae, read):
    small_sae(torch.eye(16), site(ours, 1)).save_model(sae_folder(ours, 1))
    with pytest.raises(ValueError, match="reads 16 numbers per token, but local--tiny-gpt2 has d_model 32"):
        read(ours, 1)


@READERS
@pytest.mark.parametrize("hook_name", ["blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", None])
def test_another_hook_point_is_refused(ours, read, hook_name):
    edit(sae_folder(ours, 1), hook_name=hook_name)
    with pytest.raises(
        ValueError, match=f"SAE for blocks.1.hook_resid_pre of .* says that it was trained at {hook_name}"
    ):
        read(ours, 1)


@READERS
@pytest.mark.parametrize("kwargs", [{}, None, {"center_writing_weights": False}])
def test_an_sae_of_the_raw_stream_is_refused_for_a_model_with_layer_norm(ours, read, kwargs):
    edit(sae_folder(ours, 2), model_from_pretrained_kwargs=kwargs)
    with pytest.raises(
        ValueError, match=r"trained on the raw residual stream, but local--tiny-gpt2 .*with the centred"
    ):
        read(ours, 2)


@READERS
def test_an_sae_of_the_centred_stream_is_refused_for_a_model_with_rms_norm(llama, read):
    edit(sae_folder(llama, 2), model_from_pretrained_kwargs={"center_writing_weights": True})
    with pytest.raises(
        ValueError, match=r"trained on the centred residual stream, but local--tiny-llama .*with the raw"
    ):
        read(llama, 2)


@READERS
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_refused(ours, read, share):
    file = sae_folder(ours, 1) / "sae_weights.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=re.escape(f"{file} is damaged") + ".*delete it and fetch or make it again"):
        read(ours, 1)


@READERS
@pytest.mark.parametrize(
    "content", ["", '{"d_in": 32', "[]", "null", "3", '{"metadata": null}', '{"metadata": 3}', "\udcff"]
)
def test_a_broken_configuration_is_refused(ours, read, content):
    file = sae_folder(ours, 1) / "cfg.json"
    file.write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=re.escape(f"{file} is damaged")):
        read(ours, 1)


def test_an_unknown_architecture_is_refused(ours):
    edit(sae_folder(ours, 1), architecture="perpetuum mobile")
    with pytest.raises(ValueError, match=r"is damaged or not an SAE of sae-lens .*perpetuum mobile"):
        load_sae(ours, 1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("weight", ["W_dec", "b_enc"])
def test_weights_that_are_not_finite_are_refused(ours, weight, bad):
    file = sae_folder(ours, 1) / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors[weight].view(-1)[-1] = bad
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"is damaged .*{weight} holds non-finite numbers"):
        load_sae(ours, 1)


@pytest.mark.parametrize("lost", ["W_dec", "W_enc"])
def test_a_file_without_one_of_the_weights_is_refused(ours, lost):
    file = sae_folder(ours, 1) / "sae_weights.safetensors"
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=re.escape(f"{file} is damaged")):
        load_sae(ours, 1)
    if lost == "W_dec":
        with pytest.raises(ValueError, match=re.escape(f"{file} is damaged")):
            decoder_rows(ours, 1)


def test_weights_of_another_shape_than_the_configuration_says_are_refused(ours, small_sae):
    file = sae_folder(ours, 1) / "sae_weights.safetensors"
    save_file(dict(small_sae(torch.eye(16), site(ours, 1)).state_dict()), file)
    with pytest.raises(ValueError, match=re.escape(f"{file} is damaged")):
        load_sae(ours, 1)


# Where SAEs lie


def test_a_local_model_has_its_saes_in_its_own_folder(own):
    assert release(own).name == "local--tiny-gpt2/saes"
    assert sae_folder(own, 3) == own.cfg.folder / "saes" / "blocks.2.hook_resid_post"


def test_a_known_model_has_the_saes_of_its_row(own, named):
    named(sae_release="the-release", sae_stream="centred")
    assert release(own).name == "the-release"
    assert sae_folder(own, 0) == own.cfg.folder / "saes" / "blocks.0.hook_resid_pre"


@pytest.mark.parametrize("stream", ["centred", "raw"])
def test_the_row_of_a_known_model_overrules_what_the_file_says_of_the_stream(ours, named, stream):
    named(sae_release="the-release", sae_stream=stream)
    edit(sae_folder(ours, 1), model_from_pretrained_kwargs={"center_writing_weights": stream != "centred"})
    if stream == "centred":
        assert torch.equal(decoder_rows(ours, 1), load_sae(ours, 1).W_dec)
    else:
        with pytest.raises(ValueError, match=r"SAE for blocks.1.hook_resid_pre of the-release was trained on the raw"):
            decoder_rows(ours, 1)


def test_an_sae_of_the_hub_comes_from_the_cache_at_its_revision(own, named, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--someone--saes" / "snapshots" / ("1" * 40)
    shutil.copytree(own.cfg.folder / "saes" / site(own, 2), snapshot / site(own, 2))
    named(sae_release="far", sae_hub_id="someone/saes", sae_revision="1" * 40)
    assert sae_folder(own, 2) == snapshot / site(own, 2)
    expected = SAE.load_from_disk(own.cfg.folder / "saes" / site(own, 2)).W_dec
    assert torch.equal(load_sae(own, 2).W_dec, expected)
    with pytest.raises(
        OSError, match=r"SAE blocks.1.hook_resid_pre of far cannot be loaded: someone/saes at revision 1"
    ):
        load_sae(own, 1)
    named(sae_release="far", sae_hub_id="someone/saes", sae_revision="2" * 40)
    with pytest.raises(OSError, match="someone/saes at revision 2222"):
        load_sae(own, 2)


# Neuronpedia


PAGE = {"sae_release": "fake", "neuronpedia": "fake-model/{depth}-fake"}
ANSWER = {"modelId": "fake-model", "layer": "2-fake", "index": 7, "frac_nonzero": 0.1, "activations": []}
WORDS = {"modelId": "fake-model", "source": "2-fake", "index": 7, "description": "words about dogs"}


@pytest.fixture
def neuronpedia(named: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, object], str]]:
    """A server on this machine in Neuronpedia's place, which gives one answer; and a key."""
    request = pytest.importorskip("neuronpedia.requests.base_request")
    answer, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(answer["status"])
            self.end_headers()
            self.wfile.write(answer["body"].encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    named(**PAGE)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "dummy")
    monkeypatch.setattr(request.NPRequest, "BASE_URL", f"http://127.0.0.1:{server.server_port}")

    def answers(status: int, body: object) -> list[str]:
        answer.update(status=status, body=body if isinstance(body, str) else json.dumps(body))
        return asked

    yield answers
    server.shutdown()
    server.server_close()


def test_a_model_without_a_page_has_no_dashboard_and_no_explanation(own):
    assert dashboard(own, 2, 7) == ""
    assert explanation(own, 2, 7) == "(not on Neuronpedia)"


def test_a_page_is_that_of_depth_and_feature(own, named):
    named(**PAGE)
    assert dashboard(own, 2, 7) == "https://www.neuronpedia.org/fake-model/2-fake/7"


def test_without_a_key_the_explanation_says_so(own, named, monkeypatch):
    pytest.importorskip("neuronpedia")
    named(**PAGE)
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    assert explanation(own, 2, 7) == "(needs NEURONPEDIA_API_KEY)"


def test_without_a_network_the_explanation_says_so(own, neuronpedia, monkeypatch):
    from neuronpedia.requests.base_request import NPRequest

    monkeypatch.setattr(NPRequest, "BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    assert explanation(own, 2, 7) == "(offline)"


def test_an_explanation_is_the_first_that_neuronpedia_has(own, neuronpedia, capsys):
    asked = neuronpedia(200, {**ANSWER, "explanations": [WORDS, {**WORDS, "description": "more"}]})
    assert explanation(own, 2, 7) == "words about dogs"
    assert asked == ["/feature/fake-model/2-fake/7"]
    assert capsys.readouterr().out == ""


def test_a_feature_without_an_explanation_says_so(own, neuronpedia):
    neuronpedia(200, {**ANSWER, "explanations": []})
    assert explanation(own, 2, 7) == "(no explanation yet)"


@pytest.mark.parametrize(("status", "body"), [(401, ""), (404, ""), (429, ""), (200, "no JSON")])
def test_a_refusal_of_neuronpedia_is_no_error_and_not_called_offline(own, neuronpedia, status, body):
    neuronpedia(status, body)
    found = explanation(own, 2, 7)
    assert re.fullmatch(r"\(.+\)", found) and found != "(offline)"
