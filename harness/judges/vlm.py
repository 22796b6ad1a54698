"""VLM: a vision-language model behind a server."""

import base64
import functools
import itertools
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import requests
import torch

from harness.judges.weights import encode, to_bytes

QUESTIONS = {
    "number": "How well does the image show what this prompt asks for? Prompt: {prompt}\n"
    "Answer with one number from {low} (not at all) to {high} (perfectly) and nothing else.",
    "yes": "Does the image show what this prompt asks for? Prompt: {prompt}\nAnswer Yes or No.",
}


def vlm(
    device, url: str = "http://localhost:8000/v1", model: str = "",
    score: Literal["number", "yes"] = "number", question: str = "", low: float = 0.0, high: float = 10.0,
    max_tokens: int = 32, concurrency: int = 16, timeout: float = 120.0, retries: int = 5, backoff: float = 1.0,
    api_key_env: str = "",
):  # fmt: skip
    """What a vision-language model says of the image, from 0 to 1, asked of a server with OpenAI's API (vLLM, SGLang).

    url: up to /v1. model: as the server names it; may be left out where it has only one. score: "number" is the first
    number of the reply, which must lie between low and high, as a fraction of the way; "yes" is P(Yes) divided by
    P(Yes) + P(No) of the reply's first token (PaCo-RL, arXiv 2512.04784). question: in it {prompt}, {low} and {high}
    are filled in; by default QUESTIONS[score]. max_tokens: of a reply with a number.

    concurrency: requests under way at once. timeout: seconds that the server may be silent. A request that fails, or
    whose reply cannot be read, is repeated up to `retries` times after backoff, 2 backoff, 4 backoff, ... seconds, or
    what the server's Retry-After says if that is more; refusals (4xx other than 408 and 429) are not repeated, and the
    run ends. api_key_env: the environment variable that holds the server's key.
    """
    if not low < high or retries < 0:
        raise ValueError(f"vlm: low = {low}, high = {high}, retries = {retries} cannot be")
    if api_key_env and not os.environ.get(api_key_env):
        raise ValueError(f"vlm.api_key_env: there is no environment variable {api_key_env}")
    headers = {"Authorization": f"Bearer {os.environ[api_key_env]}"} if api_key_env else {}
    how = dict(headers=headers, timeout=timeout, auth=lambda request: request)  # auth: no .netrc replaces the key

    def insist(method, path, body, read, retries):
        """read(the reply's JSON), with the patience described above. Raises ConnectionError with the last failure."""
        where = f"{url.rstrip('/')}/{path}"
        for attempt in range(retries + 1):
            wait = backoff * 2**attempt
            try:
                reply = requests.request(method, where, json=body, **how)
                if reply.status_code == 200:
                    return read(reply.json())
                failure = f"HTTP {reply.status_code} {reply.text[:300]}"
                if reply.status_code < 500 and reply.status_code not in (408, 429):
                    break
                after = reply.headers.get("Retry-After", "")
                wait = max(wait, int(after) if after.isdigit() else 0)
            except (LookupError, TypeError):
                failure = f"a reply of another form: {reply.text[:300]}"
            except (OSError, ValueError) as error:
                failure = f"{type(error).__name__}: {error}"
            if attempt < retries:
                time.sleep(wait)
        times = f"{attempt + 1} times, at last" if attempt else "once"
        raise ConnectionError(f"{where} failed {times}: {' '.join(failure.split())}")

    try:
        served = insist("GET", "models", None, lambda reply: [each["id"] for each in reply["data"]], retries=0)
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"vlm.url: {error}; start a server (vllm serve MODEL), or say where there is one") from error
    if model not in served and (model or len(served) != 1):
        raise ValueError(f"vlm.model = {model!r}: the server at {url} has {', '.join(served) or 'none'}")
    question = (question or QUESTIONS[score]).replace("{low}", f"{low:g}").replace("{high}", f"{high:g}")
    answer = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20} if score == "yes" else {"max_tokens": max_tokens}
    read = _chance_of_yes if score == "yes" else functools.partial(_number, low=low, high=high)
    pool = ThreadPoolExecutor(concurrency)

    def ask(i, image, prompt):
        png = base64.b64encode(encode(image, "PNG")).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
            {"type": "text", "text": question.replace("{prompt}", prompt)},
        ]
        messages = [{"role": "user", "content": content}]
        body = {"model": model or served[0], "temperature": 0, "messages": messages, **answer}
        try:
            return insist("POST", "chat/completions", body, lambda reply: read(reply["choices"][0]), retries)
        except ConnectionError as error:
            raise ConnectionError(f"image {i} ({prompt}): {error}") from error

    return lambda images, prompts: torch.tensor(list(pool.map(ask, itertools.count(), to_bytes(images), prompts)))


def _number(choice, low, high):
    """The first number in a reply, as a fraction of the way from low to high."""
    text = choice["message"]["content"]
    number = re.search(r"-?\d+(\.\d+)?", text)
    if not number or not low <= float(number[0]) <= high:
        raise ValueError(f"the first number is none from {low:g} to {high:g} in {text[:300]!r}")
    return (float(number[0]) - low) / (high - low)


def _chance_of_yes(choice):
    """P(yes) / (P(yes) + P(no)) of a reply's first token, in any case."""
    likely = [(t["token"].strip().lower(), t["logprob"]) for t in choice["logprobs"]["content"][0]["top_logprobs"]]
    yes, no = (sum(math.exp(log) for word, log in likely if word == answer) for answer in ("yes", "no"))
    if not yes + no:
        raise ValueError(f"neither Yes nor No among the likely first words of {choice['message']['content']!r}")
    return yes / (yes + no)
