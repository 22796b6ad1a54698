"""VLM: a vision-language model behind a server."""

import base64
import itertools
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

import torch
import urllib3
from pydantic import Field

from harness.fields import Count, NotNegative, Positive
from harness.judges.weights import encode, to_pil

QUESTIONS = {
    "number": "How well does the image show what this prompt asks for? Prompt: {prompt}\n"
    "Answer with one number from {low} (not at all) to {high} (perfectly) and nothing else.",
    "yes": "Does the image show what this prompt asks for? Prompt: {prompt}\nAnswer Yes or No.",
}
MAY_PASS = {408, 429, *range(500, 600)}  # statuses that say: later, perhaps


def vlm(
    device, url: str = "http://localhost:8000/v1", model: str = "",
    score: Literal["number", "yes"] = "number", question: str = "", low: float = 0.0, high: float = 10.0,
    max_tokens: Count = 32, concurrency: Count = 16, timeout: Positive = 120.0,
    retries: Annotated[int, Field(ge=0)] = 5, backoff: NotNegative = 1.0, api_key_env: str = "",
):  # fmt: skip
    """What a vision-language model says of the image, from 0 to 1, asked of a server with OpenAI's API (vLLM, SGLang).

    url: up to /v1. model: as the server names it; may be left out where it has only one. score: "number" is the first
    number of the reply, which must lie between low and high, as a fraction of the way; "yes" is P(Yes) divided by
    P(Yes) + P(No) of the reply's first token (PaCo-RL, arXiv 2512.04784). question: in it {prompt}, {low} and {high}
    are filled in; by default QUESTIONS[score]. max_tokens: of a reply with a number.

    concurrency: requests under way at once. timeout: seconds that the server may be silent. A request that fails is
    repeated up to `retries` times: at once, then after 2 backoff, 4 backoff, ... seconds, or what the server's
    Retry-After says. Refusals (4xx other than 408 and 429) and replies that cannot be read, which would be the same
    again at temperature 0, end the run. api_key_env: the environment variable that holds the server's key.
    """
    if not low < high:
        raise ValueError(f"vlm: low = {low}, high = {high} cannot be")
    if api_key_env and not os.environ.get(api_key_env):
        raise ValueError(f"vlm.api_key_env: there is no environment variable {api_key_env}")
    headers = {"Authorization": f"Bearer {os.environ[api_key_env]}"} if api_key_env else {}
    patience = urllib3.Retry(
        retries, backoff_factor=backoff, status_forcelist=MAY_PASS, allowed_methods=None, raise_on_status=False
    )
    server = urllib3.PoolManager(maxsize=concurrency, headers=headers, timeout=timeout, retries=patience)

    def ask(method, path, read, note, **how):
        """read(the reply's JSON). Raises ValueError in the end, with the last failure and the note."""
        where, text = f"{url.rstrip('/')}/{path}", ""
        try:
            reply = server.request(method, where, **how)
            text = reply.data.decode(errors="replace")[:500]
            if reply.status != 200:
                raise urllib3.exceptions.HTTPError(reply.status)
            return read(reply.json())
        except (urllib3.exceptions.HTTPError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {type(error).__name__}: {error} {text}; {note}") from error

    note = "start a server (vllm serve MODEL), or say in vlm.url where there is one"
    served = ask("GET", "models", lambda reply: [each["id"] for each in reply["data"]], note, retries=False)
    if model not in served and (model or len(served) != 1):
        raise ValueError(f"vlm.model = {model!r}: the server at {url} has {', '.join(served) or 'none'}")
    question = (question or QUESTIONS[score]).replace("{low}", f"{low:g}").replace("{high}", f"{high:g}")
    answer = {"model": model or served[0], "temperature": 0, "max_tokens": 1 if score == "yes" else max_tokens}
    answer |= {"logprobs": True, "top_logprobs": 20} if score == "yes" else {}
    pool = ThreadPoolExecutor(concurrency)

    def read(reply):
        choice = reply["choices"][0]
        if score == "yes":
            first = choice["logprobs"]["content"][0]["top_logprobs"]
            likely = [(token["token"].strip().lower(), math.exp(token["logprob"])) for token in first]
            yes, no = (sum(chance for word, chance in likely if word == said) for said in ("yes", "no"))
            if not yes + no:
                raise ValueError("neither Yes nor No among the likely first words")
            return yes / (yes + no)
        number = re.search(r"-?\d+(\.\d+)?", choice["message"]["content"])
        if not number or not low <= float(number[0]) <= high:
            raise ValueError(f"the first number is none from {low:g} to {high:g}")
        return (float(number[0]) - low) / (high - low)

    def judge(i, image, prompt):
        png = base64.b64encode(encode(image, "PNG")).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
            {"type": "text", "text": question.replace("{prompt}", prompt)},
        ]
        body = {**answer, "messages": [{"role": "user", "content": content}]}
        return ask("POST", "chat/completions", read, f"asked about image {i} ({prompt})", json=body)

    return lambda images, prompts: torch.tensor(list(pool.map(judge, itertools.count(), to_pil(images), prompts)))
