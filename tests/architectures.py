"""One torchvision model of each kind whose exports must be known as dpm's own, in every format."""

KINDS = ["vit_b_16", "swin_t", "convnext_tiny", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5", "googlenet"]
