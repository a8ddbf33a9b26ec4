import pytest
import torch
import torch.nn.functional as F

from pipeline.detectors.dino.heads import LanguageHead, LinearHead


@pytest.mark.parametrize("text_dim", [8, 64])
def test_language_head_is_a_scaled_cosine(text_dim: int) -> None:
    """With a wide text space the folded form must give the same numbers."""
    torch.manual_seed(0)
    head = LanguageHead(24, text_dim, scale=50.0, bias=True)
    x, text = torch.randn(2, 5, 24), F.normalize(torch.randn(7, text_dim), dim=-1)
    assert head.bias is not None
    projected = x @ head.weight.T
    expected = 50 * F.cosine_similarity(projected[..., None, :], text, dim=-1) + head.bias
    torch.testing.assert_close(head(x, text), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text_dim", [64, 1024])
def test_scores_start_near_the_prior(text_dim: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 256)
    text = F.normalize(torch.randn(200, text_dim), dim=-1)
    score = LanguageHead(256, text_dim, scale=100.0, bias=True)(x, text).sigmoid().mean().item()
    assert 0.005 < score < 0.02
    linear = LinearHead(256, 200)(x * 0.1).sigmoid().mean().item()
    assert 0.005 < linear < 0.02


def test_a_head_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        head = LanguageHead(8, 32, scale=100.0, bias=True)
    assert head.bias is not None and head.bias.device.type == "meta" and head.bias.shape == (1,)


def test_a_feature_of_zeros_is_safe() -> None:
    head = LanguageHead(8, 32, scale=100.0, bias=False)
    x = torch.zeros(1, 8, requires_grad=True)
    head(x, F.normalize(torch.randn(3, 32), dim=-1)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_linear_head_gives_chosen_columns() -> None:
    head, x = LinearHead(8, 6), torch.randn(3, 8)
    columns = torch.tensor([4, 1])
    torch.testing.assert_close(head(x, columns), head(x)[:, columns])
