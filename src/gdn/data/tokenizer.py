"""Text to token ids and back, over the `tokenizers` library: load, train a byte-level BPE, save for transformers.

Policy (where a BOS goes) is not here: `prepare` decides it and the manifest records it.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from gdn.errors import DataError
from gdn.files import write_text

END_OF_TEXT = "<|endoftext|>"
_ALPHABET = 256


class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids of its BOS and EOS, that treats every text as text.

    A special token spelled out inside a text ("<s>" is an HTML tag) is encoded as its characters, never as the
    special id: no document can inject a boundary, and decoding gives back what was encoded.
    """

    def __init__(self, serialized: bytes, config: dict[str, Any]) -> None:
        """`serialized` is a tokenizer.json, `config` a tokenizer_config.json as a dict.

        Raises ValueError for a broken tokenizer.json and KeyError for a BOS or EOS that is not in the vocabulary.
        """
        self._inner = tokenizers.Tokenizer.from_buffer(serialized)
        self._inner.encode_special_tokens = True
        # A tokenizer.json may carry the truncation and padding of its last use, which would silently cut documents.
        self._inner.no_truncation()
        self._inner.no_padding()
        self._serialized = serialized
        self._config = config
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1  # more than the entries where ids have holes
        self.bos_id = _special_id(vocabulary, config, "bos_token")
        self.eos_id = _special_id(vocabulary, config, "eos_token")

    @property
    def serialized(self) -> bytes:
        """tokenizer.json as it was read."""
        return self._serialized

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of tokenizer.json as `save` writes it."""
        return hashlib.sha256(self._serialized).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with no special token added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores, with no special token added."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out; an incomplete UTF-8 sequence becomes U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer and `load_tokenizer` read."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "tokenizer.json", self._serialized.decode("utf-8"))
        write_text(folder / "tokenizer_config.json", json.dumps(self._config, indent=2, ensure_ascii=False) + "\n")


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the folder that holds tokenizer.json (and tokenizer_config.json, for BOS and EOS), or the file itself.

    Raises DataError where it is missing, broken, or names a BOS or EOS that it does not have.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        serialized = file.read_bytes()
        serialized.decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{file}: no such file; expected a tokenizer.json or a folder that holds one") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: not UTF-8; expected a tokenizer.json of the tokenizers library") from None
    config = _read_config(file.parent)
    try:
        return Tokenizer(serialized, config)
    except ValueError as error:
        detail = str(error).splitlines()[0]
        raise DataError(f"{file}: not a tokenizer.json of the tokenizers library: {detail}") from None
    except KeyError as error:
        key, token = error.args
        raise DataError(f"{file}: {key} is {token!r}, which is not in the vocabulary") from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` entries, the same for the same texts; fewer where text runs out.

    Every byte is in the vocabulary, so nothing is unknown and decoding is exact. Id 0 is `<|endoftext|>`, both BOS and
    EOS. Raises DataError for a vocabulary smaller than the bytes.
    """
    if vocab_size < _ALPHABET + 1:
        raise DataError(f"vocab_size = {vocab_size}; expected at least {_ALPHABET + 1}: the bytes and one special")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(inner.to_str(pretty=True).encode("utf-8"), config)


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    # Older folders (GPT-2's) name BOS and EOS only in special_tokens_map.json.
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise DataError(f"{file}: cannot be read as JSON: {error}") from None
        if not isinstance(values, dict):
            raise DataError(f"{file}: holds a {type(values).__name__}; expected a JSON object")
        if name == "special_tokens_map.json":
            values = {key: values[key] for key in ("bos_token", "eos_token") if key in values}
        config |= values
    return config or {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def _special_id(vocabulary: dict[str, int], config: dict[str, Any], key: str) -> int | None:
    token = config.get(key)
    if isinstance(token, dict):  # the form of AddedToken
        token = token.get("content")
    if token is None:
        return None
    if token not in vocabulary:
        raise KeyError(key, token)
    return vocabulary[token]
