"""Every stage refuses bad input at its real command line, with its exit code and a message that says where and what.

    python -m pytest tests/test_bad_input.py

A case is a stage, what is changed about its valid input or flags, the exit code, and words that the message must have:
the file or the flag, the place, the field, what was found.
"""

import gzip
import json
import os
import tempfile
from pathlib import Path

import pytest
from helpers.damage import half_the_weights, narrower, one_tensor, only_bin, remove, replace
from helpers.examples import CHAT, DATA, PAIR, PROMPT, SAMPLES, SCORES, TEXTS, but, content, message, sample
from helpers.stages import STAGES, check_refused, context_fixture, places_fixture, stage_fixture  # noqa: F401

from utils import fingerprint

# ---------------------------------------------------------------------------------------------- the table


def row(name, case, expected, *records, code=1, files=None, prepare=None, leaves=(), argv=(), marks=(), **flags):
    """The input is the stage's valid record unless `records` are given; `files` are further ones; `prepare` is
    called with the folder and the places; `argv` are further words of the command line; `leaves` names what is left
    behind in the folder: of a run that began."""
    values = name, expected, records, code, files or {}, prepare, set(leaves), argv, flags
    return pytest.param(*values, id=f"{name}-{case}", marks=marks)


COPY = {"model": "{tmp}/model"}
COPIES = {"model": "{tmp}/model", "reference": "{tmp}/model"}
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
NO_CONTENT = [{"role": "user"}, {"role": "assistant"}]
NULL = [message("assistant", None)]
DUPLICATE = fingerprint(json.dumps(list(TEXTS.values())))  # the key that is made of a pair's text
BASELINE = {"baseline.jsonl": [SAMPLES]}

