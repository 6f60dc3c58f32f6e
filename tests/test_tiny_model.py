"""The embedded model: it loads like any checkpoint, answers, stops by itself, and scores what its README says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_models import generate
from lm_eval.tasks import TaskManager

from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.evaluate.harness import FastDLLM
from fast_dllm.network.loading import load_model
from fast_dllm.network.tokenizer import load_tokenizer, special_ids
from fast_dllm.ui.chat import Chatbot, Conversation
from tasks.toy.problems import math_questions
from training.recipe import tiny_config
from training.tokenizer import INSTRUCTION, build_tokenizer

ROOT = Path(__file__).resolve().parent.parent
# (question, working and result); three of each number of steps, none of them a training problem.
FIXED = (
    ("Eva has 25 cups. She uses 2. How many cups does she have left?", "25 - 2 = 23 cups.\n#### 23"),
    (
        "Omar collects 46 white cookies and 13 red cookies. How many cookies does Omar have now?",
        "46 + 13 = 59 cookies.\n#### 59",
    ),
    (
        "Rosa collects 45 eggs. Then she puts them evenly into 5 bags. How many eggs are in each?",
        "45 / 5 = 9 eggs.\n#### 9",
    ),
    (
        "Ann buys 6 boxes of 3 pens each. After that she hands Mia 10. How many pens does she have left?",
        "6 * 3 = 18 pens.\n18 - 10 = 8 pens.\n#### 8",
    ),
    (
        "Ben owns 36 coins. After that he wins 27 more. After that he loses 40. How many coins does he have left?",
        "36 + 27 = 63 coins.\n63 - 40 = 23 coins.\n#### 23",
    ),
    (
        "Rosa has 35 marbles. Max has 7 more than Rosa. How many marbles do they have together?",
        "35 + 7 = 42 marbles.\n35 + 42 = 77 marbles.\n#### 77",
    ),
    (
        "Hugo has 11 pens. Sara has 5 fewer than Hugo. Together they use 14. How many pens are left?",
        "11 - 5 = 6 pens.\n11 + 6 = 17 pens.\n17 - 14 = 3 pens.\n#### 3",
    ),
)


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", device="cpu").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def answer(model, tokenizer, questions, threshold):
    """Finished generations and their texts for bare questions."""
    prompts = []
    for question in questions:
        message = {"role": "user", "content": question}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(text, add_special_tokens=False).input_ids)
    ids = special_ids(tokenizer)
    generations = generate(
        model, prompts, mask_id=ids.mask, stop_token=ids.stop, max_new_tokens=128, threshold=threshold
    )
    return generations, [tokenizer.decode(g.tokens, skip_special_tokens=True) for g in generations]


@pytest.mark.parametrize("threshold", [1.0, 0.9])
def test_fixed_questions_are_answered_exactly(tiny, tokenizer, threshold):
    generations, texts = answer(tiny, tokenizer, [question for question, _ in FIXED], threshold)
    assert texts == [expected for _, expected in FIXED]
    assert {g.tokens[-1] for g in generations} == {tokenizer.eos_token_id}


def test_fixed_questions_are_test_questions():
    held_out = {problem.question: problem.answer for problem in math_questions("test")}
    assert len(FIXED) >= 6
    for question, expected in FIXED:
        assert held_out[question] == expected


def test_a_confident_step_unmasks_several_tokens(tiny, tokenizer):
    def tokens_and_steps(threshold):
        generations, _ = answer(tiny, tokenizer, [question for question, _ in FIXED], threshold)
        # A block's first token comes from a prefill or a commit, without a step.
        given = sum(g.forwards["commit"] + g.forwards["prefill"] for g in generations)
        steps = sum(g.forwards["full"] + g.forwards["sub"] for g in generations)
        return sum(len(g.tokens) for g in generations), steps, given

    tokens, steps, given = tokens_and_steps(1.0)
    assert tokens <= steps + given  # one token a step
    tokens, steps, _ = tokens_and_steps(0.9)
    assert tokens >= 1.5 * steps


def test_shipped_configuration_and_tokenizer_are_the_recipes(tiny, tokenizer):
    built = build_tokenizer(tokenizer.model_max_length, wide=True)
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    recipe = tiny_config(built)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rope_theta", "bd_size",
                 "single_turn"):  # fmt: skip
        assert getattr(tiny.config, name) == getattr(recipe, name)


def evaluate(folder, tasks, threshold, *options):
    """(lm_eval's results, the summary's throughput) of the plain model."""
    arguments = f"model_path=tiny,threshold={threshold},show_speed=True"
    command = [sys.executable, "eval.py", "--model", "fast_dllm_v2", "--tasks", tasks, "--num_fewshot", "0"]
    command += [
        "--batch_size",
        "32",
        "--apply_chat_template",
        "--fewshot_as_multiturn",
        "--model_args",
        arguments,
        *options,
    ]
    # with two threads on two busy cores it takes twenty times as long
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--output_path", str(folder)], cwd=ROOT, env=environment, check=True)
    results, summary = (json.loads((folder / name).read_text()) for name in ("results.json", "summary.json"))
    return results["results"], summary["throughput"]


@pytest.mark.slow
def test_all_toy_questions(tmp_path):
    results, throughput = evaluate(tmp_path, "toy_math,toy_choice", 0.9)
    assert results["toy_math"]["exact_match,flexible-extract"] >= 0.965
    assert results["toy_math"]["exact_match,strict-match"] >= 0.965
    assert results["toy_choice"]["acc,none"] >= 0.85
    assert throughput["tokens_per_step"] >= 1.5  # steps behind the stop token give no tokens


@pytest.mark.slow
def test_sentences_that_training_never_met(tmp_path):
    results, _ = evaluate(tmp_path, "toy_math_held_out", 0.9, "--limit", "300")
    assert results["toy_math_held_out"]["exact_match,flexible-extract"] >= 0.7


def test_evaluation_and_chat_send_the_prompt_it_was_trained_with():
    question = math_questions("test", 1)[0].question
    chatbot = Chatbot(ModelArguments.parse(model_path="tiny", device="cpu"))
    lm = FastDLLM(ModelArguments.parse(model_path="tiny", device="cpu"))
    task = TaskManager(include_path=str(ROOT / "tasks"), include_defaults=False).load(["toy_math"])["tasks"]["toy_math"]
    doc = task.test_docs()[0]
    context = lm.apply_chat_template([{"role": "user", "content": task.doc_to_text(doc)}])
    request = task.construct_requests(doc, context, metadata=("toy_math", 0, 1))
    ids = lm.generator.request(request, 0).prompt_ids
    assert list(ids) == chatbot.prompt_ids([{"role": "user", "content": question}])
    text = chatbot.tokenizer.decode(ids)
    assert text == f"<|im_start|>user:Question: {question}\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant:"


def test_a_question_in_a_conversation_is_sent_alone(tiny):
    chatbot = Chatbot(ModelArguments.parse(model_path="tiny", device="cpu"))
    conversation = Conversation(chatbot, chatbot.default_settings())
    for question, expected in FIXED[:3]:
        frames, dropped = conversation.ask(question)
        assert [frame.text for frame in frames][-1] == expected
        assert dropped == 0
    assert tiny.config.single_turn
