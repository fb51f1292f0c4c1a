"""Text from a trained model, through a KV cache.

    python sample.py --from=out/lm/sa4_ra4_seed1 --prompt="class Linear"
"""
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch

import training
from config import TransformerConfig, at_least
from data import text
from model import LanguageModel


@dataclass
class Options:
    from_: str = "out/lm/sa4_ra4_seed1"     # a run's folder, or a checkpoint
    prompt: str = "def "                    # what to continue
    max_new_tokens: int = 500               # how far
    temperature: float = 0.8                # 0: always the likeliest token
    top_k: int | None = None                # choose among the k likeliest only
    seed: int = 1                           # of the choices; 1,2,3: one text each
    use_cache: bool = True                  # False reads the whole context again for each token: slower, the same text
    device: str = "auto"                    # auto: cuda, else mps, else cpu

    def __post_init__(self):
        if not self.prompt:
            raise ValueError("--prompt is empty: give at least one character to continue")
        at_least(self, max_new_tokens=0, temperature=0, top_k=1, seed=0)


def load_model(path):
    """The LanguageModel of a run's folder (its last checkpoint) or of a checkpoint. ValueError if there is none."""
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    checkpoint = training.load_checkpoint(path)
    names = {f.name for f in fields(TransformerConfig)}
    model = LanguageModel(TransformerConfig(**{k: v for k, v in checkpoint["options"].items() if k in names}))
    training.load_weights(model, checkpoint["model"], path)
    return model


def main(argv=None):
    for options in training.parse_options(Options, argv=argv):
        with training.one_line_errors():
            device, _, _ = training.choose_device(options.device, "float32")
            model = load_model(options.from_).to(device)
        torch.manual_seed(options.seed)
        prompt = text.encode(options.prompt).to(device)                            # (1, T)
        start = time.perf_counter()
        tokens = model.generate(prompt, options.max_new_tokens, options.temperature, options.top_k, options.use_cache)
        seconds = time.perf_counter() - start
        print(text.decode(tokens[0]))
        print(f"--- seed {options.seed}: {options.max_new_tokens / seconds:.0f} tokens/s")


if __name__ == "__main__":
    training.start(main)
