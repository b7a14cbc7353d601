"""Real small tokenizers in Hugging Face's layout, trained on a few lines."""

import json
import pathlib

LINES = (
    "what is the capital of france ? paris",
    "how many apples does she have in all ? 3 + 4 = 7 #### 7",
    "a good film , a bad film , a long story of a very small village",
)
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def encoder(folder: pathlib.Path, **config) -> pathlib.Path:
    """A BERT-like WordPiece tokenizer beside a `config.json` with 32 positions."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    own = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    own.normalizer, own.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    own.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    cls, sep = (own.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    own.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names |= {"tokenizer_class": "BertTokenizer"}
    return _save(own, folder, names, {"model_type": "bert", "max_position_embeddings": 32, **config})


def decoder(folder: pathlib.Path, *, chat: bool = False, **config) -> pathlib.Path:
    """A byte-level BPE tokenizer beside a `config.json` with 128 positions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<eos>", "<pad>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    names |= {"additional_special_tokens": special[2:]} | ({"chat_template": CHAT} if chat else {})
    return _save(own, folder, names, {"model_type": "llama", "max_position_embeddings": 128, **config})


def _save(own, folder: pathlib.Path, names: dict, config: dict) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    own.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
