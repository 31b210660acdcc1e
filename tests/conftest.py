"""No test reaches the network, and none takes more than one thread: the suite runs one process per core."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import older_transformers

torch.set_num_threads(1)
older_transformers.teach()
# A busy machine fails no test: neither deadline nor the check that drawing is slow.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("hf_temporal", UNTIMED, derandomize=True)
settings.register_profile("many", UNTIMED, derandomize=False, max_examples=2000)
settings.load_profile("hf_temporal")  # --hypothesis-profile overrides it


@pytest.fixture(scope="module")
def sixteen_bits_are_native() -> Iterator[None]:
    """Else the head would round on some processors and multiply in float32 on others."""
    native = {"avx512_bf16": True, "avx512_fp16": True}
    with mock.patch.object(torch.cpu, "get_capabilities", create=True, return_value=native):
        yield


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged, by transformers too, whose loggers do not hand on to the root."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
