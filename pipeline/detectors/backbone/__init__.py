"""The backbone: any timm model that gives feature maps, and plain ViTs with a simple pyramid."""

from pipeline.detectors.backbone.backbone import Backbone, ParameterRule
from pipeline.detectors.backbone.maps import FeatureMap, group_norm, resize_mask
from pipeline.detectors.backbone.weights import is_local

__all__ = [
    "Backbone",
    "FeatureMap",
    "ParameterRule",
    "group_norm",
    "is_local",
    "resize_mask",
]
