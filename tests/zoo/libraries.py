"""Models of timm and transformers, small and with random weights."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from zoo import Case, Network


def cases() -> Iterator[Case]:
    """One case for each model."""
    for name in TIMM:
        yield Case(name, functools.partial(_timm, name), "timm", "timm")
    for name in TRANSFORMERS:
        yield Case(name, functools.partial(_transformers, name), "transformers", "transformers")


def _perturbed(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode, perturbed so that no parameter stays zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval().double()


@functools.cache
def declare_operators() -> None:
    """Declare torchvision's operators if its compiled library, built for CUDA, does not load with this torch.

    The models call none of them, but torchvision and packages that import it fail without them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# --- timm

TIMM = (
    "test_byobnet",
    "test_coatnet",
    "test_convnext",
    "test_convnext2",
    "test_convnext3",
    "test_efficientnet",
    "test_efficientnet_evos",
    "test_efficientnet_gn",
    "test_efficientnet_ln",
    "test_mambaout",
    "test_maxvit",
    "test_nfnet",
    "test_resnet",
    "test_vit",
    "test_vit2",
    "test_vit3",
    "test_vit4",
    "test_vit_relpos",
)
"""timm's models for tests: its architectures at a small width and depth."""


SHALLOW = False
"""Whether timm's transformers and one of its ConvNeXts have two blocks, instead of their own number of equal ones."""


def _timm(name: str) -> Network:
    declare_operators()
    import timm

    sized: dict[str, Any] = {"img_size": 64} if any(kind in name for kind in ("vit", "coatnet")) else {}
    if SHALLOW and name.startswith("test_vit"):
        sized["depth"] = 2
    if SHALLOW and name == "test_convnext":
        sized["depths"] = [1, 1, 2, 1]
    model = timm.create_model(name, pretrained=False, num_classes=3, **sized)
    return _perturbed(model), torch.randn(2, 3, 64, 64, dtype=torch.float64)


# --- transformers

TEXT: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
"""Sizes of a language model."""


class Read(nn.Module):
    """A model as a function of one tensor, with three outputs per sample."""

    def __init__(self, model: nn.Module, read: Callable[[Any], Tensor], **options: Any) -> None:
        super().__init__()
        self.model, self.read, self.options = model, read, options

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.model(x, **self.options))


def _state(output: Any) -> Tensor:
    return output.last_hidden_state[:, -1, :3]


def _logits(output: Any) -> Tensor:
    return output.logits[:, -1, :3]


def _decoder(kind: str, **sizes: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**(TEXT | sizes), use_cache=False, experts_implementation="eager")
    return Read(getattr(transformers, f"{kind}ForCausalLM")(config), _logits)


def _bert() -> nn.Module:
    import transformers

    return Read(transformers.BertModel(transformers.BertConfig(**TEXT)), _state)


def _gpt2(*, cache: bool) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return Read(transformers.GPT2LMHeadModel(config), _logits, use_cache=cache)


def _t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return Read(transformers.T5EncoderModel(config), _state)


def _mamba() -> nn.Module:
    import transformers

    config = transformers.MambaConfig(vocab_size=31, hidden_size=16, state_size=4, num_hidden_layers=2, use_cache=False)
    return Read(transformers.MambaForCausalLM(config), _logits)


def _vit() -> nn.Module:
    import transformers

    sizes = {key: value for key, value in TEXT.items() if key not in ("vocab_size", "max_position_embeddings")}
    return Read(transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)), _state)


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "BERT": _bert,
    "GPT-2": functools.partial(_gpt2, cache=False),
    "GPT-2 with a cache": functools.partial(_gpt2, cache=True),
    "Llama": functools.partial(_decoder, "Llama", num_key_value_heads=1),
    "Mixtral": functools.partial(_decoder, "Mixtral", num_key_value_heads=1, num_local_experts=3),
    "T5 encoder": _t5,
    "Mamba": _mamba,
    "ViT": _vit,
}


def _transformers(name: str) -> Network:
    declare_operators()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64) if name == "ViT" else torch.randint(0, 31, (3, 6))
    return _perturbed(TRANSFORMERS[name]()), x