# fmt: off
ROWS = [
    # ---- files of prompts
    row("sampling", "empty-file", "input file {tmp}/in.jsonl | is empty", b""),
    row("sampling", "blank-lines", "in.jsonl | no records", b"\n\r\n\n"),
    row("sampling", "directory", "{tmp} | is not a file", input="{tmp}"),
    row("sampling", "device", "/dev/null | is not a file", input="/dev/null"),
    row("sampling", "no-file", "{tmp}/no | does not exist", input="{tmp}/no"),
    row("sampling", "gzip", "in.jsonl | gzip", gzip.compress(content([PROMPT]))),
    row("sampling", "utf-16", "in.jsonl | UTF-16", content([PROMPT]).decode().encode("utf-16")),
    row("sampling", "not-json", "in.jsonl | line 2 | not valid JSON", PROMPT, b"nonsense\n"),
    row("sampling", "truncated", "in.jsonl | line 2 | not valid JSON | cut off", PROMPT, b'{"prompt": "x"'),
    row("sampling", "list", "in.jsonl | line 1 | JSON object | []", b"[]\n"),
    row("sampling", "nan", "in.jsonl | line 1 | not valid JSON", b'{"prompt": "x", "n": NaN}\n'),
    row("sampling", "infinite", "in.jsonl | line 1 | not valid JSON", b'{"prompt": "x", "n": 1e999}\n'),
    row("sampling", "surrogate", "in.jsonl | line 1 | UTF-8", b'{"prompt": "\\ud800"}\n'),
    row("sampling", "not-utf8", "in.jsonl | line 1 | UTF-8 | 0xff", b'{"prompt": "\xff"}\n'),
    row("sampling", "missing-field", "in.jsonl | line 2 | prompt | is missing | found prompt_id",
        PROMPT, but(PROMPT, prompt=...)),
    row("sampling", "wrong-type", "in.jsonl | line 1 | prompt | should be str | ['x']", but(PROMPT, prompt=["x"])),
    row("sampling", "empty-prompt", "in.jsonl | line 2 | prompt should be text", PROMPT, but(PROMPT, prompt=" \n")),
    row("sampling", "id-type", "in.jsonl | line 1 | prompt_id should be | True", but(PROMPT, prompt_id=True)),
    row("sampling", "duplicate-id", "in.jsonl | line 2 | prompt_id a | a second time", PROMPT, PROMPT),
    row("sampling", "duplicate-number", "in.jsonl | line 2 | prompt_id 1 | a second time",
        but(PROMPT, prompt_id=1), but(PROMPT, prompt_id="1")),
    row("generate", "not-json", "in.jsonl | line 1 | not valid JSON", b"x\n"),
    row("generate", "duplicate-text", f"in.jsonl | line 2 | {fingerprint('where?')} | a second time",
        {"prompt": "where?"}, {"prompt": "where?"}),
    row("make_prompts", "not-json", "in.jsonl | not readable | row 1", PROMPT, b"nonsense\n"),
    row("make_prompts", "not-utf8", "in.jsonl | not readable | 0xff", b'{"prompt": "\xff"}\n'),
    row("make_prompts", "surrogate", "in.jsonl | not readable | surrogate | row 0", b'{"prompt": "\\ud800"}\n', PROMPT),
    row("make_prompts", "wrong-type", "in.jsonl | column 'prompt' | should be text | int",
        but(PROMPT, prompt=1), but(PROMPT, prompt=2)),
    row("make_prompts", "no-column", "in.jsonl | no column 'question' | prompt_id, prompt", field="question"),
    row("make_prompts", "too-few", "1 different prompts | --num_test | 1 test prompts", PROMPT, but(PROMPT)),
    row("make_prompts", "negative-test", "--num_test | at least 0 | -1", PROMPT, but(PROMPT, prompt="x"), num_test=-1),
    row("make_prompts", "no-excluded-file", "{tmp}/no | does not exist", exclude="{tmp}/no"),
    # ---- samples and scores
    row("scoring", "prompts", "in.jsonl | line 1 | prompt_token_ids | is missing | sampling.py | prompt", PROMPT),
    row("scoring", "one-sample", "in.jsonl | prompt_id a | samples has 1 | needed: 2 | --num_samples 2",
        SAMPLES | {"samples": [sample("sea")]}),
    row("scoring", "no-samples", "in.jsonl | prompt_id a | samples has 0 | needed: 2 | --num_samples 2",
        SAMPLES | {"samples": []}),
    row("scoring", "unequal-k", "in.jsonl | prompt_id b | samples has 3 | have 2",
        SAMPLES, but(SAMPLES, samples=[sample("x")] * 3)),
    row("scoring", "sample-type", "in.jsonl | prompt_id a | samples[0] | 'sea'", SAMPLES | {"samples": ["sea", "x"]}),
    row("scoring", "token-type", "in.jsonl | prompt_id a | samples[0].token_ids | 'sea'",
        SAMPLES | {"samples": [sample("x") | {"token_ids": ["sea"]}] * 2}),
    row("scoring", "duplicate-id", "in.jsonl | line 2 | prompt_id a | a second time", SAMPLES, SAMPLES),
    row("scoring", "id-type", "in.jsonl | line 1 | prompt_id should be str | 1", SAMPLES | {"prompt_id": 1}),
    row("scoring", "gzip", "in.jsonl | gzip", gzip.compress(content([SAMPLES]))),
    row("make_pairs", "samples", "in.jsonl | line 1 | prompt_id a | win_probs | is missing | scoring.py", SAMPLES),
    row("make_pairs", "shape", "in.jsonl | line 1 | prompt_id a | win_probs | 2 x 2 | another shape",
        SCORES | {"win_probs": [[None, 0.5]]}),
    row("make_pairs", "above-1", "in.jsonl | line 1 | prompt_id a | win_probs[1][0] | 1.5",
        SCORES | {"win_probs": [[None, 0.5], [1.5, None]]}),
    row("make_pairs", "not-a-number", "in.jsonl | line 1 | prompt_id a | win_probs[1][0] | True",
        SCORES | {"win_probs": [[None, 0], [True, None]]}),
    row("make_pairs", "sum", "in.jsonl | line 1 | prompt_id a | win_probs[1][0] and [0][1] | 0.5 and 0.75",
        SCORES | {"win_probs": [[None, 0.75], [0.5, None]]}),
    row("make_pairs", "diagonal", "in.jsonl | line 1 | prompt_id a | win_probs[0][0] | null | 0.5",
        SCORES | {"win_probs": [[0.5, 0.75], [0.25, 0.5]]}),
    row("make_pairs", "truncated", "in.jsonl | line 2 | not valid JSON | cut off", SCORES, b'{"prom'),
    row("make_pairs", "no-pair", "in.jsonl | no usable pair | 2 records | 'without a pair': 2",
        *(record | {"samples": [sample("sea")] * 2} for record in (SCORES, but(SCORES)))),
    row("make_pairs", "too-long", "in.jsonl | no usable pair | 'without a pair': 1", max_length=3),
    # ---- pairs
    row("get_logprobs", "scores", "in.jsonl | line 1 | prompt_id a | prompt | list | 'where?'",
        SCORES | {"chosen": [], "rejected": []}),
    row("get_logprobs", "missing-field", "in.jsonl | line 1 | rejected | is missing | make_pairs | prompt, chosen",
        {name: TEXTS[name] for name in ("prompt", "chosen")}),
    row("get_logprobs", "some-ids", "in.jsonl | line 1 | prompt_id b | has prompt_token_ids, rejected_token_ids",
        but(PAIR, chosen_token_ids=...)),
    row("get_logprobs", "empty-answer", "in.jsonl | line 2 | chosen | []", TEXTS, TEXTS | {"chosen": []}),
    row("get_logprobs", "not-messages", "in.jsonl | line 2 | prompt[0] | 3", TEXTS, TEXTS | {"prompt": [3]}),
    row("get_logprobs", "ids-and-no-text", "in.jsonl | line 2 | prompt_id b | chosen | []", PAIR, but(PAIR, chosen=[])),
    row("get_logprobs", "ids-and-number", "in.jsonl | line 2 | prompt_id b | chosen[0] | 3",
        PAIR, but(PAIR, chosen=[3])),
    row("get_logprobs", "ids-and-null", "in.jsonl | line 2 | prompt_id b | chosen[0].content | None",
        PAIR, but(PAIR, chosen=NULL)),
    row("get_logprobs", "duplicate-id", "in.jsonl | line 2 | prompt_id a | a second time", PAIR, PAIR),
    row("get_logprobs", "duplicate-number", "in.jsonl | line 2 | prompt_id 3 | a second time",
        TEXTS | {"prompt_id": 3}, TEXTS | {"prompt_id": "3"}),
    row("get_logprobs", "duplicate-text", f"in.jsonl | line 2 | prompt_id {DUPLICATE} | a second time", TEXTS, TEXTS),
    row("get_logprobs", "other-text", "in.jsonl | prompt_id a | text | 'sea' for 'hut' | --tokenizer",
        PAIR | {"chosen": [message("assistant", "hut")]}),
    row("get_logprobs", "vocabulary", "in.jsonl | prompt_id a | token 664 | vocabulary of 664",
        PAIR | {"chosen_token_ids": [664]}),
    row("get_logprobs", "negative-token", "in.jsonl | line 1 | prompt_id a | chosen_token_ids[0] | -1",
        PAIR | {"chosen_token_ids": [-1]}),
    row("get_logprobs", "no-tokens", "in.jsonl | prompt_id a | rejected_token_ids | not be empty",
        PAIR | {"rejected_token_ids": []}),
    row("get_logprobs", "long", "in.jsonl | prompt_id a | 6 prompt | 4 response | --max_length 9 | make_pairs",
        max_length=9),
    row("get_logprobs", "win-prob", "in.jsonl | line 1 | prompt_id a | win_prob | 1.5", PAIR | {"win_prob": 1.5}),
    row("get_logprobs", "micro-batch", "--micro_batch_tokens | at least 0 | -1", micro_batch_tokens=-1),
    # ---- training data
    row("inpo", "pairs", "in.jsonl | line 1 | prompt_id a | last_chosen_logp is missing | get_logprobs.py", PAIR),
    row("inpo", "positive-logp", "in.jsonl | line 2 | prompt_id b | ref_rejected_logp | 0.5",
        DATA, but(DATA, ref_rejected_logp=0.5)),
    row("inpo", "nan-logp", "in.jsonl | line 1 | not valid JSON", DATA | {"last_chosen_logp": float("nan")}),
    row("inpo", "huge-logp", "in.jsonl | line 1 | prompt_id a | last_chosen_logp | -1" + "0" * 98,
        DATA | {"last_chosen_logp": -(10**400)}),
    row("inpo", "not-messages", "in.jsonl | line 1 | prompt_id a | chosen | list | 3", DATA | {"chosen": 3}),
    row("inpo", "not-json", "in.jsonl | line 2 | not valid JSON", DATA, b"x\n"),
    row("inpo", "duplicate-id", "in.jsonl | line 2 | prompt_id a | a second time", DATA, DATA),
    row("inpo", "empty-validation", "test.jsonl | is empty", files={"test.jsonl": []}, validation="{tmp}/test.jsonl"),
    row("inpo", "no-input", "input file . | is not a file", input=""),
    row("inpo", "another-models-data", "{data} | {reference} | {off} nats | over {tokens} tokens | get_logprobs.py",
        model="{reference}", input="{data}", leaves=["ckpt"]),
    row("ipo", "vocabulary", "in.jsonl | prompt_id a | token 664 | vocabulary of 664",
        DATA | {"prompt_token_ids": [664]}),
    row("ipo", "gzip", "in.jsonl | gzip", gzip.compress(content([DATA]))),
    row("dpo", "logp-type", "in.jsonl | line 1 | prompt_id a | ref_chosen_logp | '0'", DATA | {"ref_chosen_logp": "0"}),
    row("dpo", "chats", "in.jsonl | line 1 | prompt_id a | prompt_token_ids is missing | sampling.py | messages", CHAT),
    row("mle", "pairs", "in.jsonl | line 1 | messages | is missing | make_sft | prompt, chosen, rejected", TEXTS),
    row("mle", "no-messages", "in.jsonl | line 2 | prompt_id b | messages | []", CHAT, but(CHAT, messages=[])),
    row("mle", "not-messages", "in.jsonl | line 2 | prompt_id b | messages[0] | 3", CHAT, but(CHAT, messages=[3, 4])),
    row("mle", "no-content", "in.jsonl | line 2 | prompt_id b | messages[0] | content is missing | role",
        CHAT, but(CHAT, messages=NO_CONTENT)),
    row("mle", "negative-weight", "in.jsonl | line 1 | prompt_id a | weight | -1", CHAT | {"weight": -1}),
    row("mle", "weight-type", "in.jsonl | line 1 | prompt_id a | weight | True", CHAT | {"weight": True}),
    row("mle", "huge-weight", "in.jsonl | line 1 | prompt_id a | weight | 1" + "0" * 99, CHAT | {"weight": 10**400}),
    row("mle", "long", "in.jsonl | prompt_id a | 15 prompt | 3 response | --max_length 17 | make_sft", max_length=17),
    row("make_sft", "not-messages", "in.jsonl | row 2 | messages | 'x'", CHAT, but(CHAT, messages="x")),
    row("make_sft", "no-content", f"in.jsonl | row 1 | messages | {NO_CONTENT}", but(CHAT, messages=NO_CONTENT)),
    row("make_sft", "no-column", "in.jsonl | no column 'messages' | prompt_id, prompt", PROMPT),
    row("make_sft", "too-few", "1 usable examples | 1 of validation | --num_validation"),
    row("make_sft", "no-validation", "--num_validation | at least 1 | 0", num_validation=0),
    row("make_sft", "negative-limit", "--limit | at least 0 | -1", CHAT, CHAT, CHAT, limit=-1),
    row("make_sft", "output-directory", "--output {tmp} | is a directory", CHAT, CHAT, output="{tmp}"),
    row("make_sft", "no-output", "--output should name a file", CHAT, CHAT, output=""),
    # ---- responses
    row("compare", "other-prompts", "baseline.jsonl | no response | 1 prompts | first a",
        files={"baseline.jsonl": [but(SAMPLES)]}),
    row("compare", "fewer-prompts", "in.jsonl | no response | 1 prompts | first b",
        files={"baseline.jsonl": [SAMPLES, but(SAMPLES)]}),
    row("compare", "other-text", "in.jsonl | baseline.jsonl | different prompts | prompt_id a",
        files={"baseline.jsonl": [SAMPLES | {"prompt": "when?"}]}),
    row("compare", "no-response", "baseline.jsonl | prompt_id a | samples",
        files={"baseline.jsonl": [SAMPLES | {"samples": []}]}),
    row("compare", "prompts", "baseline.jsonl | line 1 | samples | is missing | sampling.py | prompt_id, prompt",
        files={"baseline.jsonl": [PROMPT]}),
    row("compare", "summary", "{tmp}/x.json | summary | .jsonl", files=BASELINE, output="{tmp}/x.json"),
    row("compare", "slots", "in.jsonl | {input} | {output_1} | {output_2}", files=BASELINE, template="{tmp}/in.jsonl"),
    row("compare", "no-template", "template {tmp}/no | does not exist", files=BASELINE, template="{tmp}/no"),
    row("compare", "template-not-utf8", "template {tmp}/t.txt | UTF-8",
        files=BASELINE | {"t.txt": [b"{input} {output_1} {output_2} \xff"]}, template="{tmp}/t.txt"),
    # ---- models
    row("sampling", "no-model", "model nowhere | no such directory", model="nowhere"),
    row("sampling", "not-a-model", "model {tmp} | no config.json", model="{tmp}"),
    row("sampling", "no-weights", "{tmp}/model | no weights", prepare=remove(FILE), **COPY),
    row("sampling", "config", "model/config.json | damaged | object", prepare=replace("config.json", b"{"), **COPY),
    row("scoring", "half-a-file", f"model/{FILE} | damaged", prepare=half_the_weights, judge="{tmp}/model"),
    row("get_logprobs", "no-weights", "{tmp}/model | no weights", prepare=remove(FILE), reference="{tmp}/model"),
    row("get_logprobs", "half-a-file", f"model/{FILE} | damaged", prepare=half_the_weights, **COPIES),
    row("get_logprobs", "header", f"model/{FILE} | damaged | header", prepare=replace(FILE, b"junk"), **COPIES),
    row("get_logprobs", "index", f"model/{INDEX} | damaged", prepare=replace(INDEX, b"{"), **COPIES),
    row("get_logprobs", "missing-shard", "{tmp}/model | lacks 2.safetensors | model.safetensors.index.json",
        prepare=replace(INDEX, b'{"weight_map": {"w": "2.safetensors"}}'), **COPIES),
    row("get_logprobs", "config", "model/config.json | damaged | object",
        prepare=replace("config.json", b"[]"), **COPIES),
    row("get_logprobs", "shapes", "{tmp}/model | does not load | shapes",
        prepare=narrower, leaves=["out.jsonl.last.partial"], **COPIES),
    row("inpo", "another-models-weights", "{tmp}/model | does not load | lack weights | lm_head.weight",
        prepare=one_tensor, **COPY),
    row("inpo", "bin", "{tmp}/model | does not load | buffer", prepare=only_bin, **COPY),
    row("inpo", "no-weights", "{tmp}/model | no weights", prepare=remove(FILE), **COPY),
    row("mle", "half-a-file", f"model/{FILE} | damaged", prepare=half_the_weights, **COPY),
    # ---- tokenizers
    row("get_logprobs", "tokenizer", "{judge} | tokenizer of {policy} | '<|end_of_text|>' there", tokenizer="{judge}"),
    row("get_logprobs", "reference", "{policy} | tokenizer of {judge} | '<|endoftext|>' there", reference="{judge}"),
    row("dpo", "tokenizer", "{judge} | tokenizer of {policy} | '<|end_of_text|>' there", tokenizer="{judge}"),
    row("sampling", "tokenizer", "worker 0 | {judge} | tokenizer of {policy} | '<|end_of_text|>' there",
        tokenizer="{judge}", leaves=["out.jsonl.partial"], marks=pytest.mark.slow),
    row("mle", "no-tokenizer", "no tokenizer in {tmp}/model | --tokenizer", prepare=remove("tokenizer.json"), **COPY),
    row("mle", "damaged-tokenizer", "no tokenizer in {tmp}/model | line 1 | --tokenizer",
        prepare=replace("tokenizer.json", b"{"), **COPY),
    row("mle", "no-chat-template", "{tmp}/model | no chat template", prepare=remove("chat_template.jinja"), **COPY),
    row("mle", "chat-template", "chat template of {tmp}/model | does not work | 'end of statement block'",
        prepare=replace("chat_template.jinja", b"{% for %}"), **COPY),
    # ---- flags
    row("sampling", "unknown-flag", "--modle | did you mean --model?", code=2, argv=["--modle", "x"]),
    row("scoring", "unknown-flag", "--nothing | see scoring.py --help", code=2, argv=["--nothing", "x"]),
    row("make_pairs", "word", "unknown argument x | data_processing.py make_pairs --help", code=2, argv=["x"]),
    row("inpo", "missing-flag", "missing --output | see inpo.py --help", code=2, output=...),
    row("ipo", "no-value", "argument --seed | expected one", code=2, argv=["--seed"]),
    row("sampling", "text-for-int", "argument --seed | int | 'x'", code=2, seed="x"),
    row("mle", "fraction-for-int", "argument --num_epochs | int | '1.5'", code=2, num_epochs="1.5"),
    row("inpo", "text-for-float", "argument --eta | number | '1/3'", code=2, eta="1/3"),
    row("inpo", "text-for-bool", "argument --soft_labels | true or false | 'maybe'", code=2, soft_labels="maybe"),
    row("inpo", "infinite-eta", "argument --eta | finite | 'inf'", code=2, eta="inf"),
    row("inpo", "eta-0", "--eta | greater than 0 | 0.0", eta=0),
    row("ipo", "eta-negative", "--eta | greater than 0 | -1.0", eta=-1),
    row("dpo", "beta-0", "--beta | greater than 0 | 0.0", beta=0),
    row("inpo", "ratio", "--tau_eta_ratio | between 0 and 1 | 2.0", tau_eta_ratio=2),
    row("mle", "learning-rate", "--learning_rate | greater than 0 | 0.0", learning_rate=0),
    row("mle", "weight-decay", "--weight_decay | at least 0 | -1.0", weight_decay=-1),
    row("mle", "max-grad-norm", "--max_grad_norm | at least 0 | -1.0", max_grad_norm=-1),
    row("inpo", "tolerance", "--start_tolerance | at least 0 | -1.0", start_tolerance=-1),
    row("mle", "seed", "--seed | between 0 and 4294967295 | -1", seed=-1),
    row("mle", "select", "--select | best or last | worst", select="worst"),
    row("inpo", "output", "{tmp} | exists | --output", output="{tmp}"),
    row("make_pairs", "rule", "--pair_rule | top_two, best_worst, random | worst", pair_rule="worst"),
    row("make_pairs", "two-inputs", "--input has 2 | --output has 1", input="{tmp}/in.jsonl,{tmp}/in.jsonl"),
    row("make_pairs", "output-is-input", "--output {tmp}/in.jsonl | also an input", output="{tmp}/in.jsonl"),
    row("sampling", "k-0", "--num_samples | at least 1 | 0", num_samples=0),
    row("sampling", "k-text", "--num_samples takes numbers (int) | 'many'", num_samples="many"),
    row("sampling", "k-too-large", "--num_samples | at most 4096 | 4097", num_samples=4097),
    row("sampling", "temperature", "--temperature | at least 0 | -1", temperature=-1),
    row("sampling", "nan-temperature", "--temperature | numbers | 'nan'", temperature="nan"),
    row("generate", "temperature", "--temperature | at least 0 | -1.0", temperature=-1),
    row("generate", "top-p", "--top_p | greater than 0 | 0.0", top_p=0),
    row("sampling", "top-p", "--top_p | at most 1 | 1.1", top_p=1.1),
    row("sampling", "no-new-tokens", "--max_new_tokens | at least 1 | 0", max_new_tokens=0),
    row("sampling", "no-prompt-tokens", "--max_prompt_tokens | at least 1 | 0", max_prompt_tokens=0),
    row("scoring", "no-prompt-tokens", "--max_prompt_tokens | at least 1 | 0", max_prompt_tokens=0),
    row("scoring", "dtype", "--dtype | float32 | int8", dtype="int8"),
    row("scoring", "memory", "--gpu_memory_utilization | greater than 0 | 0.0", gpu_memory_utilization=0),
    row("sampling", "engine-args", "--engine_args | JSON object | not valid JSON | line 1", engine_args="{"),
    row("scoring", "engine-args-list", "--engine_args | JSON object | got [1]", engine_args="[1]"),
    row("generate", "engine-args-nan", "--engine_args | not valid JSON | NaN", engine_args='{"seed": NaN}'),
    row("compare", "engine-args-name", "--engine_args | no argument max_num_seq | did you mean max_num_seqs?",
        files=BASELINE, engine_args='{"max_num_seq": 8}'),
    row("scoring", "engine-args-flag", "--engine_args | dtype is set by --dtype", engine_args='{"dtype": "float16"}'),
    row("scoring", "labels", "--labels | two different | 'a'", labels="a"),
    row("sampling", "gpus", "--gpus | 97 | CUDA_VISIBLE_DEVICES", gpus="97"),
    row("scoring", "gpus", "--gpus | 0,1 | CUDA_VISIBLE_DEVICES", gpus="0,1"),
    row("generate", "no-workers", "--cpu_workers 0 | at least 1", cpu_workers=0),
    row("generate", "no-output", "--output should name a file", input="", output=""),
]
# fmt: on


