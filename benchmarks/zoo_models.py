"""The models of the zoo: their names, and how each is built with random weights and inputs that it takes.

timm:NAME            a small member of every family: a module of timm and the letters that its names begin with
torchvision:NAME     all: classifiers, segmentation, detection, video, optical flow (quantised ones aside)
hf:TYPE              Hugging Face transformers, from their configurations, with two layers a stage
topology:NAME        the tiny nets of tests/graph
"""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

# The smallest member of each family, where it is not the first by name.
SMALL = """
aimv2_large_patch14_224 bat_resnext26ts beit3_base_patch16_224 beit_base_patch16_224 beitv2_base_patch16_224
botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny coatnet_pico_rw_224 coatnext_nano_rw_224 convformer_s18
convit_tiny convmixer_768_32 convnext_zepto_rms convnextv2_atto cpubone_nano crossvit_tiny_240 cs3darknet_focus_s
csatv2 cspdarknet53 cspnext_tiny cspresnet50 cspresnext50 darknet17 darknetaa53 davit_tiny deepseek_vit_412m
deit_tiny_patch16_224 densenet121 densenetblur121d dla46x_c dm_nfnet_f0 dpn48b eca_botnext26ts_256 eca_nfnet_l0
eca_resnext26ts eca_vovnet39b ecaresnet50d_pruned ecaresnetlight ecaresnext26t_32x4d edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 efficientnetv2_rw_t efficientvim_m1 efficientvit_b0
efficientvit_m0 ese_vovnet19b_slim_dw eva02_tiny_patch14_224 eva_large_patch14_196 fasternet_t0 fastvit_t8 fbnetc_100
fbnetv3_b flexivit_small focalnet_tiny_srf gc_efficientnetv2_rw_t gcresnet33ts gcresnext26ts gcvit_xxtiny
gemma4_vit_167m gernet_s ghostnet_050 ghostnetv3_050 gmixer_12_224 gmlp_ti16_224 halo2botnet50ts_256 halonet_h1
haloregnetz_b hardcorenas_b hgnet_tiny hgnetv2_b0 hiera_tiny_224 hieradet_small hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t lamhalobotnet50ts_256 lcnet_035
lcnetv2_small legacy_seresnet18 legacy_xception levit_128s lowformer_b0 mambaout_femto maxvit_pico_rw_256
maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 mixer_s16_224 mixnet_s mnasnet_small mobilenet_edgetpu_100
mobilenetv2_035 mobilenetv3_small_050 mobilenetv5_base mobileone_s1 mobilevit_xxs mobilevitv2_050 mvitv2_tiny
naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 nfnet_f0 pit_ti_224 pnasnet5large
poolformer_s12 poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetv_040 regnetx_002 regnety_002 regnetz_005
regnetz_b16 repghostnet_050 repvgg_a0 repvit_m1 res2next50 resmlp_12_224 resnest14d resnet10t resnet32ts resnetaa34d
resnetblur18 resnetrs50 resnetv2_18 resnext26ts resnext50_32x4d rexnet_100 rexnetr_100 sam2_hiera_tiny
samvit_base_patch16_224 sebotnet33ts_256 sedarknet21 sehalonet33ts selecsls42 semnasnet_050 senet154 sequencer2d_s
seresnet18 seresnet33ts seresnetaa50d seresnext26t_32x4d seresnext26ts seresnextaa101d_32x8d shvit_s1 skresnet18
skresnext50_32x4d spnasnet_100 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
swinv2_tiny_window8_256 test_byobnet test_coatnet test_convnext test_efficientnet test_mambaout test_nfnet test_resnet
test_vit test_vit_relpos tf_mixnet_s tf_mobilenetv3_small_075 tiny_vit_5m_224 tinynet_e tnt_s_legacy_patch16_224
tresnet_m twins_svt_small vgg11 visformer_tiny vit_betwixt_patch16_gap_256 vit_srelpos_small_patch16_224
vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 vovnet39a wide_resnet50_2 xception41p
xcit_nano_12_p8_224
""".split()
# More of torchvision's inputs than pictures of 224 × 224; detectors take lists of pictures.
SIZES = {"inception_v3": 299}
SMALLER = ("fcn_", "deeplabv3_", "lraspp_")
VIDEOS = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_b", "swin3d_s", "swin3d_t")
HF_HEADS = {
    "AutoModelForImageClassification": """
        beit bit clip convnext convnextv2 cvt data2vec-vision deit dinov2 dinov2_with_registers donut-swin efficientnet
        focalnet hgnet_v2 hiera ijepa levit metaclip_2 mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 poolformer
        pp_lcnet pvt pvt_v2 regnet resnet segformer siglip swiftformer swin swinv2 textnet vit vit_msn""",
    "AutoModelForSemanticSegmentation": "segformer dpt",
    "AutoModelForDepthEstimation": "glpn",
    "AutoBackbone": "dinov3_vit dinov3_convnext vitdet",
    "AutoModelForObjectDetection": "yolos",
}
HF_SHALLOW = {"num_hidden_layers": 2, "image_size": 224}  # where a configuration has them


