"""Language: what is lost without relations or symbols, what symbols tell of a character, which characters relate."""
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from data.text import Tokens, fixed_starts
from data.text import load as load_corpus
from toolbox import inside
from toolbox.files import read_text
from toolbox.figures import inside as figures
from toolbox.inside import layers_of, watch, watch_symbols
from toolbox.inside.knock_outs import by_layer, knocked_out, losses_table
from toolbox.inside.statistics import entropy, joint_with, share_told_and_null
from toolbox.inside.tables import say_if_fewer, table

WINDOWS = 48                                # of text, for the numbers, unless --n says otherwise
KINDS = 300                                 # the most frequent kinds of tokens are looked at (there are 256 bytes)
FREQUENT = 60                               # pairs are of the most frequent kinds,
SEEN = 30                                   # and occur so often at least
CLASSES = {"small letter": "", "capital": "", "digit": "", "space": " ", "line break": "\n", "opening bracket": "([{",
           "closing bracket": ")]}", "quote": "\"'`", "underscore": "_", "operator": "+-*/=<>%&|^~@",
           "punctuation": ".,:;!?#\\", "other": ""}


def look(runs, o, out):
    """runs: look.Looked. -> the text of the tables, and the files drawn in `out`."""
    texts, files, rows, taken = [], [], [], []
    for run in runs:
        x, y, source = windows(run, o)
        texts.append(f"{run.name}: {len(x)} windows of {x.size(1)} tokens of {source}")
        new = knocked_out(run, o, by_layer(layers_of(run.model)), partial(losses, run.model, x, y))
        rows += [{"run": run.name, **row} for row in new]
        texts.append(losses_table(new, "nats per token", "windows"))
        groups = [layer for layer in layers_of(run.model, o.layer) if layer.group == "relational"]
        if not groups:
            texts.append(f"{run.name} is a Transformer: it has no relations and no symbols, only attention")
        elif not groups[0].n_relations:
            texts.append(f"{run.name} has RCA heads: no relations r, only attention and symbols")
        if symbols := symbols_told(run, x, o):
            texts.append(symbols.pop("text"))
            taken.append((run, symbols))
        if groups and groups[0].n_relations:
            texts.append(pairs_told(run, x))
        files += draw_prompt(run, o, out, x, texts) if run is runs[0] else []
    if taken:
        files.append(out / "symbols.png")
        figures.draw_symbols(files[-1], [panel for run, symbols in taken[:2] for panel in panels(run, o, **symbols)])
    if any(row["what"] != "heads" for row in rows):
        files.append(out / "relations_or_symbols.png")
        figures.draw_relations_or_symbols(files[-1], "language, DAT", rows, "nats per token")
    return "\n\n".join(texts), files


