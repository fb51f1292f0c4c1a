"""Looks inside trained models: what relations and symbols tell, and what is lost without them. Tables and PNGs.

    python look.py                                                  Relational Games: all models of the default run
    python look.py --from=out/relgames/sa0_ra2_seed1-train_size=1000       one of them
    python look.py --from=out/lm/sa4_ra4_seed1,out/lm/sa4_ra4_seed2        language: symbols, pairs of characters
    python look.py --from=out/seq2seq/sa4_ra4_seed1                 mathematics: relations or symbols?
    python look.py --from=out/vit/sa4_ra4_seed1 --patch=5           images: what one patch relates to
    python look.py --from=awni00/DAT-sa8-ra8-ns1024-sh8-nkvh4-343M --prompt_file=story.txt         a published model

What is drawn goes to the folder `look` of the (first) run. Rows are receivers i, columns senders j, everywhere.
"""
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Literal

import torch

from data.text.tokenizers import load_tokenizer
from extras.pretrained import WEIGHTS, is_published, load_pretrained
from model import LanguageModel, Seq2SeqTransformer, VisionTransformer, model_config
from toolbox.checkpoints import load_checkpoint, load_weights
from toolbox.figures import drawing
from toolbox.figures.runs import load_run, run_folders
from toolbox.inside import language, layers_of, mathematics, relational_games
from toolbox.inside import images as vision
from toolbox.options import agreed, at_least, one_line_errors, parse_options, start
from toolbox.training import choose_device


@dataclass
class Options:
    from_: str = "out/relgames"             # runs, by commas: folders, checkpoints, or a published model's name
    n: int | None = None                    # images, problems or windows of text for the numbers; default: its view's
    layer: int | None = None                # draw this layer, 1 being the first; default: all, or one in the middle
    knock_out: Literal["both", "zero", "resample", "none"] = "both"    # a part taken out: weights 0, or another's
    prompt: str = "auto"                    # text (or question) whose relations are drawn; auto: of the data
    prompt_file: str = ""                   # the same from a file; language: numbers are computed on it, too
    patch: int | None = None                # images: the patch whose relations are drawn; default: the middle
    seed: int = 1                           # of what is drawn at random
    device: str = "auto"                    # auto: cuda, else mps, else cpu
    data: str = ""                          # where a run's files are, if it learned from files
    data_dir: str = "data/cache"            # where downloads are kept
    out: str = ""                           # where tables and figures go; default: see above

    def __post_init__(self):
        at_least(self, n=2, layer=1, patch=0, seed=0)
        if self.knock_out not in ("both", "zero", "resample", "none"):
            raise ValueError(f"knock_out={self.knock_out}: choose from both, zero, resample, none")
        if not self.prompt:
            raise ValueError("the prompt is empty: give some text, as --prompt='def '")


@dataclass
class Looked:
    """A trained model in evaluation mode, and how to make the same one untrained."""
    name: str
    kind: Any                               # the module of toolbox/inside that looks at it
    options: dict
    facts: dict
    model: torch.nn.Module
    untrained: Callable
    device: torch.device
    tokenizer: Any = None
    data: Any = None                        # images: the data set


def kind_of(options):
    """The module of toolbox/inside that looks at runs with these options."""
    if "module" in options:
        return mathematics
    return relational_games if {"task", "train_size"} <= options.keys() else (
        vision if "patch_size" in options else language)


def make_model(kind, options, data, device):
    """The untrained model that a run's options describe, as at step 0 of the run."""
    torch.manual_seed(options["seed"])
    cfg = model_config(options)
    if kind is mathematics:
        model = Seq2SeqTransformer(cfg, n_layers_decoder=options["n_layers_decoder"],
                                   n_ra_decoder=options["n_ra_decoder"])
    elif kind is relational_games:
        model = VisionTransformer(cfg, image_size=36, patch_size=12, n_classes=2, pool=options["pool"])
    elif kind is vision:
        model = VisionTransformer(cfg, image_size=data.size, patch_size=options["patch_size"],
                                  n_classes=data.n_classes, pool=options["pool"])
    else:
        model = LanguageModel(cfg)
    return model.to(device).eval()


# ---- which models ----------------------------------------------------------------------------------------------------

