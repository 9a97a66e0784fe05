"""Small relatives of open_clip's architectures, one of each kind of text and image tower, with
tokenizers and text towers of Hugging Face's layout that are made here."""

import json
from pathlib import Path
from typing import Any

import open_clip
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import M2M100Config, MT5Config, PreTrainedTokenizerFast, RobertaConfig

WORDS = ["a", "red", "cube", "blue", "ball", "green", "cone", "two", "spheres", "beside", "on"]
TEXT = {"width": 32, "heads": 2, "layers": 2}
VIT = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TIMM = {"timm_model_name": "test_vit", "image_size": 160}
EVA = {"timm_model_name": "eva02_tiny_patch14_224"}
RESNET = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}

# Name in the tests: whose relative, its image tower, its text tower, its tokenizer
KINDS: dict[str, tuple[str, dict, dict, str]] = {
    # open_clip's class CLIP
    "small-vit": ("ViT-B-32", VIT, TEXT, ""),
    "small-resnet": ("RN50", RESNET, TEXT, ""),
    "small-convnext": ("convnext_tiny", {**TIMM, "timm_model_name": "test_convnext"}, TEXT, ""),
    "small-clipa": ("ViT-H-14-CLIPA", VIT, {**TEXT, "vocab_size": 64}, "bert"),
    "small-worldwide": ("ViT-H-14-worldwide", VIT, {**TEXT, "vocab_size": 64}, "roberta"),
    # CustomTextCLIP with open_clip's text tower: causal, and not
    "small-eva": ("EVA02-B-16", EVA, TEXT, ""),
    "small-mobile": ("MobileCLIP-S1", {**TIMM, "timm_model_name": "test_efficientnet"}, TEXT, ""),
    # SigLIP and SigLIP 2
    "small-sig": ("ViT-B-16-SigLIP", TIMM, {**TEXT, "vocab_size": 64}, "sig"),
    "small-sig-2": ("ViT-B-16-SigLIP2", TIMM, {**TEXT, "vocab_size": 64}, "sig2"),
    # CoCa
    "small-coca": ("coca_ViT-B-32", VIT, TEXT, ""),
    # CustomTextCLIP and CoCa with a text tower of Hugging Face
    "small-roberta": ("roberta-ViT-B-32", VIT, {}, "roberta"),
    "small-mt5": ("mt5-base-ViT-B-32", VIT, {}, "sig2"),
    "small-nllb": ("nllb-clip-base", VIT, {}, "roberta"),
    "small-coca-roberta": ("coca_roberta-ViT-B-32", VIT, {}, "roberta"),
}
CHAINS = (  # ten of them, of all five kinds
    "small-vit", "small-resnet", "small-worldwide", "small-eva", "small-mobile", "small-sig",
    "small-sig-2", "small-coca", "small-roberta", "small-mt5",
)  # fmt: skip
# First ids, by meaning: what pads, begins and ends a text
SPECIAL: dict[str, dict[str, str]] = {
    "bert": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    "roberta": {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"},
    "sig": {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"},
    "sig2": {"pad_token": "<pad>", "eos_token": "</s>"},
}
TEMPLATES = {
    "bert": "[CLS] $A [SEP]", "roberta": "<s> $A </s>", "sig": "$A </s>", "sig2": "$A </s>"
}  # fmt: skip


def write_architectures(folder: Path) -> None:
    """Write the configurations and tokenizers to a folder, and register them with open_clip."""
    for kind in SPECIAL:
        write_tokenizer(folder / "tokenizers" / kind, kind)
    towers = {
        "roberta-ViT-B-32": RobertaConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=90,
        ),
        "mt5-base-ViT-B-32": MT5Config(
            vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2
        ),
        "nllb-clip-base": M2M100Config(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
            encoder_attention_heads=2, decoder_ffn_dim=64, decoder_attention_heads=2,
        ),
    }  # fmt: skip
    towers["coca_roberta-ViT-B-32"] = towers["roberta-ViT-B-32"]
    configs = folder / "configs"
    configs.mkdir()
    for name, (relative, vision, text, tokenizer) in KINDS.items():
        model: dict[str, Any] = open_clip.get_model_config(relative)  # pyright: ignore
        model["vision_cfg"] = {**model["vision_cfg"], **vision}
        model["text_cfg"] = {**model["text_cfg"], **text}
        model["embed_dim"] = 64 if vision is TIMM and "sig" in tokenizer else 32
        if tokenizer:
            model["text_cfg"]["hf_tokenizer_name"] = str(folder / "tokenizers" / tokenizer)
        if relative in towers:
            towers[relative].save_pretrained(folder / relative)
            model["text_cfg"]["hf_model_name"] = str(folder / relative)
        if "multimodal_cfg" in model:
            small = {"width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
            model["multimodal_cfg"] |= small
            model["vision_cfg"]["attn_pooler_heads"] = 2
        (configs / f"{name}.json").write_text(json.dumps(model))
    open_clip.add_model_config(configs)


def write_tokenizer(folder: Path, kind: str) -> None:
    """Write a tokenizer of whole words in the layout of Hugging Face."""
    special = list(dict.fromkeys(SPECIAL[kind].values()))
    ids = {word: i for i, word in enumerate(dict.fromkeys([*special, "<unk>", *WORDS]))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single=TEMPLATES[kind], special_tokens=[(word, ids[word]) for word in special]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL[kind]).save_pretrained(folder)
