from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_temporal import document_ids_of, target_positions

N = -100


def by_hand(labels: list[int], documents: list[int], origin: str, padding: int) -> list[int]:
    """t of each token of one row, token by token."""
    times, t, column, previous = [], 0, 0, None
    for index, (label, document) in enumerate(zip(labels, documents, strict=True)):
        if document != previous:
            t, column = 0, 0
        elif origin == "turn" and label != N and labels[index - 1] == N:
            t = 0
        previous = document
        column += index >= padding
        t += label != N
        times.append((column if origin == "sequence" else t) if label != N else 0)
    return times


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], list[int]]:
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    label = st.sampled_from([N, 3, 7])
    labels = draw(st.lists(st.lists(label, min_size=length, max_size=length), min_size=batch, max_size=batch))
    jumps = draw(
        st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=batch, max_size=batch)
    )
    documents = [[sum(row[: i + 1]) for i in range(length)] for row in jumps]
    padding = draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    return labels, documents, padding


@given(rows(), st.sampled_from(["target", "sequence", "turn"]), st.booleans(), st.booleans())
def test_positions_equal_counting_by_hand(
    drawn: tuple[list[list[int]], list[list[int]], list[int]], origin: str, packed: bool, padded: bool
) -> None:
    labels, documents, padding = drawn
    if not packed:
        documents = [[0] * len(row) for row in labels]
    if not padded or packed:
        padding = [0] * len(labels)
    labels = [
        [N if i < pad else label for i, label in enumerate(row)] for row, pad in zip(labels, padding, strict=True)
    ]
    length = len(labels[0])
    expected = [by_hand(row, ids, origin, pad) for row, ids, pad in zip(labels, documents, padding, strict=True)]
    got = target_positions(
        torch.tensor(labels),
        origin=origin,
        document_ids=torch.tensor(documents) if packed else None,
        attention_mask=torch.tensor([[int(i >= pad) for i in range(length)] for pad in padding]),
    )
    assert got.dtype == torch.long
    assert got.tolist() == expected


def test_origins_on_a_chat() -> None:
    labels = torch.tensor([[N, N, 5, 6, N, 7, 8, 9]])
    assert target_positions(labels).tolist() == [[0, 0, 1, 2, 0, 3, 4, 5]]
    assert target_positions(labels, origin="turn").tolist() == [[0, 0, 1, 2, 0, 1, 2, 3]]
    assert target_positions(labels, origin="sequence").tolist() == [[0, 0, 3, 4, 0, 6, 7, 8]]


def test_a_single_row_without_batch_dimension() -> None:
    assert target_positions(torch.tensor([N, 4, 5])).tolist() == [0, 1, 2]


def test_float_labels_count_where_they_are_numbers() -> None:
    labels = torch.tensor([[[1.0, 2.0], [float("nan"), 1.0], [0.0, 0.0]]])
    assert target_positions(labels).tolist() == [[1, 0, 2]]


def test_no_tokens() -> None:
    assert target_positions(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"origin": "start"}, "origin='start' is not known; accepted: 'target', 'sequence', 'turn'"),
        ({"document_ids": torch.zeros(1, 3)}, r"document_ids has shape \(1, 3\)"),
        ({"attention_mask": torch.zeros(2, 2)}, r"attention_mask has shape \(2, 2\)"),
    ],
)
def test_errors(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target_positions(torch.tensor([[1, 2]]), **kwargs)  # type: ignore[arg-type]


LABELS = torch.tensor([[1, 2, 3, 4, 5, 6]])


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"document_ids": torch.tensor([[7, 7, 3, 3, 3, 9]])}, [[0, 0, 1, 1, 1, 2]]),
        ({"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]], dtype=torch.int32)}, [[0, 0, 0, 1, 1, 1]]),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 6], dtype=torch.int32)}, [[0, 0, 1, 1, 1, 1]]),
        ({"position_ids": torch.tensor([[0, 1, 0, 1, 2, 0]])}, [[0, 0, 1, 1, 1, 2]]),
        ({"position_ids": torch.tensor([[0, 1, 2, 7, 8, 9]])}, [[0, 0, 0, 1, 1, 1]]),
        ({"position_ids": torch.tensor([[[0, 1, 2, 0, 1, 2]]] * 3)}, [[0, 0, 0, 1, 1, 1]]),
        ({}, None),
    ],
)
def test_documents_from_each_key(keys: dict[str, torch.Tensor], expected: list[list[int]] | None) -> None:
    documents = document_ids_of({"labels": LABELS, **keys})
    assert (documents if documents is None else documents.tolist()) == expected


def test_precedence_of_the_keys() -> None:
    batch = {
        "labels": LABELS,
        "document_ids": torch.tensor([[0, 1, 1, 1, 1, 1]]),
        "seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1]]),
        "cu_seq_lens_q": torch.tensor([0, 3, 6]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1]]),
    }
    for key, first_of_second in (("document_ids", 1), ("seq_idx", 2), ("cu_seq_lens_q", 3), ("position_ids", 4)):
        documents = document_ids_of(batch)
        assert documents is not None
        assert documents[0].tolist().index(1) == first_of_second
        del batch[key]


def test_padding_is_no_document_start() -> None:
    batch = {
        "labels": torch.tensor([[N, N, 4, 5]]),
        "position_ids": torch.tensor([[0, 0, 0, 1]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1]]),
    }
    documents = document_ids_of(batch)
    assert documents is not None
    assert documents.tolist() == [[0, 0, 0, 0]]


def test_a_four_dimensional_mask_needs_documents() -> None:
    mask = torch.zeros(1, 1, 6, 6)
    with pytest.raises(ValueError, match="4-D mask"):
        document_ids_of({"labels": LABELS, "attention_mask": mask})
    assert (
        document_ids_of({"labels": LABELS, "attention_mask": mask, "seq_idx": torch.zeros(1, 6, dtype=torch.int32)})
        is not None
    )


def test_ids_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"seq_idx has shape \(1, 4\); accepted: \(1, 6\)"):
        document_ids_of({"labels": LABELS, "seq_idx": torch.zeros(1, 4, dtype=torch.int32)})
