"""RichSem's text embeddings, made from the CLIP copy in its checkpoints."""

import open_clip
import pytest
import torch

from pipeline.errors import DataError
from pipeline.semantics.clip import new_clip
from pipeline.semantics.public_text import public_text_embeddings


@pytest.mark.slow
def test_they_are_means_over_the_prompts_before_normalisation() -> None:
    torch.manual_seed(0)
    model = new_clip("RN50", quick_gelu=True).eval()
    state = {f"class_embed.clip.{name}": tensor for name, tensor in model.state_dict().items()}
    # The detector's own transformer is in the same state.
    state["transformer.encoder.layers.0.linear1.weight"] = torch.zeros(2, 2)
    names = ["aerosol_can", "bow_(weapon)"]
    found = public_text_embeddings(state, names)
    tokenizer = open_clip.get_tokenizer("RN50")
    for row, name in zip(found, names, strict=True):
        texts = [template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES] + [f"{name}."]
        assert len(texts) == 81
        with torch.no_grad():
            expected = model.encode_text(tokenizer(texts), normalize=False).mean(0)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)
    assert float((found.norm(dim=1) - 1).abs().max()) > 0.01, "their length is kept"


def test_a_checkpoint_without_the_text_tower_is_refused() -> None:
    state = {
        "class_embed.clip.text_projection": torch.zeros(4, 48),
        "transformer.encoder.layers.0.linear1.weight": torch.zeros(2, 2),
    }
    with pytest.raises(DataError, match=r"1 tensors of a text tower .*without --annotations"):
        public_text_embeddings(state, ["cat"])
