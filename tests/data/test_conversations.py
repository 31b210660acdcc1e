"""Random conversations × templates × tokenizers: each answer is learned as inference will ask for it, or refused."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hf_temporal.data.language_modeling import LanguageModelingArguments, encode_for_causal_lm
from hf_temporal.positions import IGNORE_INDEX
from tests.data.chat_templates import FAMILIES as OWN
from tests.data.chat_templates import Family
from tests.data.conversations import (
    NOTHING,
    CannotBeLearnedError,
    Conversation,
    Expected,
    answers_of,
    conversations,
    expected,
    may_be_refused,
    plain_conversations,
    rendered,
    squashed,
    variants,
)
from tests.data.tokenizers_of_all_kinds import EXACT, KINDS, tokenizer_of
from tests.data.trl_chat_templates import FAMILIES as TRL

FAMILIES = [pytest.param(family, id=family.name) for family in OWN + TRL]
OWN_EXAMPLES, TRL_EXAMPLES, PLAIN_EXAMPLES, KINDS_EACH = 50, 18, 2, 3
WHOLE = 100_000  # tokens: nothing is cut
OUTCOMES: Counter[str] = Counter()

quiet = settings(
    max_examples=OWN_EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def tokenizer_for(family: Family, kind: str) -> PreTrainedTokenizerFast:
    return tokenizer_of(kind, family.template, family.tokens, family.bos, family.eos)


def encode(
    rows: list[Conversation], tokenizer: PreTrainedTokenizerFast, size: int = WHOLE, **arguments: Any
) -> list[dict[str, Any]]:
    columns = sorted({column for row in rows for column in row})
    batch = {column: [row.get(column) for row in rows] for column in columns}
    encoded = encode_for_causal_lm(batch, tokenizer, LanguageModelingArguments(block_size=size, **arguments))
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def runs(row: dict[str, Any]) -> list[tuple[int, int]]:
    """Start and stop of each contiguous run of targets."""
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])
    assert set(row["attention_mask"]) <= {1}
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    learned = [False, *(label != IGNORE_INDEX for label in row["labels"]), False]
    edges = [place for place in range(len(learned) - 1) if learned[place] != learned[place + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def reason_against(family: Family, tokenizer: PreTrainedTokenizerFast, row: Conversation, index: int) -> str | None:
    """Why message `index` may be refused."""
    try:
        want = expected(family, tokenizer, row, index)
    except CannotBeLearnedError as error:
        return str(error)
    return want.spanning or may_be_refused(family, tokenizer, row, index)


def reasons_against(family: Family, tokenizer: PreTrainedTokenizerFast, row: Conversation, train_on: str) -> list[str]:
    """Why the conversation may be refused."""
    reasons = [reason_against(family, tokenizer, row, index) for index in answers_of(row, train_on)]
    try:
        rendered(tokenizer, row)
    except Exception:  # noqa: BLE001 - a template may raise anything
        reasons.append("the template raises on the whole conversation")
    return [reason for reason in reasons if reason]


def found_answers(
    rows: list[dict[str, Any]], family: Family, tokenizer: PreTrainedTokenizerFast, row: Conversation, train_on: str
) -> list[tuple[Expected, dict[str, Any], int, int]]:
    """Each answer with its row, start and stop; where one follows another without a token between, they are parted.

    Each stands behind the very tokens of its prompt, and is found once, in whatever order.
    """
    wanted = [i for i in answers_of(row, train_on) if reason_against(family, tokenizer, row, i) != NOTHING]
    answers = [expected(family, tokenizer, row, index) for index in wanted]
    found = []
    for each in rows:
        for start, stop in runs(each):
            inner = {len(a.prompt) for a in answers if each["input_ids"][: len(a.prompt)] == a.prompt}
            edges = [start, *sorted(edge for edge in inner if start < edge < stop), stop]
            found += [(each, *edges_of_one) for edges_of_one in pairwise(edges)]
    placed = []
    for place, start, stop in found:
        before = place["input_ids"][:start]
        answer = next((each for each in answers if each.prompt == before), None)
        assert answer is not None, f"no answer is asked for by {tokenizer.decode(before)!r}"
        answers.remove(answer)
        placed.append((answer, place, start, stop))
    missing = [answer.index for answer in answers if answer.answer.strip()]
    assert not missing, f"messages {missing} are not learned"
    return placed


def check_rows(
    rows: list[dict[str, Any]], family: Family, kind: str, conversation: Conversation, train_on: str = "all"
) -> None:
    """Each run of targets is an answer, in order, behind the tokens with which the model is asked for it."""
    tokenizer = tokenizer_for(family, kind)
    for want, row, start, stop in found_answers(rows, family, tokenizer, conversation, train_on):
        index = want.index
        ids = row["input_ids"]
        if not family.ends and tokenizer.convert_ids_to_tokens(ids[stop - 1]) in ("<|user|>", "<|observation|>"):
            stop -= 1  # where the template ends no turn, the next one's first token ends it
        before = tokenizer.decode(ids[:start])
        written = str(tokenizer.decode(ids[:stop]))
        if not want.spanning:
            assert ids[:stop] == want.tokens[:stop], f"message {index} is not tokenized as the template writes it"
        if kind in EXACT:
            answer = written[len(before) :]
            if (
                kind == "bytes-no-chat-tokens" and answer != want.answer
            ):  # EOS is the one end that is a token; one that spans the end is learned
                answer = answer.removesuffix(family.eos if family.eos not in family.ends else "").removesuffix("\n")
            assert answer == want.answer, f"message {index}"
        else:
            alone = tokenizer(want.answer, add_special_tokens=False).input_ids
            assert squashed(tokenizer, ids[start:stop]) == squashed(tokenizer, alone), f"message {index}"
        end = [each for each in family.ends if want.answer.endswith(each)]
        if end and kind != "bytes-no-chat-tokens":
            assert ids[stop - 1] == tokenizer.convert_tokens_to_ids(end[0]), f"message {index} ends elsewhere"


def outcome(family: Family, kind: str, row: Conversation, train_on: str = "all") -> str:
    """ "learned", or the reason for which the conversation was refused; anything that is neither is an error."""
    tokenizer = tokenizer_for(family, kind)
    forms = [{**row, "messages": messages} for messages in variants(family, row["messages"])]
    reasons = reasons_against(family, tokenizer, forms[0], train_on)
    if family.content == "parts" and any(isinstance(message["content"], str) for message in row["messages"]):
        reasons.append("the template takes parts alone")
    if row.get("tools") and "tools" not in family.template:
        reasons.append("the template reads no tools")
    try:
        rows = encode([row], tokenizer, train_on=train_on)
    except ValueError as error:
        refusal = str(error)
    else:
        failures = [why for form in forms for why in [why_not(rows, family, kind, form, train_on)]]
        if all(failures):
            raise AssertionError(f"{family.name} with {kind}: {row}") from failures[0]
        return "learned"
    assert reasons, f"{family.name} with {kind} refused {row} without a reason: {refusal}"
    assert re.search(r"row 0\b", refusal), f"the refusal names no row: {refusal}"
    named = re.search(r"message (\d+)", refusal)
    assert named or refusal.startswith("tools"), f"the refusal names no message: {refusal}"
    assert named is None or int(named[1]) < len(row["messages"]), refusal
    assert "messages" in refusal, refusal
    assert "accepted" in refusal.lower(), refusal
    return reasons[0]


def why_not(
    rows: list[dict[str, Any]], family: Family, kind: str, form: Conversation, train_on: str
) -> Exception | None:
    try:
        check_rows(rows, family, kind, form, train_on)
    except (AssertionError, CannotBeLearnedError) as error:
        return error
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_learned_as_inference_asks_for_it(family: Family) -> None:
    examples = OWN_EXAMPLES if family in OWN else TRL_EXAMPLES

    @settings(quiet, max_examples=examples)
    @given(
        conversations(),
        st.lists(st.sampled_from(KINDS), min_size=KINDS_EACH, max_size=KINDS_EACH, unique=True),
        st.sampled_from(["all", "all", "last"]),
        st.sampled_from([None, None, {"enable_thinking": False}, {"enable_thinking": True}]),
    )
    def run(row: Conversation, kinds: list[str], train_on: str, options: dict[str, Any] | None) -> None:
        if family in TRL and "enable_thinking" in family.template:
            row = {**row, "chat_template_kwargs": options}
        for kind in kinds:
            OUTCOMES[outcome(family, kind, row, train_on)] += 1

    run()


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_conversations_are_never_refused(family: Family) -> None:
    @settings(quiet, max_examples=PLAIN_EXAMPLES)
    @given(plain_conversations())
    def run(row: Conversation) -> None:
        row = {"messages": variants(family, row["messages"])[0]}
        for kind in KINDS:
            result = outcome(family, kind, row)
            OUTCOMES[result] += 1
            if not family.refuses_plain:
                assert result == "learned" or result.startswith("a token spans"), f"{family.name}, {kind}: {result}"

    run()


def test_enough_was_tried() -> None:
    assert len(OWN) >= 12
    cases = KINDS_EACH * (OWN_EXAMPLES * len(OWN) + TRL_EXAMPLES * len(TRL)) + PLAIN_EXAMPLES * len(KINDS) * len(
        OWN + TRL
    )
    assert not TRL or cases >= 5000
    if OUTCOMES.total() >= cases:
        assert OUTCOMES["learned"] >= 0.4 * OUTCOMES.total(), OUTCOMES


@given(conversations(weighted=True), st.sampled_from(OWN), st.sampled_from(KINDS))
@settings(quiet, max_examples=150)
def test_a_messages_weight_is_that_of_its_targets(row: Conversation, family: Family, kind: str) -> None:
    if outcome(family, kind, row) != "learned":
        return
    tokenizer = tokenizer_for(family, kind)
    row = {**row, "messages": variants(family, row["messages"])[0]}
    for want, each, start, stop in found_answers(encode([row], tokenizer), family, tokenizer, row, "all"):
        weight = row["messages"][want.index].get("weight")
        weights = each.get("loss_weights", [1.0] * len(each["labels"]))
        assert weights[start:stop] == [1.0 if weight is None else weight] * (stop - start)


@given(
    conversations(),
    st.sampled_from(OWN),
    st.sampled_from(KINDS),
    st.integers(2, 60),
    st.sampled_from(["left", "right", "right"]),
)
@settings(quiet, max_examples=150)
def test_of_a_row_that_is_cut_whole_beginnings_are_learned(
    row: Conversation, family: Family, kind: str, size: int, side: str
) -> None:
    tokenizer = tokenizer_for(family, kind)
    if outcome(family, kind, row) != "learned":
        return
    whole = encode([row], tokenizer)
    tokenizer.truncation_side = side
    cut = encode([row], tokenizer, size=size)
    tokenizer.truncation_side = "right"
    for before, after in zip(whole, cut, strict=True):
        over = max(0, len(before["labels"]) - size)
        first, last = (over, None) if side == "left" else (0, size)
        begun = {place for start, stop in runs(before) for place in range(start, stop) if start >= first}
        labels = [label if place in begun else IGNORE_INDEX for place, label in enumerate(before["labels"])]
        assert after["input_ids"] == before["input_ids"][first:last]
        assert after["labels"] == labels[first:last]


@given(st.lists(conversations(), min_size=2, max_size=3), st.sampled_from(OWN), st.sampled_from(KINDS))
@settings(quiet, max_examples=100)
def test_rows_of_a_batch_do_not_mix(rows: list[Conversation], family: Family, kind: str) -> None:
    tokenizer = tokenizer_for(family, kind)
    refused = [place for place, row in enumerate(rows) if outcome(family, kind, row) != "learned"]
    if refused:
        with pytest.raises(ValueError, match=rf"row ({'|'.join(map(str, refused))})\b"):
            encode(rows, tokenizer)
        return
    singly = [each for row in rows for each in encode([row], tokenizer)]
    together = encode(rows, tokenizer)
    columns = ("input_ids", "labels", "attention_mask")
    assert [[each[column] for column in columns] for each in together] == [
        [each[column] for column in columns] for each in singly
    ]
