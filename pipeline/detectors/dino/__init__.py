"""DINO: DETR with improved denoising anchor boxes (Zhang et al., ICLR 2023)."""
