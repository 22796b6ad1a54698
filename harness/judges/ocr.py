"""OCR: text in images."""

import re

import numpy as np
import torch
import torch.nn.functional as F

from harness.fields import Count
from harness.judges.weights import to_pil

# "...", “...”, ‘...’ and '...'; where a quotation mark may be an apostrophe, quotes begin and end at the edge of a word
_QUOTED = re.compile(r"\"(.+?)\"|“(.+?)”|(?<!\w)‘(.+?)’(?!\w)|(?<!\w)'(.+?)'(?!\w)")


def ocr(device, side: Count = 128, threads: Count = 1):
    """How much of the prompt's quoted text the image shows: max(0, 1 - edit distance / length of the text), 0 to 1.

    PP-OCRv4 reads the image, on the CPU (pip install rapidocr-onnxruntime, which brings the weights). As in Flow-GRPO
    (arXiv 2505.05470) case and spaces do not count, and a reading that contains the whole text has distance 0. Unlike
    there, the text of all quotes counts, not that of the first, and an image that cannot be read ends the run.

    side: smaller images are enlarged until their shorter side has so many pixels. threads: of one image's reading.
    """
    from rapidocr_onnxruntime import RapidOCR

    # by default every image is enlarged to 736 pixels, which takes several times as long
    engine = RapidOCR(det_limit_type="max", det_limit_side_len=960, intra_op_num_threads=threads)

    def score(images, prompts):
        size = images.shape[-2:]
        zoom = max(1, side / min(size))
        larger = F.interpolate(images.float(), [round(n * zoom) for n in size], mode="bicubic") if zoom > 1 else images
        # BGR, and no search for text that is upside down
        found = [engine(np.asarray(image)[..., ::-1], use_cls=False)[0] for image in to_pil(larger)]
        readings = ["".join(text for _, text, _ in lines or []) for lines in found]
        return torch.tensor([text_score(quoted_text(p), reading) for p, reading in zip(prompts, readings, strict=True)])

    return score


def quoted_text(prompt):
    """The text that a prompt quotes; several quotes are joined by a space. Raises ValueError where there is none."""
    text = " ".join(filter(None, (part for quote in _QUOTED.findall(prompt) for part in quote)))
    if not text.strip():
        raise ValueError(f"ocr needs the text in quotes, as in: a sign that says 'hello'; there is none in {prompt!r}")
    return text


def text_score(text, reading):
    """max(0, 1 - edit distance / length of text) without case and spaces; 1 where the reading contains the text.

    Edits are insertions, deletions and substitutions of a character (Levenshtein).
    """
    text, reading = ("".join(string.lower().split()) for string in (text, reading))
    if text in reading:
        return 1.0
    row = list(range(len(reading) + 1))  # distances of the first i characters of text to each beginning of reading
    for i, x in enumerate(text, 1):
        above, row = row, [i]
        for j, y in enumerate(reading, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return max(0.0, 1 - row[-1] / len(text))
