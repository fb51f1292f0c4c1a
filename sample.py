"""Text from a trained or a published model, token by token as it is made, through a KV cache.

    python sample.py --from=out/lm/sa4_ra4_seed1 --prompt="class Linear"
    python sample.py --from=awni00/DAT-sa8-ra8-ns1024-sh8-nkvh4-343M --prompt="The history of" --top_p=0.9
    cat story.txt | python sample.py --prompt_file=- --n_samples=3 > continued.txt          (speed: on standard error)
"""
import codecs
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from data.text.tokenizers import load_tokenizer
from extras.pretrained import is_published, load_pretrained
from model import LanguageModel, model_config, stream
from toolbox.checkpoints import load_checkpoint, load_weights
from toolbox.options import at_least, one_line_errors, parse_options, start
from toolbox.training import choose_device


# An option that only this script has
OTHERS = {"patch_size": "train_vit.py", "module": "train_seq2seq.py", "task": "train_relgames.py"}


@dataclass
class Options:
    from_: str = "out/lm/sa4_ra4_seed1"     # a run's folder, a checkpoint, or a published one: its folder or its name
    prompt: str = "def "                    # the text to continue; empty: start after an end-of-text token
    prompt_file: str = ""                   # continue the text in this file instead; -: in standard input
    max_new_tokens: int = 500               # how many, unless an end-of-text token comes first
    temperature: float = 0.8                # 0: always the likeliest token
    top_k: int | None = None                # choose among the k likeliest only
    top_p: float | None = None              # choose among the fewest likeliest only whose probability reaches p
    seed: int = 1                           # of the choices; 1,2,3: one text each
    n_samples: int = 1                      # texts for each seed; each further one has the next seed
    use_cache: bool = True                  # False: process the whole context for each token; slower, the same text
    tokenizer: str = "auto"                 # bytes, chars, or tiktoken's: gpt2 ...; auto: the model's own
    device: str = "auto"                    # auto: cuda, else mps, else cpu
    data_dir: str = "data/cache"            # where downloads are kept

    def __post_init__(self):
        at_least(self, max_new_tokens=1, temperature=0, top_k=1, seed=0, n_samples=1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.seed + self.n_samples > 2 ** 63:
            raise ValueError(f"seed={self.seed}: must be below 2^63")


def load(name, tokenizer, data_dir):
    """-> LanguageModel, tokenizer. Raises ValueError or OSError, in one line, if there is none or they do not fit."""
    path = Path(name)
    if is_published(name):
        model, facts = load_pretrained(name, data_dir), {"tokenizer": "gpt2"}
    else:
        if not path.exists():
            raise ValueError(f"no checkpoint at {path}: train one (python train_lm.py), or give a published one, as "
                             f"--from=awni00/DAT-sa8-ra8-ns1024-sh8-nkvh4-343M")
        if path.is_dir():
            path = path / ("weights.pt" if (path / "weights.pt").exists() else "last.pt")      # of Relational Games
        checkpoint = load_checkpoint(path)
        facts, options = checkpoint["facts"], checkpoint["options"]
        for option, script in OTHERS.items():
            if option in options:
                raise ValueError(f"{path} is of a run of {script}, which makes no text: python look.py --from={name} "
                                 "shows it")
        try:
            model = LanguageModel(model_config(options))
        except KeyError as option:
            raise ValueError(f"{path} was written by another version of this code: its options lack {option}") from None
        load_weights(model, checkpoint["model"], path)
    tokenizer = load_tokenizer(facts["tokenizer"] if tokenizer == "auto" else tokenizer, data_dir,
                               facts.get("alphabet", ""))
    if tokenizer.vocab_size > model.cfg.vocab_size:
        raise ValueError(f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} tokens, {name} only "
                         f"{model.cfg.vocab_size:,}: give the one that it was trained with, as --tokenizer=bytes (256)")
    return model, tokenizer


def read_prompt(options, tokenizer):
    """The tokens to continue: a list, not empty."""
    raw = os.fsencode(options.prompt)                                  # the command line's bytes, in any locale
    if options.prompt_file:
        raw = sys.stdin.buffer.read() if options.prompt_file == "-" else Path(options.prompt_file).read_bytes()
    text = raw.decode("utf-8", "surrogateescape")
    if not text and tokenizer.end is None:
        raise ValueError(f"the prompt is empty, and {tokenizer.name} have no end-of-text to start after: give a prompt")
    return tokenizer.encode(text) or [tokenizer.end]


def write(model, tokenizer, prompt, options, seed):
    """Writes prompt and text to standard output, as they are made, and their speed to standard error."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may be spread over several tokens

    def show(tokens, final=False):
        text = decoder.decode(tokenizer.decode(tokens), final)
        print("".join(c if c.isprintable() or c in "\n\t" else "." for c in text), end="", flush=True)

    torch.manual_seed(seed)
    show(prompt if prompt != [tokenizer.end] else [])
    idx, times = torch.tensor([prompt], device=model.head.weight.device), [time.perf_counter()]      # idx: (1, T)
    for token in stream(model, idx, options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
                        top_p=options.top_p, use_cache=options.use_cache, vocab_size=tokenizer.vocab_size):
        token = token.item()                                           # waits for the device
        times.append(time.perf_counter())
        if token == tokenizer.end:
            break
        show([token])
    show([], final=True)
    print(flush=True)
    n, T, longest = len(times) - 1, len(prompt), model.cfg.max_len
    print(f"--- {n} tokens" + (f", {(n - 1) / (times[-1] - times[1]):.1f} tokens/s" if n > 1 else "")
          + f" (prompt of {T} tokens" + (f", its last {longest}" if T > longest else "")
          + f" read in {times[1] - times[0]:.2f} s), seed {seed}"
          + (", stopped at end-of-text" if token == tokenizer.end else ""), file=sys.stderr)


def main(argv=None):
    runs = parse_options(Options, argv=argv)
    first = runs[0]                                                    # only numbers may be lists: the rest is common
    with one_line_errors():
        device, _, _ = choose_device(first.device, "float32")
        model, tokenizer = load(first.from_, first.tokenizer, first.data_dir)
        model, prompt = model.to(device), read_prompt(first, tokenizer)
    for options in runs:
        for i in range(options.n_samples):
            write(model, tokenizer, prompt, options, options.seed + i)


if __name__ == "__main__":
    start(main)
