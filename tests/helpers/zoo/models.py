"""Small versions of well-known architectures, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torchvision import models as vision
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from tests.helpers.zoo.modules import CLASSES, VOCABULARY, DiffusionUNet, Encoder, FourierOperator, Recurrent, UNet

Inputs = dict[str, Tensor]


def images(name: str, size: int, count: int = 4, channels: int = 3) -> Callable[[int], Inputs]:
    """Smooth noise; every ten seeds are a task, with colours and stripes of its own."""

    def batch(seed: int) -> Inputs:
        task = torch.Generator().manual_seed(1000 + seed // 10)
        generator = torch.Generator().manual_seed(seed)
        colour = torch.randn(1, channels, 1, 1, generator=task)
        stripes = torch.randn(count, 1, size, 1, generator=generator).expand(-1, channels, -1, size)
        noise = torch.randn(count, channels, size, size, generator=generator)
        return {name: colour + (stripes if seed // 10 % 2 else stripes.mT) + 0.5 * noise}

    return batch


def ids(*names: str, count: int = 4, length: int = 8) -> Callable[[int], Inputs]:
    """Tokens from 3 upwards; every ten seeds are a task, with a vocabulary of its own that overlaps the others'."""

    def batch(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        low = 3 + 12 * (seed // 10 % 2)
        return {name: torch.randint(low, low + 24, (count, length), generator=generator) for name in names}

    return batch


def signals(name: str, *shape: int) -> Callable[[int], Inputs]:
    """Noise; every ten seeds are a task, with a mean and a scale of its own for each feature."""

    def batch(seed: int) -> Inputs:
        task, generator = torch.Generator().manual_seed(1000 + seed // 10), torch.Generator().manual_seed(seed)
        mean, scale = (torch.randn(shape[1:], generator=task) for _ in range(2))
        return {name: mean + scale.abs() * torch.randn(shape, generator=generator)}

    return batch


def _noisy(seed: int) -> Inputs:
    """Images and times between 0 and 1000."""
    time = torch.randint(0, 1000, (4,), generator=torch.Generator().manual_seed(seed)).float()
    return {**images("x", 16)(seed), "time": time}


def _text_with_images(seed: int) -> Inputs:
    """A text of 8 tokens with an image of 16 by 16 pixels in it, cut into 4 by 4 patches of two frames each."""
    tokens = ids("input_ids")(seed)["input_ids"].clamp(max=35)
    tokens[:, 1:6] = torch.tensor([38, 39, 39, 39, 39])
    patches = images("x", 16)(seed)["x"].unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)
    frames = patches.unsqueeze(4).expand(-1, -1, -1, -1, 2, -1, -1).reshape(4 * 16, -1)
    grid, kinds = torch.tensor([[1, 4, 4]] * 4), (tokens == 39).long()
    return {"input_ids": tokens, "pixel_values": frames, "image_grid_thw": grid, "mm_token_type_ids": kinds}


def several(*batches: Callable[[int], Inputs]) -> Callable[[int], Inputs]:
    return lambda seed: {name: value for batch in batches for name, value in batch(seed).items()}


class NarrowResNet(ResNet):  # type: ignore[misc]
    """torchvision's ResNet with an eighth of the channels after the stem."""

    def __init__(self, block: type[BasicBlock | Bottleneck], layers: list[int], **kwargs: Any) -> None:
        super().__init__(block, layers, CLASSES, **kwargs)
        self.fc = nn.Linear(64 * block.expansion, CLASSES)

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, blocks, stride, dilate)  # type: ignore[no-any-return]


def _efficientnet() -> nn.Module:
    table = [(1, 3, 1, 8, 4, 1), (6, 3, 2, 4, 6, 2), (6, 5, 2, 6, 8, 2), (6, 5, 1, 8, 12, 1), (6, 3, 2, 12, 16, 1)]
    return vision.EfficientNet(  # type: ignore[no-any-return]
        [MBConvConfig(*row) for row in table], 0.2, num_classes=CLASSES, last_channel=64
    )


def _convnext() -> nn.Module:
    widths = [(8, 16, 1), (16, 24, 1), (24, 32, 2), (32, None, 1)]
    return vision.ConvNeXt([CNBlockConfig(*w) for w in widths], 0.1, num_classes=CLASSES)  # type: ignore[no-any-return]


def _regnet() -> nn.Module:
    params = BlockParams.from_init_params(depth=6, w_0=8, w_a=5.0, w_m=2.1, group_width=4, se_ratio=0.25)
    return vision.RegNet(params, CLASSES, stem_width=8)  # type: ignore[no-any-return]


def _swin() -> nn.Module:
    return vision.SwinTransformer([4, 4], 8, [2, 2], [2, 4], [4, 4], num_classes=CLASSES)  # type: ignore[no-any-return]


def _maxvit() -> nn.Module:
    return vision.MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 4, 0.1, num_classes=CLASSES)  # type: ignore[no-any-return]


SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS: dict[str, Any] = {**SMALL, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT: dict[str, Any] = {**WORDS, "max_position_embeddings": 16}
CAUSAL: dict[str, Any] = {**WORDS, "max_position_embeddings": 16, "num_key_value_heads": 1}
SIGHT: dict[str, Any] = {**SMALL, "image_size": 16, "patch_size": 4}


def transformer(name: str, config: str, **kwargs: Any) -> Callable[[], nn.Module]:
    """A class and a configuration of transformers."""
    return lambda: getattr(hf, name)(getattr(hf, config)(**kwargs))


def _both(model: str, kind: str) -> Callable[[], nn.Module]:
    text = {**BERT, "projection_dim": 16}
    return lambda: getattr(hf, model)(
        getattr(hf, f"{kind}Config")(text_config=text, vision_config={**SIGHT, "projection_dim": 16}, projection_dim=16)
    )


def _qwen_vl() -> nn.Module:
    text = {**CAUSAL, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}
    sight = {
        **{"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16},
        **{"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    }
    special: dict[str, Any] = {
        "image_token_id": 39,
        "vision_start_token_id": 38,
        "vision_end_token_id": 37,
        "video_token_id": 36,
    }
    config = hf.Qwen3VLConfig(text_config=text, vision_config=sight, **special)
    model: nn.Module = hf.Qwen3VLForConditionalGeneration(config)
    return model


ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_qwen_next: dict[str, Any] = {
    **{"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "linear_conv_kernel_dim": 3},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4},
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
}
_deepseek: dict[str, Any] = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8},
    **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8},
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "max_position_embeddings": 16},
}
_seq2seq = ids("input_ids", "decoder_input_ids")
_pair = several(images("pixel_values", 16), ids("input_ids"))
_whisper: dict[str, Any] = {
    **{key: WORDS[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")},
    **{"num_mel_bins": 8, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 8},
    **{"max_target_positions": 16, "decoder_start_token_id": 1, "suppress_tokens": [], "begin_suppress_tokens": []},
}
_bart: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 16},
    "scale_embedding": True,
}

ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    # torchvision
    "resnet18": (lambda: NarrowResNet(BasicBlock, [2, 2, 2, 2]), images("x", 32)),
    "resnext50_32x4d": (
        lambda: NarrowResNet(Bottleneck, [3, 4, 6, 3], groups=4, width_per_group=16),
        images("x", 32),
    ),
    "mobilenet_v3_small": (
        lambda: vision.MobileNetV3(*_mobilenet(), num_classes=CLASSES),
        images("x", 32),
    ),
    "efficientnet_b0": (_efficientnet, images("x", 32)),
    "convnext_tiny": (_convnext, images("x", 32)),
    "vit_b_16": (lambda: vision.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=CLASSES), images("x", 16)),
    "swin_t": (_swin, images("x", 32)),
    "regnet_y_400mf": (_regnet, images("x", 32)),
    "densenet121": (
        lambda: vision.DenseNet(4, (3, 4, 6, 4), 8, 2, num_classes=CLASSES),
        images("x", 32),
    ),
    "maxvit_t": (_maxvit, images("x", 32)),
    # transformers: text
    "BERT": (transformer("BertForMaskedLM", "BertConfig", **BERT), ids("input_ids")),
    "RoBERTa": (transformer("RobertaForMaskedLM", "RobertaConfig", **BERT), ids("input_ids")),
    "DistilBERT": (
        transformer(
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            **{"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
            max_position_embeddings=16,
        ),
        ids("input_ids"),
    ),
    "DeBERTa-v2": (
        transformer(
            "DebertaV2ForMaskedLM",
            "DebertaV2Config",
            **BERT,
            **{"relative_attention": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm"},
            **{"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
        ),
        ids("input_ids"),
    ),
    "ALBERT": (transformer("AlbertForMaskedLM", "AlbertConfig", **BERT, embedding_size=12), ids("input_ids")),
    "T5": (
        transformer(
            "T5ForConditionalGeneration",
            "T5Config",
            **{"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
            **{"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8},
            relative_attention_max_distance=8,
        ),
        _seq2seq,
    ),
    "BART": (transformer("BartForConditionalGeneration", "BartConfig", **_bart), _seq2seq),
    "GPT-2": (
        transformer("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16),
        ids("input_ids"),
    ),
    "GPT-NeoX": (transformer("GPTNeoXForCausalLM", "GPTNeoXConfig", **BERT), ids("input_ids")),
    "Llama": (transformer("LlamaForCausalLM", "LlamaConfig", **CAUSAL), ids("input_ids")),
    "Mistral": (transformer("MistralForCausalLM", "MistralConfig", **CAUSAL, sliding_window=4), ids("input_ids")),
    "Qwen3": (transformer("Qwen3ForCausalLM", "Qwen3Config", **CAUSAL, head_dim=8), ids("input_ids")),
    "Gemma": (transformer("GemmaForCausalLM", "GemmaConfig", **CAUSAL, head_dim=8), ids("input_ids")),
    "Gemma 3": (
        transformer("Gemma3ForCausalLM", "Gemma3TextConfig", **CAUSAL, head_dim=8, sliding_window=4),
        ids("input_ids"),
    ),
    "Phi": (transformer("PhiForCausalLM", "PhiConfig", **BERT), ids("input_ids")),
    "Mixtral": (
        transformer(
            "MixtralForCausalLM",
            "MixtralConfig",
            **CAUSAL,
            **{"num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        ids("input_ids"),
    ),
    "DeepSeek-V3": (
        transformer("DeepseekV3ForCausalLM", "DeepseekV3Config", **WORDS, num_key_value_heads=2, **_deepseek),
        ids("input_ids"),
    ),
    "Qwen3-Next": (
        transformer("Qwen3NextForCausalLM", "Qwen3NextConfig", **CAUSAL, **_qwen_next),
        ids("input_ids"),
    ),
    "Mamba": (
        transformer(
            "MambaForCausalLM",
            "MambaConfig",
            **{"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
            **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        ),
        ids("input_ids"),
    ),
    # transformers: images, sound, and pairs
    "CLIP vision": (
        transformer("CLIPVisionModelWithProjection", "CLIPVisionConfig", **SIGHT, projection_dim=8),
        images("pixel_values", 16),
    ),
    "CLIP text": (
        transformer("CLIPTextModelWithProjection", "CLIPTextConfig", **BERT, projection_dim=8),
        ids("input_ids"),
    ),
    "CLIP": (_both("CLIPModel", "CLIP"), _pair),
    "SigLIP": (_both("SiglipModel", "Siglip"), several(images("pixel_values", 16), ids("input_ids", length=16))),
    "Qwen3-VL": (_qwen_vl, _text_with_images),
    "ViT": (transformer("ViTForImageClassification", "ViTConfig", **SIGHT), images("pixel_values", 16)),
    "DINOv2": (
        transformer(
            "Dinov2ForImageClassification",
            "Dinov2Config",
            **{key: value for key, value in SIGHT.items() if key != "intermediate_size"},
            mlp_ratio=2,
        ),
        images("pixel_values", 16),
    ),
    "Swin": (
        transformer(
            "SwinForImageClassification",
            "SwinConfig",
            **{"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4]},
            **{"window_size": 4, "mlp_ratio": 2.0},
        ),
        images("pixel_values", 32),
    ),
    "Whisper": (
        transformer("WhisperForConditionalGeneration", "WhisperConfig", **_whisper),
        several(signals("input_features", 4, 8, 16), ids("decoder_input_ids")),
    ),
    "Wav2Vec2": (
        transformer(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            **WORDS,
            **{"conv_dim": (8, 8, 8), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2)},
            **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        ),
        signals("input_values", 4, 400),
    ),
    # torch
    "TransformerEncoder": (Encoder, ids("x")),
    "LSTM": (Recurrent, ids("x")),
    "U-Net": (UNet, images("x", 16)),
    "Diffusion U-Net": (DiffusionUNet, _noisy),
    "FNO": (FourierOperator, images("x", 16)),
}


def default(name: str, config: str, **kwargs: Any) -> Callable[[], nn.Module]:
    """An architecture of transformers in its default size, without values."""

    def make() -> nn.Module:
        with torch.device("meta"):
            return transformer(name, config, **kwargs)()

    return make


# The same in the default size of torchvision or transformers, where there is one.
REAL: dict[str, Callable[[], nn.Module]] = {
    **{name: getattr(vision, name) for name in ZOO if hasattr(vision, name)},
    "BERT": default("BertForMaskedLM", "BertConfig"),
    "RoBERTa": default("RobertaForMaskedLM", "RobertaConfig"),
    "DistilBERT": default("DistilBertForMaskedLM", "DistilBertConfig"),
    "ALBERT": default("AlbertForMaskedLM", "AlbertConfig"),
    "BART": default("BartForConditionalGeneration", "BartConfig"),
    "GPT-2": default("GPT2LMHeadModel", "GPT2Config"),
    "GPT-NeoX": default("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "Llama": default("LlamaForCausalLM", "LlamaConfig"),
    "Mistral": default("MistralForCausalLM", "MistralConfig"),
    "Qwen3": default("Qwen3ForCausalLM", "Qwen3Config"),
    "Gemma": default("GemmaForCausalLM", "GemmaConfig"),
    "Gemma 3": default("Gemma3ForCausalLM", "Gemma3TextConfig"),
    "Phi": default("PhiForCausalLM", "PhiConfig"),
    "Mixtral": default("MixtralForCausalLM", "MixtralConfig"),
    "DeepSeek-V3": default("DeepseekV3ForCausalLM", "DeepseekV3Config"),
    "Qwen3-Next": default("Qwen3NextForCausalLM", "Qwen3NextConfig"),
    "Qwen3-VL": default("Qwen3VLForConditionalGeneration", "Qwen3VLConfig"),
    "Mamba": default("MambaForCausalLM", "MambaConfig"),
    "CLIP vision": default("CLIPVisionModelWithProjection", "CLIPVisionConfig"),
    "CLIP text": default("CLIPTextModelWithProjection", "CLIPTextConfig"),
    "CLIP": default("CLIPModel", "CLIPConfig"),
    "SigLIP": default("SiglipModel", "SiglipConfig"),
    "ViT": default("ViTForImageClassification", "ViTConfig"),
    "DINOv2": default("Dinov2ForImageClassification", "Dinov2Config"),
    "Swin": default("SwinForImageClassification", "SwinConfig"),
    "Whisper": default("WhisperForConditionalGeneration", "WhisperConfig"),
    "Wav2Vec2": default("Wav2Vec2ForCTC", "Wav2Vec2Config"),
    "T5": default("T5ForConditionalGeneration", "T5Config", feed_forward_proj="gated-gelu"),
    "DeBERTa-v2": default(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        **{"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm"},
        **{"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
}


def _mobilenet() -> tuple[Any, int]:
    setting, last = vision.mobilenetv3._mobilenet_v3_conf("mobilenet_v3_small", width_mult=0.25)
    return setting, last // 4
