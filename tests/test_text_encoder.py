"""The text encoder against plain loops, torch's own layers and open_clip's tokenizer."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mclip.config import TextConfig
from mclip.text_encoder import (
    END_TOKEN,
    LightConv,
    LSRABlock,
    TextEncoder,
    Tokenizer,
    clean_caption,
    padding_mask,
    toeplitz,
)

SMALL = TextConfig(width=32, heads=4, kernels=(3, 15), feed_forward=32, context_length=77, embedding_rank=8)
CAPTIONS = ["a small red circle on a blue background", "a dog", "a cat !(a big one) asleep"]


def small_encoder(seed: int = 0) -> TextEncoder:
    torch.manual_seed(seed)
    return TextEncoder(SMALL).eval()


def pad(tokens: torch.Tensor, pads: int) -> torch.Tensor:
    return F.pad(tokens, (0, pads))


def convolution_by_hand(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """The definition, one output number at a time."""
    (batch, length, channels), (heads, taps) = x.shape, kernel.shape
    out = torch.zeros_like(x)
    for b in range(batch):
        for t in range(length):
            for c in range(channels):
                head = c * heads // channels
                for k in range(taps):
                    source = t + k - taps // 2
                    if 0 <= source < length:
                        out[b, t, c] += kernel[head, k] * x[b, source, c]
    return out


def as_conv1d(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """LightConv by PyTorch's depthwise convolution; C/H channels in a row share a row of ``kernel`` (H, K)."""
    weight = kernel.repeat_interleave(x.shape[2] // len(kernel), 0)[:, None]
    return F.conv1d(x.mT, weight, padding=kernel.shape[1] // 2, groups=x.shape[2]).mT


# --- captions and tokens


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A photo of a dog.", "a photo of a dog"),
        ("  two\tspaces \n and a line  ", "two spaces and a line"),
        ("\u201cQuoted,\u201d she said!!", "quoted,\u201d she said"),
        ("\uff26ull-width \ufb01sh", "full-width fish"),
        ("a bright day", "a bright day"),
        ("it's 5 o'clock", "it's 5 o'clock"),
        ("c++", "c++"),
        ("...", ""),
        ("", ""),
    ],
)
def test_clean_caption(raw, clean):
    assert clean_caption(raw) == clean


@given(st.text(max_size=40))
@example("\u0130\u0316")  # a dotted capital I with a mark below: its lower case is not NFKC
@settings(max_examples=300, deadline=None)
def test_cleaning_twice_changes_nothing(text):
    once = clean_caption(text)
    assert clean_caption(once) == once


def test_a_final_full_stop_changes_no_token():
    """Prompts that end in "." must read like training captions (training and evaluation share one rule)."""
    tokenizer = Tokenizer(32)
    assert torch.equal(tokenizer("A photo of a dog."), tokenizer("a photo of a dog"))
    raw = open_clip.tokenize(["A photo of a dog.", "a photo of a dog"])
    assert not torch.equal(raw[0], raw[1])


def test_tokens_equal_open_clips_on_clean_text():
    tokens, expected = Tokenizer(77)(CAPTIONS), open_clip.tokenize(CAPTIONS)
    assert torch.equal(tokens, expected[:, : tokens.shape[1]])
    assert (expected[:, tokens.shape[1] :] == 0).all()
    assert tokens.dtype == torch.int64


def test_tokens_are_cut_to_the_longest_caption_and_to_the_context():
    tokenizer = Tokenizer(8)
    assert tokenizer("a dog").shape == (1, 4)
    assert tokenizer(["a dog", "a red dog runs"]).shape == (2, 6)
    long = tokenizer("one two three four five six seven eight nine")
    assert long.shape == (1, 8)
    assert long[0, -1] == END_TOKEN
    assert tokenizer("").tolist() == [[49406, END_TOKEN]]
    with pytest.raises(ValueError, match="at least one"):
        tokenizer([])


def test_padding_begins_after_the_end_token_and_not_at_zero():
    """0 is CLIP's padding and also the token "!": a mask made from ``tokens == 0`` would hide real words."""
    tokens = pad(Tokenizer(32)("a cat !\u2014 a dog"), 3)
    assert (tokens[0, :-3] == 0).any()
    assert padding_mask(tokens).tolist() == [[False] * (tokens.shape[1] - 3) + [True] * 3]


def test_padding_with_end_tokens_is_padding_too():
    tokens = torch.tensor([[49406, 320, END_TOKEN, END_TOKEN, END_TOKEN]])
    assert padding_mask(tokens).tolist() == [[False, False, False, True, True]]


