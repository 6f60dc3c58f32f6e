"""The three lines of a notebook, as the README shows them."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from golden_models import ROOT

from fast_dllm import experiments, load_model
from fast_dllm.errors import UsageError

WORDS = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}


def test_the_readmes_lines_run_and_answer():
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lazy = "import sys, fast_dllm; assert 'torch' not in sys.modules\n"  # nothing is imported before it is used
    done = subprocess.run([sys.executable, "-c", lazy + lines], **WORDS)
    assert done.returncode == 0, done.stderr
    assert "12 + 7 = 19" in done.stdout
    assert "'reused': 1" in done.stdout


def test_texts_and_token_ids_get_the_same_answer_and_a_network_alone_needs_the_special_ids():
    model, policy = load_model("tiny", device="cpu"), experiments.load("00_baseline")
    question = "Ann has 3 pens. She buys 4 more. How many pens does she have now?"
    ids = model.encode_message(question)
    by_text, by_ids = policy.generate(model, [question, ids], max_new_tokens=64)
    special = {"mask_id": model.ids.mask, "stop_token": model.ids.stop}
    assert by_text == by_ids == policy.generate(model.network, [ids], max_new_tokens=64, **special)[0]
    with pytest.raises(UsageError, match="needs mask_id"):
        policy.generate(model.network, [ids])
    with pytest.raises(UsageError, match="a text needs a model with its tokenizer"):
        policy.generate(model.network, [question], **special)
    with pytest.raises(UsageError, match="takes no 'treshold'; it takes: max_new_tokens"):
        policy.generate(model, [question], treshold=1)