@pytest.mark.parametrize("name, expected, records, code, files, prepare, leaves, argv, flags", ROWS)
def test_refused(stage, places, name, expected, records, code, files, prepare, leaves, argv, flags):
    for file, lines in ({"in.jsonl": records or [STAGES[name][2]]} | files).items():
        (stage.folder / file).write_bytes(content(lines))
    if prepare:
        prepare(stage.folder, places)
    before = stage.files()
    done = stage.run(name, argv=argv, **flags)
    check_refused(stage, done, name, code, expected)
    left = stage.files() - before
    assert {path.partition("/")[0] for path in left} == leaves and not left & {"ckpt/model", "ckpt/DONE"}
    if not leaves:  # neither a worker nor training was started
        assert " on CPU" not in done.stderr and "global batch" not in done.stderr


# ---------------------------------------------------------------------------------------------- what no row can say


@pytest.fixture
def public(stage):
    """The stage with a folder that every user can reach, and a user who may not do everything."""
    with tempfile.TemporaryDirectory(prefix="comal-") as folder:
        stage.folder = Path(folder)
        stage.folder.chmod(0o755)
        stage.uid = 65534 if os.getuid() == 0 else 0
        (stage.folder / "in.jsonl").write_bytes(content([SCORES]))
        yield stage
        stage.folder.chmod(0o755)


@pytest.mark.parametrize(
    "locked, mode, expected",
    [("in.jsonl", 0, "Permission denied | {tmp}/in.jsonl"), (".", 0o555, "Permission denied | {tmp}/out.jsonl.tmp")],
)
def test_no_permission(public, locked, mode, expected):
    (public.folder / locked).chmod(mode)
    check_refused(public, public.run("make_pairs", uid=public.uid), "make_pairs", 1, expected)
    assert public.files() == {"in.jsonl"}