# --- LightConv


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 12),
    heads=st.integers(1, 3),
    each=st.integers(1, 3),
    half=st.integers(0, 7),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_light_conv_equals_the_definition_and_conv1d(batch, length, heads, each, half, seed):
    torch.manual_seed(seed)
    conv = LightConv(heads * each, heads, 2 * half + 1)
    x = torch.randn(batch, length, heads * each)
    with torch.no_grad():
        kernel = conv.weight.softmax(1)
        torch.testing.assert_close(conv(x), convolution_by_hand(x, kernel), rtol=0, atol=1e-5)
        torch.testing.assert_close(as_conv1d(x, kernel), conv(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [8, 129])
def test_both_forms_of_light_conv_agree_where_they_meet(length):
    torch.manual_seed(0)
    conv, x = LightConv(8, 2, 31), torch.randn(2, length, 8, requires_grad=True)
    kernel, grad = conv.weight.softmax(1), torch.randn(2, length, 8)
    blocks = x.unflatten(2, (2, 4))
    matrix_form = torch.einsum("hts,bshc->bthc", toeplitz(kernel, length), blocks).flatten(2)
    torch.testing.assert_close(conv(x), matrix_form, rtol=0, atol=1e-5)
    ours = torch.autograd.grad(conv(x), (x, conv.weight), grad)
    reference = torch.autograd.grad(as_conv1d(x, conv.weight.softmax(1)), (x, conv.weight), grad)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_toeplitz_matrix_by_hand():
    matrix = toeplitz(torch.tensor([[1.0, 2.0, 3.0]]), 4)
    assert matrix.tolist() == [[[2, 3, 0, 0], [1, 2, 3, 0], [0, 1, 2, 3], [0, 0, 1, 2]]]


def reach(conv) -> tuple[set[int], set[int]]:
    """Steps and channels of the output that change with one number of the input, at step 4 of channel 2."""
    x = torch.zeros(1, 9, 8)
    x[0, 4, 2] = 1
    steps, channels = (conv(x).detach()[0].abs() > 1e-7).nonzero().T.tolist()
    return set(steps), set(channels)


def test_defect_03_light_conv_mixes_time_and_not_channels():
    """(B, T, C) was reshaped to (-1, H, T) without a transpose: the kernel ran along channels."""
    torch.manual_seed(0)
    conv = LightConv(8, 2, 3)

    def defective(x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        weight = conv.weight.softmax(1)[:, None]
        return F.conv1d(x.reshape(-1, 2, length), weight, padding=1, groups=2).reshape(x.shape)

    def along_time(form) -> bool:
        return reach(form) == ({3, 4, 5}, {2})

    assert along_time(conv)
    assert along_time(lambda x: as_conv1d(x, conv.weight.softmax(1)))
    assert not along_time(defective)
    assert len(reach(defective)[1]) > 1


# --- attention, blocks and the whole encoder


def weight_on_pads(attend) -> float:
    """The share of attention that six pads after four words receive, averaged over the words."""
    padding = torch.arange(10)[None] >= 4
    weights = attend(torch.randn(1, 10, 16, generator=torch.Generator().manual_seed(0)), padding)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    return weights[..., :4, 4:].sum(-1).mean().item()


@pytest.mark.parametrize("inference", [False, True])
def test_defect_04_pads_get_no_attention(inference):
    """The mask was passed as a float (1 = keep) and added to the scores instead of hiding the pads."""
    torch.manual_seed(0)
    block = LSRABlock(32, 4, 3, 32, 0.0).eval()

    def ours(x, padding):
        return block.attend(x, padding, need_weights=True)[1]

    def defective(x, padding):
        added = (~padding).float()
        return block.attention(x, x, x, key_padding_mask=added, average_attn_weights=False)[1]

    with torch.inference_mode(inference):
        assert weight_on_pads(ours) == 0
        assert weight_on_pads(defective) > 0.25


def test_attention_equals_its_formula():
    torch.manual_seed(0)
    block = LSRABlock(16, 2, 3, 16, 0.0).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    projected = F.linear(x, block.attention.in_proj_weight, block.attention.in_proj_bias)
    query, key, value = projected.chunk(3, dim=2)
    out = torch.empty(2, 5, 8)
    for b in range(2):
        words = int((~padding[b]).sum())
        for h in range(2):
            part = slice(4 * h, 4 * h + 4)
            weights = (query[b, :, part] @ key[b, :words, part].T / 4**0.5).softmax(1)
            out[b, :, part] = weights @ value[b, :words, part]
    out = F.linear(out, block.attention.out_proj.weight, block.attention.out_proj.bias)
    torch.testing.assert_close(block.attend(x, padding)[0], out, rtol=1e-5, atol=1e-6)


def test_a_block_is_its_formula():
    torch.manual_seed(0)
    block = LSRABlock(16, 2, 3, 24, 0.0).eval()
    x, padding = torch.randn(2, 6, 16), torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    h = F.layer_norm(x, (16,))
    left = block.attend(h[..., :8], padding)[0]
    gate = block.gate(h[..., 8:])
    gated = gate[..., :8] * gate[..., 8:].sigmoid() * ~padding[..., None]
    right = block.mix(convolution_by_hand(gated, block.conv.weight.softmax(1)))
    y = x + torch.cat([left, right], 2)
    _, up, _, down = block.feed_forward
    expected = y + down(F.gelu(up(F.layer_norm(y, (16,)))))
    torch.testing.assert_close(block(x, padding), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inference", [False, True])
def test_output_is_the_same_with_0_and_with_60_pads(inference):
    """The encoder trims columns of pads; a long caption beside the short one is what makes it keep them."""
    encoder, tokenizer = small_encoder(), Tokenizer(77)
    long = tokenizer("word " * 72)
    with torch.inference_mode(inference):
        for caption in CAPTIONS:
            tokens = tokenizer(caption)
            alone = encoder(tokens)
            padded = pad(tokens, long.shape[1] - tokens.shape[1])
            assert padded.shape[1] - tokens.shape[1] >= 60
            torch.testing.assert_close(encoder(padded), alone, rtol=0, atol=1e-5)
            torch.testing.assert_close(encoder(torch.cat([padded, long]))[:1], alone, rtol=0, atol=1e-5)


def test_pads_do_not_matter_inside_a_block():
    torch.manual_seed(0)
    block = LSRABlock(32, 4, 15, 32, 0.0).eval()
    words, pads = torch.randn(1, 9, 32), 100 * torch.randn(1, 60, 32)
    padding = torch.arange(69)[None] >= 9
    with_pads = block(torch.cat([words, pads], 1), padding)[:, :9]
    torch.testing.assert_close(with_pads, block(words, padding[:, :9]), rtol=0, atol=1e-5)


def test_the_content_of_pads_does_not_matter():
    encoder, long = small_encoder(), Tokenizer(77)("word " * 30)
    tokens = Tokenizer(77)("a dog")
    tokens = pad(tokens, long.shape[1] - tokens.shape[1])
    other = torch.where(padding_mask(tokens), 1234, tokens)
    assert torch.equal(encoder(torch.cat([tokens, long])), encoder(torch.cat([other, long])))


def halves_that_feel_positions(block_input) -> list[bool]:
    """For each half of the channels: does block 1 see the same word differently at another position?"""
    tokens = torch.full((1, 6), 320)
    change = (block_input(tokens)[0, 0] - block_input(tokens)[0, 5]).abs()
    return [bool((half > 1e-6).all()) for half in change.chunk(2)]


def test_defect_11_positions_reach_both_halves_of_the_channels():
    """Positions were added in the attention half alone, so the convolution half of block 1 never saw them."""
    encoder = small_encoder()

    def defective(tokens: torch.Tensor) -> torch.Tensor:
        x = encoder.token_embedding(tokens)
        left, right = x.chunk(2, dim=2)
        return torch.cat([left + encoder.position_embedding[: tokens.shape[1], : left.shape[2]], right], 2)

    assert halves_that_feel_positions(encoder.embed) == [True, True]
    assert halves_that_feel_positions(defective) == [True, False]


def test_position_gradients_reach_the_whole_width():
    encoder = small_encoder()
    tokens = Tokenizer(77)(CAPTIONS)
    encoder(tokens).square().sum().backward()
    grad = encoder.position_embedding.grad
    assert (grad[: tokens.shape[1]] != 0).all()
    assert (grad[tokens.shape[1] :] == 0).all()


def test_pads_give_no_gradient_to_token_0():
    encoder = small_encoder()
    tokens = Tokenizer(77)(["a dog", "a very long caption about a dog and a cat"])
    assert (tokens[0] == 0).any()
    encoder(tokens)[:1].sum().backward()
    assert (encoder.token_embedding[0].weight.grad[0] == 0).all()


def test_word_order_changes_the_output():
    encoder, tokenizer = small_encoder(), Tokenizer(77)
    difference = encoder(tokenizer("a cat above a dog")) - encoder(tokenizer("a dog above a cat"))
    assert difference.abs().max() > 1e-3


def test_pooling_is_at_the_end_token():
    encoder, tokens = small_encoder(), Tokenizer(77)(CAPTIONS)
    x = encoder.embed(tokens)
    for block in encoder.blocks:
        x = block(x, padding_mask(tokens))
    ends = [ids.index(END_TOKEN) for ids in tokens.tolist()]
    expected = torch.stack([encoder.norm(x[row, end]) for row, end in enumerate(ends)])
    torch.testing.assert_close(encoder(tokens), expected)


def test_a_factorised_embedding_keeps_the_scale_of_a_full_one():
    torch.manual_seed(0)
    tokens = torch.randint(0, 49408, (8, 32))
    for rank in (None, 24, 128):
        config = TextConfig(width=128, heads=4, kernels=(3,), embedding_rank=rank)
        embedded = TextEncoder(config).token_embedding(tokens)
        assert float(embedded.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_every_parameter_learns():
    encoder = small_encoder().train()
    encoder(Tokenizer(77)(CAPTIONS)).pow(3).sum().backward()
    idle = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_a_caption_beyond_the_context_is_refused():
    encoder = small_encoder()
    with pytest.raises(ValueError, match="80 tokens"):
        encoder(torch.full((1, 80), 320))


def test_the_encoder_can_be_exported():
    encoder, tokens = small_encoder(), pad(Tokenizer(77)(CAPTIONS), 12)
    exported = torch.export.export(encoder, (tokens,)).module()
    torch.testing.assert_close(exported(tokens), encoder(tokens), rtol=0, atol=1e-5)
