"""What is read and what is learned: the prompt is a prefix, the answer ends its turn, only the text is cut."""

from __future__ import annotations

import pytest

from rankworks.core.errors import DataError
from rankworks.train.batching.data import Encoder, join_documents
from rankworks.train.losses.loss import IGNORE
from rankworks.train.prepare import Prepared
from rankworks.train.sources.task import Task
from rankworks.train.sources.template import Template
from tiny import EOS, byte_tokenizer, tiny_bert_classifier, tiny_llama

CLASSES = ["sport", "business"]


def task(kind: str = "classification", records: list | None = None, max_length: int = 120, **more) -> Task:
    template = Template("Classify as {classes}.\nText: {text}\nClass:", tuple(CLASSES))
    values = {"classes": CLASSES if kind == "classification" else None, "template": template, **more}
    return Task(kind, records or [{"text": "a goal", "label": "sport"}], [], "t", max_length=max_length, **values)


def learned(example, tokenizer) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORE])


def test_only_the_answer_and_its_end_are_learned_and_the_prompt_is_a_prefix():
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer, 200)
    turns = [{"role": "user", "content": "2 + 2?"}]
    example = encoder.completion(turns, "4", "x")
    prompt = encoder.prompt(turns)
    assert list(example.input_ids[: len(prompt)]) == prompt
    assert example.labels[: len(prompt)] == (IGNORE,) * len(prompt)
    assert learned(example, tokenizer) == "4</s>"
    assert example.input_ids[-1] == EOS  # the newline the template puts behind it is gone


def test_without_a_chat_template_prompt_and_answer_are_joined():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    encoder = Encoder(tokenizer, 200)
    example = encoder.completion([{"role": "user", "content": "Class:"}], "sport", "x")
    assert tokenizer.decode(example.input_ids) == "<s>Class: sport</s>"
    assert learned(example, tokenizer) == " sport</s>"


def test_a_tokenizer_that_merges_across_the_border_still_keeps_the_prompt():
    class Merging:
        eos_token_id, all_special_ids, chat_template, bos_token, eos_token = 9, [9], None, "", "#"

        def __call__(self, text, add_special_tokens=True, verbose=True):
            table = {"ab": [7], "a": [1], "b": [2], "#": [9], " b#": [2, 9], "a b#": [8, 9]}
            return {"input_ids": table[text]}

    prompt, answer = Encoder(Merging(), 10).answer([{"role": "user", "content": "a"}], "b")
    assert prompt == [1]
    assert answer == [2, 9]


def test_every_turn_of_the_assistant_is_learned():
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer, 300)
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "ONE"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "TWO"},
    ]
    example = encoder.conversation(turns, "x")
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(example.input_ids) == whole.rstrip("\n")
    assert learned(example, tokenizer) == "ONE</s>TWO</s>"
    with pytest.raises(DataError, match="no turn of the assistant"):
        encoder.conversation(turns[:2], "x")


@pytest.mark.parametrize(
    ("chat", "end", "answers"),
    [
        (None, "\nClass: business</s>", [" sport</s>", " business</s>"]),  # plain words unless asked otherwise
        (True, "\nClass:</s>\n<|assistant|>\nbusiness</s>", ["sport</s>", "business</s>"]),
    ],
)
def test_the_text_is_cut_and_never_the_instruction_or_the_label(chat, end, answers):
    tokenizer = byte_tokenizer()
    long = {"text": "word " * 400, "label": "business"}
    prepared = Prepared(task(max_length=120, chat=chat), tiny_llama(), tokenizer, progress=False)
    example = prepared.examples([long], "train")[0]
    text = tokenizer.decode(example.input_ids)
    assert 110 <= len(example.input_ids) <= 120
    assert "Classify as sport, business.\nText: word word" in text
    assert text.endswith(end)
    question = prepared.question(long, "test record 1")
    assert len(question.prompt) + max(len(a) for a in question.answers) <= 120
    assert [tokenizer.decode(a) for a in question.answers] == answers


def test_a_short_text_is_kept_whole():
    tokenizer = byte_tokenizer()
    prepared = Prepared(task(), tiny_llama(), tokenizer, progress=False)
    example = prepared.examples([{"text": " a goal ", "label": "sport"}], "train")[0]
    assert "Text:  a goal \nClass:" in tokenizer.decode(example.input_ids)


def test_what_cannot_fit_is_named():
    tokenizer, model = byte_tokenizer(), tiny_llama()
    with pytest.raises(DataError, match=r"train record 1: the instruction and the label alone have"):
        Prepared(task(max_length=40), model, tokenizer, False).examples([{"text": "x", "label": "sport"}], "train")
    records = [{"prompt": "p", "completion": "c"}, {"prompt": "p" * 500, "completion": "c"}]
    with pytest.raises(DataError, match=r"train record 2 has \d+ tokens, more than the 120.*data\.max_length"):
        Prepared(task("completion", records), model, tokenizer, False).examples(records, "train")
    with pytest.raises(DataError, match=r"test record 2.*more than the model's context of 512"):
        Prepared(task("completion", records, 4000), model, tokenizer, False).prompt(records[1], "test record 2", 64)


def test_a_label_outside_the_classes_and_empty_data_are_named():
    prepared = Prepared(task(), tiny_llama(), byte_tokenizer(), False)
    with pytest.raises(DataError, match=r"train record 1 has the label 'sports'.*Did you mean 'sport'"):
        prepared.examples([{"text": "x", "label": "sports"}], "train")
    with pytest.raises(DataError, match="train data are empty"):
        prepared.examples([], "train")


def test_a_classifier_learns_the_class():
    prepared = Prepared(task(), tiny_bert_classifier(num_labels=2), byte_tokenizer(), False)
    example = prepared.examples([{"text": "z" * 300, "label": "business"}], "train")[0]
    assert example.label == 1
    assert len(example.input_ids) == 120
    with pytest.raises(DataError, match="the model has 3 classes, the data 2: sport, business"):
        Prepared(task(), tiny_bert_classifier(num_labels=3), byte_tokenizer(), False)
    with pytest.raises(DataError, match="head of classes, but the data are text"):
        Prepared(task("text", [{"text": "a"}]), tiny_bert_classifier(), byte_tokenizer(), False)


def test_documents_fill_rows_without_padding():
    rows = join_documents([[5, 6, 7], [8] * 6, [9]], eos=2, width=4)
    assert [row.input_ids for row in rows] == [(5, 6, 7, 2), (8, 8, 8, 8), (8, 8, 2, 9)]
    assert [row.segments for row in rows] == [(4,), (4,), (3, 1)]
    assert sum(row.learned for row in rows) == 3 + 3 + 2
    assert join_documents([[5]], eos=2, width=4)[0].input_ids == (5, 2)


def test_a_tokenizer_without_an_end_encodes_what_needs_none_and_tells_the_rest():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    encoder = Encoder(tokenizer, 64, chat=False)
    assert tokenizer.decode(encoder.tokens("as BERT's")) == "as BERT's"
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encoder.answer([{"role": "user", "content": "a question"}], "an answer")
