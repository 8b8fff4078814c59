"""From records to tokens: which tokens are read and which are learned.

A completion is learned and its prompt is not. The prompt's tokens are a prefix of the example's tokens, always: the two
are tokenised together where that keeps them apart, and separately where the tokenizer would merge across the border.
The completion ends with the end-of-turn token, so the model learns to stop. What does not fit in `max_length` is cut
from the text of a classification record, never from its instruction or its label; elsewhere it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rankworks.core.errors import DataError
from rankworks.train.batching.batches import Example
from rankworks.train.losses.loss import IGNORE

Message = dict[str, str]

QUIET = {"verbose": False}
"""A text longer than the model's context is cut here; the tokenizer need not warn of it."""


class Encoder:
    """Turns text into tokens with one tokenizer.

    max_length: the longest example; chat: use the tokenizer's chat template (by default where it has one).
    """

    def __init__(self, tokenizer: Any, max_length: int, chat: bool | None = None):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
        self._specials = {tokenizer.eos_token_id, *tokenizer.all_special_ids}

    @property
    def eos(self) -> int:
        """The token that ends a text. Raises where one is needed and there is none (BERT has none, and needs none)."""
        return self._needed(self.tokenizer.eos_token_id)

    @property
    def end_text(self) -> str:
        """The text of `eos`."""
        return self._needed(self.tokenizer.eos_token)

    @staticmethod
    def _needed(end: Any) -> Any:
        if end is None:
            raise DataError("the tokenizer has no end-of-sequence token: set tokenizer.eos_token.")
        return end

    # ---- text to tokens -------------------------------------------------------------------------------------------

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text as it stands: no special tokens added."""
        return self.tokenizer(text, add_special_tokens=False, **QUIET)["input_ids"]

    def render(self, messages: Sequence[Message], answer_next: bool = False) -> str:
        """Return the text of a conversation; answer_next: end where the assistant's next turn begins."""
        if self.chat:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_next)
        text = ""
        for message in messages:
            if message["role"] == "assistant":
                gap = "" if not text or text[-1].isspace() else " "
                text += gap + message["content"] + self.end_text
            else:
                text += ("\n" if text else "") + message["content"]
        return (self.tokenizer.bos_token or "") + text

    def split(self, prompt: str, rest: str) -> tuple[list[int], list[int]]:
        """Return the tokens of prompt and rest; what generation sees as the prompt is exactly the first part."""
        first, both = self.tokens(prompt), self.tokens(prompt + rest)
        if both[: len(first)] == first:
            return first, both[len(first) :]
        return first, self.tokens(rest)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens up to where the answer begins."""
        return self.tokens(self.render(messages, answer_next=True))

    def answer(self, messages: Sequence[Message], answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of (prompt, answer with its end of turn)."""
        opened = self.render(messages, answer_next=True)
        closed = self.render([*messages, {"role": "assistant", "content": answer}])
        rest = closed[len(opened) :] if closed.startswith(opened) else answer
        prompt, tokens = self.split(opened, rest)
        return prompt, self.ended(tokens)

    def ended(self, tokens: list[int]) -> list[int]:
        """Return an answer's tokens up to and with its end of turn; what a template puts behind it is not learned."""
        special = [i for i, token in enumerate(tokens) if token in self._specials]
        return tokens[: special[-1] + 1] if special else [*tokens, self.eos]

    # ---- records to examples --------------------------------------------------------------------------------------

    def conversation(self, messages: Sequence[Message], where: str) -> Example:
        """Return an example in which every turn of the assistant is learned."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError(f"{where} has no turn of the assistant, so nothing in it can be learned.")
        ids: list[int] = []
        labels: list[int] = []
        seen = ""
        for i in turns:
            opened = self.render(messages[:i], answer_next=True)
            if not opened.startswith(seen):  # a template that rewrites earlier turns: learn the last answer only
                ids, labels, seen = [], [], ""
            prompt, answer = self.answer(messages[:i], messages[i]["content"])
            before = self.tokens(opened[len(seen) :]) if seen else prompt
            closed = self.render(messages[: i + 1])
            tail = self._behind(opened, closed, answer)
            ids += before + answer + tail
            labels += [IGNORE] * len(before) + answer + [IGNORE] * len(tail)
            seen = closed
        end = max(i for i, label in enumerate(labels) if label != IGNORE) + 1  # what stands behind teaches nothing
        return self._fitting(ids[:end], labels[:end], where)

    def _behind(self, opened: str, closed: str, answer: list[int]) -> list[int]:
        """Return the tokens a template puts behind the end of a turn (often a newline)."""
        if not closed.startswith(opened):
            return []
        _, rest = self.split(opened, closed[len(opened) :])
        return rest[len(answer) :] if rest[: len(answer)] == answer else []

    def completion(self, messages: Sequence[Message], answer: str, where: str) -> Example:
        """Return an example in which the answer is learned."""
        prompt, tokens = self.answer(messages, answer)
        return self._fitting(prompt + tokens, [IGNORE] * len(prompt) + tokens, where)

    def _fitting(self, ids: list[int], labels: list[int], where: str) -> Example:
        if len(ids) > self.max_length:
            raise DataError(
                f"{where} has {len(ids)} tokens, more than the {self.max_length} that fit: raise data.max_length (up "
                "to the model's context), or shorten or leave out the record."
            )
        return Example(tuple(ids), tuple(labels))

    def shortened(self, build: Callable[[str], list[int]], fixed: int, text: str, room: int, where: str) -> str:
        """Return the longest head of `text` for which `build(head)` has at most `room` tokens.

        fixed: the tokens of `build("")`. Raises `DataError` when not even these fit.
        """
        if fixed > room:
            raise DataError(
                f"{where}: the instruction and the label alone have {fixed} tokens, more than the {room} that fit: "
                "raise data.max_length or shorten the instruction."
            )
        start = text[: 8 * room]  # far more characters than fit
        ends = self._token_ends(start)
        if start == text and fixed + len(ends) <= room and len(build(text)) <= room:
            return text
        keep = min(len(ends), room - fixed)
        while keep > 0:
            head = text[: ends[keep - 1]].rstrip()
            excess = len(build(head)) - room
            if excess <= 0:
                return head
            keep -= excess
        return ""

    def _token_ends(self, text: str) -> list[int]:
        """Return where each token of a text ends, in characters."""
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, **QUIET)
            return [end for _, end in encoded["offset_mapping"]]
        return [i for i, c in enumerate(text) if c.isspace()] + [len(text)]


def join_documents(documents: Sequence[Sequence[int]], eos: int, width: int) -> list[Example]:
    """Return rows of `width` tokens filled with documents, each ended by `eos`, in order and without padding.

    A document that reaches the end of a row goes on in the next as a document of its own. The last row may be shorter.
    """
    rows: list[Example] = []
    ids: list[int] = []
    segments: list[int] = []
    for document in documents:
        rest = [*document, eos]
        while rest:
            piece, rest = rest[: width - len(ids)], rest[width - len(ids) :]
            ids += piece
            segments.append(len(piece))
            if len(ids) == width:
                rows.append(Example(tuple(ids), tuple(ids), segments=tuple(segments)))
                ids, segments = [], []
    if len(ids) > 1:
        rows.append(Example(tuple(ids), tuple(ids), segments=tuple(segments)))
    return rows