def windows(run, o):
    """-> inputs and next tokens (N, T) each, and the name of their text: --prompt_file, or else the validation text."""
    length = run.model.cfg.max_len
    if o.prompt_file:
        tokens, source = Tokens(np.array(run.tokenizer.encode(read_text(o.prompt_file)))), o.prompt_file
        if len(tokens) < 3:
            raise ValueError(f"{o.prompt_file} has {len(tokens)} tokens: give a text of three or more")
    else:
        one = run.options
        corpus = load_corpus(o.data or one["data"], run.facts["tokenizer"], o.data_dir, first_mb=one.get("first_mb"),
                             n_shards=one.get("n_shards"))
        tokens, source = corpus.val, f"the validation text of {corpus.name}"
        if corpus.tokenizer.name == "chars" and corpus.tokenizer.alphabet != run.tokenizer.alphabet:
            raise ValueError(f"{o.data}: not the text of this run, its alphabet is another; give it as --data=FILE")
    n = o.n or max(2, min(WINDOWS, WINDOWS * 128 // length))
    length = min(length, len(tokens) - 1)
    starts = fixed_starts(len(tokens), length, n)                      # without overlap
    say_if_fewer(o, len(starts), f"windows of {length} tokens in {source}")
    return *(t.to(run.device) for t in tokens.windows(starts, length)), source


@torch.no_grad()
def losses(model, x, y):
    """Mean cross-entropy of each window: (N,) in nats per token."""
    found, n_parts = [], -(-len(x) // 16)
    for idx, targets in zip(x.tensor_split(n_parts), y.tensor_split(n_parts)):
        logits = model(idx)[0]
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none").view_as(idx)
        found.append(each.sum(1) / (targets >= 0).sum(1))
    return torch.cat(found).double().cpu()


# ---- symbols ---------------------------------------------------------------------------------------------------------

def class_of(piece):
    """Bytes of a token -> the number of its class: that of its first character that is no space."""
    text = piece.decode(errors="replace")
    first = (text.lstrip(" ") or text[:1] or "\0")[0]
    for i, (name, characters) in enumerate(CLASSES.items()):
        if first in characters:
            return i
    kinds = (first.islower(), first.isupper(), first.isdigit())
    return kinds.index(True) if any(kinds) else len(CLASSES) - 1


@torch.no_grad()
def symbols_told(run, x, o):
    """Per layer and symbol head: the effective number of symbols, and what they tell of the class of a character."""
    kinds = most_frequent(x, KINDS)
    classes = torch.tensor([class_of(run.tokenizer.decode([kind])) for kind in kinds.tolist()])
    joints, entropies, n = None, None, 0
    for idx in x.split(max(1, 2048 // x.size(1))):
        rows, index = of_kinds(idx.flatten(), kinds)
        with watch_symbols(run.model) as taken:
            run.model(idx)
        if not taken:
            return None
        taken = [p[:, rows].cpu() for p in taken]
        new = torch.stack([torch.stack([joint_with(one, index, len(kinds)) for one in p]) for p in taken]) * len(rows)
        sums = torch.stack([entropy(p.double()).sum(-1) for p in taken])           # (layers, heads)
        joints, entropies, n = (new, sums, len(rows)) if n == 0 else (joints + new, entropies + sums, n + len(rows))
    joints, effective = joints / n, (entropies / n).exp()              # (layers, heads, kinds, symbols)
    lines, told = [], torch.zeros(joints.shape[:2])
    for layer in range(len(joints)):
        for head in range(joints.size(1)):
            share, low, high = share_told_and_null(joints[layer, head], classes, o.seed)
            told[layer, head] = share
            lines.append([layer + 1, head + 1, f"{effective[layer, head]:.1f} of {joints.size(-1)}", f"{share:.3f}",
                          f"{low:.3f} to {high:.3f}"])
    columns = ["layer", "symbol head", "effective number of symbols", "share of the class that they tell",
               "if classes are shuffled over " + ("bytes" if run.tokenizer.name == "bytes" else "tokens") + ", 95%"]
    return {"text": table(columns, lines), "joints": joints, "effective": effective, "told": told, "kinds": kinds,
            "classes": classes}


def most_frequent(x, n):
    """The n most frequent tokens of x, sorted."""
    kinds, counts = x.cpu().unique(return_counts=True)
    return kinds[counts.argsort(descending=True, stable=True)[:n]].sort().values


def of_kinds(tokens, kinds):
    """tokens (N,) -> the rows whose token is one of `kinds` (sorted), and which of them it is."""
    tokens = tokens.cpu()
    index = torch.searchsorted(kinds, tokens).clamp(max=len(kinds) - 1)
    rows = (kinds[index] == tokens).nonzero()[:, 0]
    return rows, index[rows]


def panels(run, o, joints, effective, told, kinds, classes, characters=36, symbols=48):
    """For draw_symbols: of layer 1 and a later one, the head that tells most; rows are characters, sorted by class."""
    frequent = joints[0, 0].sum(-1).argsort(descending=True, stable=True)[:characters]
    order = frequent[(classes[frequent] * 10 ** 6 + frequent).argsort()]
    names = [figures.visible(run.tokenizer.decode([kind])) for kind in kinds[order].tolist()]
    for number in dict.fromkeys((1, o.layer or len(joints) // 2 + 1)):
        head = int(told[number - 1].argmax())
        p = joints[number - 1, head, order]
        p = p / p.sum(-1, keepdim=True)                                # (characters, symbols): how much each takes
        used = p.max(0).values.argsort(descending=True, stable=True)[:symbols].sort().values
        used = used[p[:, used].argmax(0).argsort(stable=True)]         # by the character that takes most of it
        title = f"{run.name}: layer {number}, symbol head {head + 1}"
        below = f"{len(used)} of {p.size(1)} symbols; effective number {effective[number - 1, head]:.0f}"
        yield title, names, classes[order].tolist(), p[:, used].numpy(), below


# ---- relations -------------------------------------------------------------------------------------------------------

def pairs_told(run, x):
    """Per layer and relation: how much of r the two characters tell, and which pairs relate most and least."""
    x = x[:, :128]
    kinds = most_frequent(x, FREQUENT)
    names = [figures.visible(run.tokenizer.decode([kind]), figures.PLAIN) for kind in kinds.tolist()]
    sums, control = sums_by_pair(run.model, x, kinds), sums_by_pair(run.untrained(), x, kinds)
    rows = []
    for number, (count, total, squares) in sums.items():
        mean = total / count.clamp(min=1)
        share, untrained = share_between(*sums[number]), share_between(*control[number])
        for l in share.argsort(descending=True)[:4].sort().values.tolist():
            often = (count[l] >= SEEN).nonzero()[:, 0]
            order = often[mean[l, often].argsort()]
            most, least = ("  ".join(f"{names[pair // len(kinds)]}<-{names[pair % len(kinds)]} {mean[l, pair]:+.1f}"
                                     for pair in some.tolist()) for some in (order.flip(0)[:3], order[:3]))
            pairs = [f"`` {text} ``".replace("|", r"\|") for text in (most, least)]
            rows.append([number, l + 1, f"{untrained[l]:.2f}", f"{share[l]:.2f}", *pairs])
    return table(["layer", "relation", "share of r's variance that the two characters tell: untrained", "trained",
                  "relate most: receiver<-sender", "least"], rows)


@torch.no_grad()
def sums_by_pair(model, x, kinds):
    """{layer: for each relation and pair of kinds (receiver, earlier sender) how often it occurs, sum of r, of r^2}."""
    kept, n_kinds, sums = sum(one.module.n_heads + one.n_relations for one in layers_of(model)), len(kinds), {}
    for idx in x.split(max(1, min(16, inside.LARGEST // (kept * x.size(1) ** 2 * 4)))):
        with watch(model) as layers:
            model(idx)
        index = torch.searchsorted(kinds, idx.cpu()).clamp(max=n_kinds - 1)
        known = kinds[index] == idx.cpu()                              # (B, T)
        earlier = torch.ones(idx.size(1), idx.size(1), dtype=torch.bool).tril(-1)
        counted = known[:, :, None] & known[:, None] & earlier         # (B, T, T): receiver i, sender j < i
        pair = (index[:, :, None] * n_kinds + index[:, None])[counted]
        for layer in layers:
            if layer.n_relations:
                r = layer.r.cpu().transpose(0, 1)[:, counted].double() # (R, pairs)
                new = torch.stack([torch.zeros(len(r), n_kinds ** 2, dtype=torch.float64).index_add_(1, pair, one)
                                   for one in (torch.ones_like(r), r, r ** 2)])
                sums[layer.number] = sums.get(layer.number, 0) + new
    return sums


def share_between(count, total, squares):
    """Sums by pair, (R, pairs) each -> the share of the variance that lies between pairs (R,)."""
    overall = total.sum(-1) / count.sum(-1)
    between = (count * (total / count.clamp(min=1) - overall[:, None]) ** 2).sum(-1)
    return between / (squares.sum(-1) - count.sum(-1) * overall ** 2)


@torch.no_grad()
def draw_prompt(run, o, out, x, texts):
    """Draws the relations (of a Transformer the attention) among the tokens of the prompt."""
    if o.prompt != "auto":
        prompt = run.tokenizer.encode(o.prompt)
    elif o.prompt_file:
        prompt = run.tokenizer.encode(read_text(o.prompt_file))[:40]
    else:
        prompt = x[0, :40].tolist()
    longest = run.model.cfg.max_len
    if len(prompt) > longest:
        texts.append(f"the prompt has {len(prompt)} tokens, more than this model reads: cut to its first {longest}")
        prompt = prompt[:longest]
    number = o.layer or run.model.cfg.n_layers // 2 + 1
    with watch(run.model, number) as layers:
        run.model(torch.tensor([prompt], device=run.device))
    names = [figures.visible(run.tokenizer.decode([token])) for token in prompt]
    return figures.draw_pairs(out, f"{run.name}, layer {number}", layers, names, names, causal=True)
