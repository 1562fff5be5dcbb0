"""DINOv2: self-distillation with DINO, iBOT and KoLeo losses (arXiv 2304.07193)."""
