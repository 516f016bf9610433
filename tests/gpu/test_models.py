"""Attention kernels and generation on a GPU."""

import pytest
import torch

from engine.config import resolve
from engine.generate import Sampling, generate
from engine.models.attention import select_attention
from engine.models.gpt import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FORMS = {"multi_head": {}, "latent": {"attention_form": "latent", "latent_width": 64}}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
TOKENS = torch.randint(97, (2, 128), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def restored():
    yield
    select_attention("sdpa", "cuda")


def gpt(**changes):
    """A model with weights large enough that attention matters."""
    torch.manual_seed(1)
    settings = resolve({"layers": 2, "heads": 2, "width": 128, "context": 128, **changes}, "test")
    model = build(settings.model, 97)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() == 2 else 1)
    return model.cuda()


def loss_and_gradients(model) -> list[torch.Tensor]:
    tokens = TOKENS.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    (loss / tokens.numel()).backward()
    return [loss / tokens.numel(), *(p.grad for p in model.parameters())]


@forms
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("flash", "aten::_scaled_dot_product_flash_attention"),
        ("cudnn", "aten::_scaled_dot_product_cudnn_attention"),
        ("efficient", "aten::_scaled_dot_product_efficient_attention"),
        ("math", "aten::_scaled_dot_product_attention_math"),
    ],
)
def test_the_selected_kernel_runs_and_is_the_same_function(restored, form, name, kernel):
    expected = loss_and_gradients(gpt(**form, attention="manual"))
    select_attention(name, "cuda")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profiled:
        found = loss_and_gradients(gpt(**form, attention=name))
    used = {e.name for e in profiled.events() if e.name.startswith("aten::_scaled_dot_product")}
    assert {n for n in used if "backward" not in n} == {kernel}
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 0.05 * other.norm() + 1e-6  # bf16


@forms
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("sampling", [Sampling(2.0, 0.0), Sampling(top_k=20)], ids=["greedy", "sampled"])
def test_generation_is_the_same_with_and_without_a_cache(form, positions, sampling):
    model = gpt(**form, positions=positions, tie_embeddings=False).eval()
    texts = [
        generate(model, TOKENS[:, :100], count=40, sampling=sampling, use_cache=use) for use in (True, False)
    ]
    assert torch.equal(*texts) and len(texts[0][0, 100:].unique()) > 5
