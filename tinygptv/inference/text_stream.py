"""From token ids to text as it grows: never half a character, never a part of a stop string.

Built for byte-level BPE (GPT-2, CodeGen, Phi-2 and the miniature's tokenizer): every token is a fixed string of bytes.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


class TokenBytes:
    """The bytes of every token of a tokenizer; special tokens have none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the whole vocabulary once.

        Raises:
            ValueError: the tokenizer is not a byte-level one.
        """
        to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
        special, added = set(tokenizer.all_special_ids), tokenizer.get_added_vocab()
        self.special_ids = special
        self.table: list[bytes] = [b""] * (max(tokenizer.get_vocab().values()) + 1)
        for token, index in tokenizer.get_vocab().items():
            if index in special:
                continue
            if token in added:
                self.table[index] = token.encode()
                continue
            try:
                self.table[index] = bytes(to_byte[character] for character in token)
            except KeyError as error:
                raise ValueError(
                    f"token {token!r} of the tokenizer is not written in bytes: TinyGPT-V uses byte-level BPE "
                    "tokenizers (GPT-2, CodeGen, Phi-2)."
                ) from error

    def __getitem__(self, token_id: int) -> bytes:
        """Bytes of a token; none for ids beyond the vocabulary (padded embedding rows) and special tokens."""
        return self.table[token_id] if 0 <= token_id < len(self.table) else b""


class TextStream:
    """Text of one answer: push tokens, take what may be shown.

    White space at both ends of the answer is left out, as ``TinyGPTVProcessor.decode_answer`` does; where the text
    continues another, only at its end.

    Attributes:
        text: everything that was given out so far.
        stopped: a stop string was found; further tokens are ignored.
        num_characters: characters of all tokens so far, before anything is left out.
        num_kept: so many of them certainly stand before a stop string.
    """

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str] = (), continues: bool = False) -> None:
        self.token_bytes = token_bytes
        self.stop = tuple(stop)
        self.continues = continues
        self.text = ""
        self.stopped = False
        self.num_characters = 0
        self.num_kept = 0
        self._held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that it sets free."""
        return "" if self.stopped else self._release(self._decoder.decode(self.token_bytes[token_id]))

    def finish(self) -> str:
        """The answer is over: returns what was held back (a broken character becomes U+FFFD)."""
        if self.stopped:
            return ""
        free = self._release(self._decoder.decode(b"", final=True))
        if self.stopped:
            return free
        rest = (self._held if self.text or self.continues else self._held.lstrip()).rstrip()
        self._held = ""
        self.text += rest
        return free + rest

    def _release(self, piece: str) -> str:
        held = self._held + piece
        num_released = self.num_characters - len(self._held)
        self.num_characters += len(piece)
        found = [at for at in (held.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped = True
            num_sure = min(found)
            free, self._held = held[:num_sure].rstrip(), ""
        else:
            num_sure = len(held) - _held_back(held, self.stop)
            end = len(held[:num_sure].rstrip())
            free, self._held = held[:end], held[end:]
        self.num_kept = num_released + num_sure
        if not self.text and not self.continues:
            free = free.lstrip()
        self.text += free
        return free


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that may be the beginning of a stop string."""
    longest = 0
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest
