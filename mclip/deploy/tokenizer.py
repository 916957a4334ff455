"""CLIP's tokenizer and our cleaning of captions as one file of the ``tokenizers`` library, for apps without PyTorch.

The library exists for Rust, Python, JavaScript, Swift and others.
"""

from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

SPACE = r"\s\x1c-\x1f"  # what Python's str.isspace calls space
WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""CLIP's words (Radford et al. 2021), without its two special tokens: no caption can forge an end."""
START, END = ("<start_of_text>", 49406), ("<end_of_text>", 49407)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token: id of CLIP's 49,408 tokens, and its merges of byte pairs in order."""
    whole = SimpleTokenizer()
    return whole.encoder, list(whole.bpe_ranks)


def portable_tokenizer(context_length: int) -> Tokenizer:
    """The same ids as :class:`~mclip.text_encoder.Tokenizer`, by the ``tokenizers`` library alone.

    CLIP's own takes "<end_of_text>" in a caption for its end, and what follows is lost; here it is text as any other.
    Left out, because the library has no step for it, is what ftfy and ``html.unescape`` repair in captions from the
    web: text decoded with the wrong code page, ``&amp;`` and its like, control characters. A letter that Unicode has
    only had for a few years may be unknown to the library's tables.
    """
    ids, merges = vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>"))
    replace = [
        (rf"\A[{SPACE}\p{{P}}]+|[{SPACE}\p{{P}}]+\z", ""),
        ("[\u02bc\u2018-\u201b]", "'"),  # curly quotes, which ftfy makes straight
        ("[\u201c-\u201f]", '"'),
        (rf"[{SPACE}]+", " "),
    ]
    final_sigma = normalizers.Replace(Regex(r"(?<=\p{L})Σ(?!\p{L})"), "ς")  # the one letter whose case has context
    steps = [normalizers.NFKC(), final_sigma, normalizers.Lowercase(), normalizers.NFKC()]
    steps += [normalizers.Replace(Regex(pattern), text) for pattern, text in replace]
    tokenizer.normalizer = normalizers.Sequence(steps)
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    single = f"{START[0]} $A {END[0]}"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[START, END])
    tokenizer.enable_truncation(context_length)  # counts start and end, which are put round what is left
    tokenizer.enable_padding(pad_id=0, pad_token="!")
    return tokenizer
