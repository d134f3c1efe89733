"""One device, or a device map: the same numbers, whichever hooks accelerate puts around the modules.

There is one CPU here, so accelerate is made to hook every module as it does where they lie on several GPUs: what a
module gets is moved to its own device, and what the model returns to the first.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import accelerate
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from helpers import models
from helpers.activations import every_token, residuals
from helpers.continuations import generated, log_probs
from helpers.directions import logits
from helpers.models import load_model, untrained_twin
from helpers.patching import Swap, ran, swapped
from helpers.steering import added

FAMILIES = ("gpt2", "llama", "qwen3", "gemma2", "gemma3_text", "mistral")
TEXTS = ["The dog ran after me down the lane.", "He fell!"]


@pytest.fixture(params=FAMILIES)
def both(
    request: pytest.FixtureRequest, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[TransformerBridge, TransformerBridge]:
    """A model on one device, and the same with every module hooked by accelerate."""
    hooked = partial(accelerate.dispatch_model, force_hooks=True, main_device="cpu")
    monkeypatch.setattr(models, "dispatch_model", hooked)
    name = str(model_folder(request.param))
    mapped = untrained_twin(name, device="balanced")
    assert any(hasattr(module, "_hf_hook") for module in mapped.original_model.modules())
    return untrained_twin(name, device="cpu"), mapped


def test_a_device_map_changes_no_activation(both):
    one, mapped = both
    assert torch.equal(every_token(one, TEXTS), every_token(mapped, TEXTS))
    found, again = residuals(one, TEXTS), residuals(mapped, TEXTS)
    assert all(torch.equal(acts, again[position]) for position, acts in found.items())
    assert torch.equal(logits(one, found["mean"][:, -1]), logits(mapped, found["mean"][:, -1]))


@pytest.mark.parametrize("which", ["prompt", "generated", "both"])
def test_a_device_map_changes_nothing_that_steering_does(both, which):
    vectors = 3 * torch.randn(2, both[0].cfg.d_model, generator=torch.Generator().manual_seed(0))
    steer = added(2, vectors, which)
    said = [log_probs(model, TEXTS, [[" ran", " wept"]], steer)[0] for model in both]
    assert all(torch.equal(first, second) for first, second in zip(*said))
    written = [generated(model, TEXTS, 8, steer) for model in both]
    assert written[0] == written[1]


def test_a_device_map_changes_nothing_that_patching_does(both):
    found = []
    for model in both:
        runs = ran(model, [TEXTS[0], "The cat ran after me down the lane."])
        places = torch.zeros(1, runs.read.ids.shape[1], dtype=torch.bool)
        places[0, 2] = True
        swap = Swap(torch.tensor([0]), torch.tensor([1]), places, torch.arange(places.shape[1])[None])
        found.append(swapped(model, runs, swap, "residual stream", [0, 1, 3], lambda resid: resid[:, :4]))
    assert torch.equal(*found)


@pytest.mark.parametrize("device", ["cpu", "auto", "balanced", {"": "cpu"}])
def test_a_model_is_the_same_wherever_it_is_loaded(model, device):
    other = load_model(str(model.cfg.folder), device=device)
    assert str(other.cfg.device) == "cpu"
    assert torch.equal(every_token(model, TEXTS), every_token(other, TEXTS))


def test_the_environment_says_where(model, monkeypatch):
    monkeypatch.setenv("DEVICE", "nowhere")
    with pytest.raises(ValueError, match=r"Unknown device 'nowhere': give 'cuda', 'cpu', or auto or balanced\."):
        load_model(str(model.cfg.folder))
    assert load_model(str(model.cfg.folder), device="cpu").cfg.n_layers == 3