def find(text):
    """--from -> paths of runs and checkpoints, or one published model. Raises ValueError if there is no such thing."""
    found = []
    for path in [Path(text)] if Path(text).exists() else map(Path, text.split(",")):
        if path.is_file() or (path / "config.json").exists():
            found.append(path)
        elif path.is_dir():
            records = {folder: load_run(folder) for folder in run_folders(path)}
            sizes = {folder: record["options"].get("train_size", 0) for folder, record in records.items()
                     if record["finished"]}
            if not sizes:
                raise ValueError(f"{path} has no finished runs and no weights: train one, or give the folder of a run")
            found += [folder for folder, size in sizes.items() if size == max(sizes.values())]
        elif is_published(path) and path.parts[0] != "out" and re.fullmatch(r"[\w-]+/[\w.-]+", path.as_posix()):
            print(f"no folder {path}: taken as the name of a model on Hugging Face", flush=True)
            found.append(path)
        else:
            raise ValueError(f"no run or checkpoint at {path}: train one (python train_relgames.py), or give a "
                             f"published model, as --from=awni00/DAT-sa8-ra8-ns1024-sh8-nkvh4-343M")
    return found


def load(path, o, device):
    """-> Looked. Raises ValueError or OSError, in one line, for what is missing, damaged or of another version."""
    if (path / WEIGHTS).is_file() or not path.exists():
        model = load_pretrained(path.as_posix(), o.data_dir).to(device)
        options = dict(vars(model.cfg), seed=0, data="torch")
        untrained = partial(make_model, language, options, None, device)
        return Looked(path.name, language, options, {"tokenizer": "gpt2"}, model, untrained, device,
                      load_tokenizer("gpt2", o.data_dir))
    file = path
    if path.is_dir():
        file = next((path / name for name in ("weights.pt", "last.pt") if (path / name).exists()), None)
        file = file or relational_games.train_again(path, o)
    checkpoint = load_checkpoint(file)
    options, facts = checkpoint["options"], checkpoint["facts"]
    kind = kind_of(options)
    try:
        data = vision.load_data(options, o, device) if kind is vision else None
        untrained = partial(make_model, kind, options, data, device)
        model = untrained()
    except KeyError as option:
        raise ValueError(f"{file} was written by another version of this code: its options lack {option}") from None
    load_weights(model, checkpoint["model"], file)
    tokenizer = None
    if kind is language:
        tokenizer = load_tokenizer(facts["tokenizer"], o.data_dir, facts.get("alphabet", ""))
    return Looked(file.parent.name, kind, options, facts, model, untrained, device, tokenizer, data)


def refuse_what_has_no_effect(o, run):
    """Raises ValueError for an option that means nothing for runs of this kind."""
    if (o.prompt != "auto" or o.prompt_file) and run.kind in (relational_games, vision):
        instead = "choose a patch, as --patch=5" if run.kind is vision else "Relational Games shows test images"
        raise ValueError(f"a prompt is for language and mathematics: leave it out; {instead}")
    if o.patch is not None and run.kind is not vision:
        raise ValueError(f"patch={o.patch}: patches are chosen in runs of train_vit.py, this is none: leave it out")
    if o.data and run.options["data"] == "generated":
        raise ValueError(f"data={o.data}: this run's data are generated, not read from files: leave it out")


def main(argv=None):
    with one_line_errors():
        o = agreed(parse_options(Options, argv=argv), ("n", "layer", "knock_out", "patch", "seed"))
        device, _, _ = choose_device(o.device, "float32")
        paths = find(o.from_)
        runs = [load(path, o, device) for path in paths]
        if len({run.kind for run in runs}) > 1:
            raise ValueError("these runs are of different kinds: give those of one kind")
        for run in runs:
            refuse_what_has_no_effect(o, run)
            layers_of(run.model, o.layer)                              # is there such a layer?
        folder = paths[0].parent if paths[0].is_file() or len(paths) > 1 else paths[0]
        out = Path(o.out or (Path("out") / paths[0].name if not paths[0].exists() else folder) / "look")
        out.mkdir(parents=True, exist_ok=True)
        print(f"{len(runs)} model{'s' * (len(runs) > 1)}: {', '.join(run.name for run in runs)}; device: {device}")
        with drawing.house_style():
            text, files = runs[0].kind.look(runs, o, out)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n", *files, out / "table.md", sep="\n")


if __name__ == "__main__":
    start(main)