def all_names() -> list[str]:
    """Every model, the small ones first."""
    return [*topology_names(), *torchvision_names(), *timm_names(), *hf_names()]


def timm_names() -> Iterator[str]:
    import timm
    from timm.models import _registry

    families: dict[tuple[str, str], list[str]] = {}
    for name in timm.list_models():
        module = _registry._model_entrypoints[name].__module__
        letters = re.match("[a-z]*", name)
        assert letters is not None
        families.setdefault((module, letters[0]), []).append(name)
    for names in families.values():
        yield "timm:" + next((name for name in SMALL if name in names), names[0])


def torchvision_names() -> list[str]:
    import torchvision

    names: Iterable[str] = torchvision.models.list_models()
    return [f"torchvision:{name}" for name in names if not name.startswith("quantized")]


def hf_names() -> Iterator[str]:
    for head, kinds in HF_HEADS.items():
        for kind in kinds.split():
            yield f"hf:{kind}" if head == "AutoModelForImageClassification" else f"hf:{head}/{kind}"


def topology_names() -> list[str]:
    return [f"topology:{name}" for name in topologies()]


def topologies() -> Any:
    """The table of tests/graph."""
    folder = str(Path(__file__).parents[1] / "tests" / "graph")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import odd_topologies  # noqa: F401  registers more
    from topologies import TOPOLOGIES

    return TOPOLOGIES


def build(name: str) -> tuple[nn.Module, Any]:
    """A model with random weights, and inputs for a batch of two."""
    source, _, name = name.partition(":")
    match source:
        case "timm":
            return _build_timm(name)
        case "torchvision":
            return _build_torchvision(name)
        case "hf":
            return _build_hf(name)
        case "topology":
            case = topologies()[name]
            return case.build(), case.example
        case _:
            raise ValueError(f"{source}:{name} is not in the zoo")


def _build_timm(name: str) -> tuple[nn.Module, Any]:
    import timm
    import torch

    model = timm.create_model(name)
    return model, torch.randn(2, *model.pretrained_cfg.get("input_size", (3, 224, 224)))


def _build_torchvision(name: str) -> tuple[nn.Module, Any]:
    import torch
    import torchvision

    lone = {"weights": None, "weights_backbone": None}
    known = torchvision.models.list_models(module=torchvision.models)
    model = torchvision.models.get_model(name, **({"weights": None} if name in known else _accepted(name, lone)))
    if name in known:
        size = SIZES.get(name, 224)
        return model, torch.randn(2, 3, size, size)
    if name in VIDEOS:
        frames, size = (16, 224) if name.startswith("mvit") else (8, 64)
        return model, torch.randn(2, 3, frames, size, size)
    if name.startswith("raft"):
        return model, (torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128))
    if name.startswith(SMALLER):
        return model, torch.randn(2, 3, 128, 128)
    return model, ([torch.rand(3, 224, 224), torch.rand(3, 224, 224)],)


def _accepted(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that a builder of torchvision takes."""
    import inspect

    import torchvision

    known = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    return {key: value for key, value in arguments.items() if key in known}


def _build_hf(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    import torch
    import transformers

    head, _, kind = name.rpartition("/")
    config = transformers.AutoConfig.for_model(kind)
    vision = getattr(config, "vision_config", config)
    for key, value in HF_SHALLOW.items():
        if isinstance(getattr(vision, key, None), int):
            setattr(vision, key, value)
    model = getattr(transformers, head or "AutoModelForImageClassification").from_config(config)
    size = getattr(vision, "image_size", 224)
    size = size if isinstance(size, int) and size <= 384 else 224
    return model, {"pixel_values": torch.randn(2, getattr(vision, "num_channels", 3), size, size)}
