"""Frameworks over the OpenAI format, and an evaluation program. `BITNET_URL` says where the server is."""

import json
import math
import os
import urllib.request

import pytest

URL = os.environ["BITNET_URL"]
PROMPT = [{"role": "user", "content": "Once upon a time"}]


def test_litellm():
    litellm = pytest.importorskip("litellm")
    request = dict(model="openai/builtin", api_base=f"{URL}/v1", api_key="sk-local",
                   messages=PROMPT, max_tokens=8, temperature=0)
    whole = litellm.completion(**request)
    assert whole.usage.completion_tokens == 8
    chunks = litellm.completion(**request, stream=True)
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.choices[0].message.content


def test_langchain():
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(base_url=f"{URL}/v1", api_key="sk-local", model="builtin", temperature=0,
                                                               max_tokens=8, max_retries=0)
    whole = chat.invoke("Once upon a time")
    assert whole.usage_metadata["output_tokens"] == 8
    assert "".join(c.content for c in chat.stream("Once upon a time")) == whole.content


def test_pydantic_ai():
    pytest.importorskip("pydantic_ai")
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("builtin", provider=OpenAIProvider(base_url=f"{URL}/v1", api_key="sk-local"))
    answer = Agent(model, system_prompt="Tell a story.").run_sync("Once upon a time", model_settings={"max_tokens": 8, "temperature": 0})
    assert answer.output and answer.usage.output_tokens == 8


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "TOOLS"])
def test_instructor(mode):
    instructor = pytest.importorskip("instructor")
    openai = pytest.importorskip("openai")
    from pydantic import BaseModel, ConfigDict, Field

    class Pet(BaseModel):
        # Without this the schema allows further members, and a small model thinks of one after another.
        model_config = ConfigDict(extra="forbid")
        name: str = Field(max_length=12)
        legs: int = Field(ge=0, le=9)

    client = instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key="sk-local"), mode=getattr(instructor.Mode, mode))
    pet = client.chat.completions.create(
        model="builtin", response_model=Pet, max_tokens=200, temperature=0, max_retries=0,
        messages=[{"role": "user", "content": "A dog called Rex."}])
    assert 0 <= pet.legs <= 9


def test_openai_parse():
    openai = pytest.importorskip("openai")
    from pydantic import BaseModel, Field

    class Answer(BaseModel):
        word: str = Field(max_length=10)
        sure: bool

    client = openai.OpenAI(base_url=f"{URL}/v1", api_key="sk-local", max_retries=0)
    answer = client.chat.completions.parse(
        model="builtin", messages=[{"role": "user", "content": "One word."}], response_format=Answer, max_tokens=100)
    assert isinstance(answer.choices[0].message.parsed, Answer)


def test_lm_eval(tmp_path):
    """A multiple-choice task through `local-completions`: its log-likelihoods are the server's own."""
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    documents = [
        {"text": "Once upon a", "choices": [" time", " stone"], "gold": 0},
        {"text": "The little girl ran to her", "choices": [" mother", " under"], "gold": 0},
        {"text": "He was very", "choices": [" old", " the"], "gold": 0},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    (tmp_path / "tiny.yaml").write_text(f"""
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
""")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    result = simple_evaluate(
        model="local-completions", tasks=["tiny"], log_samples=True, bootstrap_iters=0,
        model_args=f"model=builtin,base_url={URL}/v1/completions,tokenizer_backend=remote,num_concurrent=1,max_length=512",
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
    samples = result["samples"]["tiny"]
    assert len(samples) == len(documents)
    for sample in samples:
        for choice, (logprob, _) in zip(sample["doc"]["choices"], (r[0] for r in sample["resps"])):
            assert math.isclose(float(logprob), likelihood(sample["doc"]["text"], choice), rel_tol=1e-4, abs_tol=1e-4)
    assert 0 <= result["results"]["tiny"]["acc,none"] <= 1


def likelihood(text, choice):
    """The log-probability of `choice` after `text`, asked for directly."""
    body = {"model": "builtin", "prompt": text + choice, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    request = urllib.request.Request(f"{URL}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    logprobs = json.load(urllib.request.urlopen(request))["choices"][0]["logprobs"]
    rows = zip(logprobs["text_offset"], logprobs["token_logprobs"])
    return sum(value for offset, value in rows if len(text) <= offset < len(text + choice))
