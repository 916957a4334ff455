"""The text half of the student: CLIP's tokens, then a Lite Transformer with Long-Short Range Attention.

Each block sends half of the channels through attention, which sees the whole caption, and half through a
convolution along time, which sees the neighbours (Wu et al. 2020, https://arxiv.org/abs/2004.11886).
"""

import unicodedata
from functools import cache

import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from mclip.config import TextConfig

_byte_pairs = cache(SimpleTokenizer)  # built at the first caption, not at import
END_TOKEN = 49407


def clean_caption(text: str) -> str:
    """``text`` by the one cleaning rule, for training captions and for prompts alike.

    Unicode NFKC, white space collapsed, lower case, punctuation stripped at both ends: "A dog." becomes "a dog".
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = unicodedata.normalize("NFKC", text)  # lower case can leave combining marks out of order
    kept = [i for i, c in enumerate(text) if not c.isspace() and unicodedata.category(c)[0] != "P"]
    return " ".join(text[kept[0] : kept[-1] + 1].split()) if kept else ""


class Tokenizer:
    """CLIP's byte-pair tokenizer (Radford et al. 2021, through open_clip) behind :func:`clean_caption`.

    ``padded`` makes every row ``context_length`` long, as open_clip's tokenizers do; else the longest caption decides.
    """

    def __init__(self, context_length: int, padded: bool = False) -> None:
        self.context_length, self.padded = context_length, padded

    def __call__(self, texts: str | list[str]) -> Tensor:
        """Captions, one or more -> token ids (B, T): 49406, the words, 49407 (also after a cut), and 0 as padding."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError("no captions to tokenise: give at least one.")
        tokens = _byte_pairs()([clean_caption(text) for text in texts], context_length=self.context_length)
        return tokens if self.padded else tokens[:, : int((~padding_mask(tokens)).sum(1).max())]


def padding_mask(tokens: Tensor) -> Tensor:
    """True where a token is padding, (B, T): after the first end token, since CLIP's pad, 0, is also the token "!"."""
    end = (tokens == END_TOKEN).int()
    return end.cumsum(1) > end


def toeplitz(kernel: Tensor, length: int) -> Tensor:
    """The banded matrices (H, T, T) that apply ``kernel`` (H, K), K odd, along T steps: row t is centred on t."""
    taps = kernel.shape[1]
    step = torch.arange(length, device=kernel.device)
    tap = step[None, :] - step[:, None] + taps // 2
    return kernel[:, tap.clamp(0, taps - 1)] * ((tap >= 0) & (tap < taps))


def mix_steps(matrices: Tensor, x: Tensor) -> Tensor:
    """Each of the ``matrices`` (H, T, T) applied along time to its C/H channels in a row of x (B, T, C) -> the same."""
    # One matrix product per head covers the batch: about three times as fast as conv1d on captions of 32 tokens.
    (batch, length, channels), heads = x.shape, len(matrices)
    x = x.view(batch, length, heads, -1).permute(2, 1, 0, 3).reshape(heads, length, -1)
    return (matrices @ x).view(heads, length, batch, -1).permute(2, 1, 0, 3).reshape(batch, length, channels)


class LightConv(nn.Module):
    """Depthwise convolution along time; a head's channels share a softmax-normalised kernel (Wu et al. 2019)."""

    def __init__(self, channels: int, heads: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, kernel_size))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> the same."""
        kernel = self.weight.softmax(1).to(x.dtype)
        return mix_steps(toeplitz(kernel, x.shape[1]), x)


class LSRABlock(nn.Module):
    """Pre-norm Lite Transformer block (Wu et al. 2020, Figure 3): LSRA, then a feed-forward layer."""

    def __init__(self, width: int, heads: int, kernel_size: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        half = width // 2
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(half, heads, batch_first=True)
        self.gate = nn.Linear(half, 2 * half)
        self.conv = LightConv(half, heads, kernel_size)
        self.mix = nn.Linear(half, half)
        widen, narrow = nn.Linear(width, feed_forward), nn.Linear(feed_forward, width)
        self.feed_forward = nn.Sequential(nn.LayerNorm(width), widen, nn.GELU(), narrow)
        self.dropout = nn.Dropout(dropout)

    def attend(self, x: Tensor, padding: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Long range: left half (B, T, d/2), normalised -> the same shape; weights (B, H, T, T) if asked for."""
        # The mask is boolean: a float mask would be added to the scores, which leaves weight on the pads.
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=need_weights, average_attn_weights=False)

    def convolve(self, x: Tensor, padding: Tensor) -> Tensor:
        """Short range: right half (B, T, d/2), normalised -> the same shape."""
        x = F.glu(self.gate(x), dim=2)
        # Pads are zeroed first, because the convolution reaches over the end of the caption.
        return self.mix(self.conv(x.masked_fill(padding[:, :, None], 0)))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """x (B, T, d), padding (B, T) with True = pad -> (B, T, d); values at pads are meaningless."""
        left, right = self.norm(x).chunk(2, dim=2)
        x = x + self.dropout(torch.cat([self.attend(left, padding)[0], self.convolve(right, padding)], dim=2))
        return x + self.dropout(self.feed_forward(x))


class TextEncoder(nn.Module):
    """Token ids -> features at the end token."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.features = width = config.width
        rank = config.embedding_rank
        self.token_embedding: nn.Module = nn.Embedding(config.vocab_size, rank or width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        if rank is not None:
            expand = nn.Linear(rank, width, bias=False)
            nn.init.normal_(expand.weight, std=rank**-0.5)  # the product keeps the standard deviation of 0.02
            self.token_embedding = nn.Sequential(self.token_embedding, expand)
        self.position_embedding = nn.Parameter(torch.empty(config.context_length, width))
        nn.init.normal_(self.position_embedding, std=0.01)
        self.dropout = nn.Dropout(config.dropout)
        rest = config.feed_forward, config.dropout
        self.blocks = nn.ModuleList(LSRABlock(width, config.heads, kernel, *rest) for kernel in config.kernels)
        self.norm = nn.LayerNorm(width)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> (B, T, d): token plus position, both over the whole width."""
        length, limit = tokens.shape[1], len(self.position_embedding)
        if length > limit:
            raise ValueError(f"captions of {length} tokens cannot work: this text encoder reads {limit}.")
        return self.token_embedding(tokens) + self.position_embedding[:length]

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T), right-padded -> features (B, d) at the end token, independent of the padding."""
        padding = padding_mask(tokens)
        last = (~padding).sum(1) - 1
        if not torch.compiler.is_compiling():  # a compiled graph has no length that depends on data
            length = int(last.max()) + 1  # columns that are padding in every row would be wasted work
            tokens, padding = tokens[:, :length], padding[:, :length]
        x = self.dropout(self.embed(tokens))
        for block in self.blocks:
            x = block(x, padding)
        return self.norm(x[torch.arange(x.shape[0], device=x.device), last])
