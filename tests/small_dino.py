"""A DINO that trains in a moment, for tests of detectors and of training."""

from typing import Any

NUM_CATEGORIES = 12

SMALL: dict[str, Any] = {
    "backbone": {
        "name": "resnet10t",
        "weights": None,
        "norm": "group",
        "frozen_stages": 0,
        "arguments": {"channels": [16, 24, 32, 48], "stem_width": 8},
    },
    "hidden_dim": 32,
    "num_heads": 4,
    "num_points": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "ffn_dim": 48,
    "num_queries": 15,
    "denoising": {"num_queries": 12},
}
