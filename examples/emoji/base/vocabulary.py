"""Tokenizers that are made from the captions, and the captions as token numbers."""

import json

import torch
from emoji_set import Emoji
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTokenizer, T5TokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

CLIP_TOKENS, T5_TOKENS = 77, 77
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def new_clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-level byte pair encoding, with merges learned from the captions."""
    learner = Tokenizer(models.BPE(unk_token="<|endoftext|>", continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True)
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    letters = list(bytes_to_unicode().values())
    options = {"initial_alphabet": letters, "end_of_word_suffix": "</w>", "show_progress": False}
    learner.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=2200, **options))
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in json.loads(learner.to_str())["model"]["merges"]
    ]
    pieces = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)])
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_TOKENS)


def new_t5_tokenizer(captions: list[str]) -> T5TokenizerFast:
    """A unigram vocabulary learned from the captions, with every printable ASCII character in it."""
    learner = Tokenizer(models.Unigram())
    learner.normalizer = normalizers.NFKC()
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    options = {"special_tokens": ["<pad>", "</s>", "<unk>"], "unk_token": "<unk>", "show_progress": False}
    learner.train_from_iterator(captions, trainers.UnigramTrainer(vocab_size=2000, **options))
    vocabulary = [tuple(entry) for entry in json.loads(learner.to_str())["model"]["vocab"]]
    known = {piece for piece, _ in vocabulary}
    vocabulary += [(chr(code), -14.0) for code in range(33, 127) if chr(code) not in known]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


class Captions:
    """Token numbers of all captions on the device, (N, 3 lengths, S) for CLIP and for T5, and the empty caption's."""

    def __init__(self, emojis: list[Emoji], clip: CLIPTokenizer, t5: T5TokenizerFast, device: torch.device):
        texts = [caption for emoji in emojis for caption in emoji.captions()]

        def numbers(tokenizer: CLIPTokenizer | T5TokenizerFast, length: int, of: list[str]) -> Tensor:
            encoded = tokenizer(of, padding="max_length", max_length=length, truncation=True)
            return torch.tensor(encoded["input_ids"], device=device)

        self.clip = numbers(clip, CLIP_TOKENS, texts).view(len(emojis), 3, CLIP_TOKENS)
        self.t5 = numbers(t5, T5_TOKENS, texts).view(len(emojis), 3, T5_TOKENS)
        self.no_clip, self.no_t5 = numbers(clip, CLIP_TOKENS, [""]), numbers(t5, T5_TOKENS, [""])
