"""Text encoders: a T5 or ByT5 by name, frozen; or a small ByT5 from scratch; and their tokenizers.

An encoder is called with ids (B, S) and a mask (B, S), True at tokens, and gives (B, S, D) float32.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import transformers

from config import UserError
from corpora import espeak
from pretrained import frozen
from pretrained.frozen import Frozen


def load_text_encoder(name: str) -> tuple[nn.Module, Callable, int]:
    """A text encoder, on the CPU: encoder(ids (B, S), mask (B, S) bool) -> (B, S, width) float32.

    name: hub id or folder of a T5 or ByT5, frozen, bf16 once moved to a GPU | scratch: a small ByT5, random
    and to be trained.
    returns: encoder, its tokenizer (see `tokenize`), width.
    """
    if name == "scratch":
        return scratch_text_encoder()
    hint = "give --text_encoder the folder of a T5 or ByT5, or scratch to train a small one along"
    offline = frozen.local_files_only(name)
    try:
        t5, report = transformers.T5EncoderModel.from_pretrained(
            name, dtype=torch.float32, local_files_only=offline, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=offline)
    except Exception as e:  # each library has its own exceptions for a missing or damaged file
        raise UserError(f"text encoder {name}: cannot be loaded ({frozen.one_line(e)}); {hint}") from e
    missing = frozen.first_missing(report)
    if missing:
        raise UserError(f"text encoder {name}: its weights lack {missing}; {hint}")
    ids = tokenize(tokenizer, ["the"])[0]
    if tokenizer.unk_token_id in ids:  # without files, AutoTokenizer makes up an empty vocabulary
        raise UserError(f"text encoder {name}: it has no tokenizer of its own; {hint}")
    encoder = Frozen(T5TextEncoder(t5), cuda_dtype=torch.bfloat16)
    return encoder, tokenizer, t5.config.d_model


def scratch_text_encoder() -> tuple[nn.Module, Callable, int]:
    """What `load_text_encoder` returns, for a small random ByT5."""
    config = transformers.T5Config(
        vocab_size=384,
        d_model=192,
        d_kv=32,
        d_ff=512,
        num_layers=2,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    encoder = T5TextEncoder(transformers.T5EncoderModel(config))
    return encoder, transformers.ByT5Tokenizer(), config.d_model


def tokenize(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text, EOS appended: "" -> [eos]. Text that looks like a special token, "</s>", is text."""
    return [tokenizer(text, split_special_tokens=True).input_ids for text in texts]


class PhonemeTokenizer:
    """A byte tokenizer of a text's phonemes, in espeak-ng's ASCII notation, instead of its letters.

    So pronunciation need not be learned.
    """

    def __init__(self, tokenizer: Callable):
        self.tokenizer = tokenizer

    def __call__(self, text: str, **options):
        return self.tokenizer(espeak.phonemes(text), **options)


class T5TextEncoder(nn.Module):
    """A T5 encoder, called by position; padding (mask False) is not attended to and encodes nothing."""

    def __init__(self, t5: nn.Module):
        super().__init__()
        self.stack = t5.encoder  # t5 itself holds the embedding under two names

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # added to the scores: into a mask (B, S) transformers looks, for which the host waits
        scores_mask = torch.zeros(mask.shape, device=mask.device)
        scores_mask = scores_mask.masked_fill(~mask, torch.finfo(torch.bfloat16).min)
        output = self.stack(input_ids=ids, attention_mask=scores_mask[:, None, None])
        return output.last_hidden_state.float()  # (B, S, D)
