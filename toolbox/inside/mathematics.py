"""Mathematics: what is lost without relations, symbols and single heads; the size of a symbol by its offset."""
from functools import partial

import torch
import torch.nn.functional as F

from data import mathematics
from toolbox.figures import inside as figures
from toolbox.files import read_text
from toolbox.inside import layers_of, watch, without
from toolbox.inside.knock_outs import knocked_out, losses_table, rise_text, ways
from toolbox.inside.tables import say_if_fewer, table

PROBLEMS = 300                              # held out, of each level, for the numbers, unless --n says otherwise
MOST = 10000                                # more are not generated: they would take hours


def look(runs, o, out):
    """runs: look.Looked. -> the text of the tables, and the files drawn in `out`."""
    texts, files, rows, sizes = [], [], [], {}
    for run in runs:
        problems, source = held_out(run, o)
        contexts = encoded(run, problems)
        new = knocked_out_by_block(run, o, problems, contexts)
        rows, heads = rows + new, head_rows(run, o, problems, contexts)
        texts += [f"{run.name}: {len(problems[0])} {source}", losses_table(new, "nats per character", "problems"),
                  f"without one head (its columns of W_o are zero) the loss rises by:\n\n{heads}"]
        if not run.options["n_ra"]:
            texts.append(f"{run.name} is a Transformer: it has no relations and no symbols, only attention")
        elif run.options["ra_type"] == "rca":
            texts.append(f"{run.name} has RCA heads: no relations r, only attention and symbols")
        if run.options["n_ra"] and run.options["symbols"] == "relative":
            sizes[run.name] = sizes_by_offset(run.model)
    files += draw_question(runs[0], o, out, texts)
    if any(row["what"] in ("relations", "symbols") for row in rows):
        files.append(out / "relations_or_symbols.png")
        figures.draw_relations_or_symbols(files[-1], f"mathematics, {runs[0].options['module']}", rows,
                                          "nats per character")
    if sizes:
        files.append(out / "symbols_by_offset.png")
        figures.draw_sizes(files[-1], sizes)
    return "\n\n".join(texts), files


def held_out(run, o):
    """-> the problems as tokens, and what they are: not one of them was trained on."""
    one, n = run.options, o.n or PROBLEMS
    levels = mathematics.LEVELS if one["level"] == "all" else (one["level"],)
    if one["data"] == "generated":
        n = min(n, MOST)
        say_if_fewer(o, n, "problems of each level that are generated")
        pairs = [pair for level in levels for pair in mathematics.generate(one["module"], level, n, 0, "val")]
        problems = mathematics.tokens(pairs)
    elif not o.data:
        raise ValueError(f"{run.name} learned from published files: give their folder, as --data=FOLDER")
    else:
        _, val, _ = mathematics.load(o.data, one["module"], one["level"], 1, n)
        problems = tuple(torch.cat(tables) for tables in zip(*val.values()))
    order = (problems[0] != mathematics.PAD).sum(1).argsort(stable=True)           # similar lengths together
    return tuple(t[order] for t in problems), f"held-out problems of {one['module']}, {', '.join(levels)}"


@torch.no_grad()
def losses(run, problems, contexts=None):
    """For each problem n its nats, scaled so that the mean over problems is nats per character: (N,).

    contexts: what `encoded` returned, where only the decoder is changed: the encoder takes most of the time.
    """
    nats, characters = [], []
    for i, (questions, inputs, targets) in enumerate(batches(run, problems)):
        logits = run.model.decode(inputs, *(contexts[i] if contexts else run.model.encode(questions)))
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0, reduction="none")
        nats.append(each.view_as(targets).sum(1))
        characters.append((targets != 0).sum(1))
    return (torch.cat(nats).double() / torch.cat(characters).double().mean()).cpu()


@torch.no_grad()
def encoded(run, problems):
    return [run.model.encode(questions) for questions, _, _ in batches(run, problems)]


def batches(run, problems):
    """questions, inputs and targets of about 128 problems at a time."""
    n = len(problems[0])
    for rows in torch.arange(n).tensor_split(-(-n // 128)):
        yield [t.to(run.device) for t in mathematics.batch(problems, rows)]


def knocked_out_by_block(run, o, problems, contexts):
    """Rows of knocked_out, for each block of the encoder and of the decoder."""
    blocks, rows = by_block(run.model), []
    for stack, given in (("encoder", None), ("decoder", contexts)):
        groups = {name: layers for name, layers in blocks.items() if layers[0].stack == stack}
        rows += knocked_out(run, o, groups, partial(losses, run, problems, given))
    return rows


def by_block(model):
    """{"encoder 1": its Layers, ...}."""
    blocks = {}
    for layer in layers_of(model):
        blocks.setdefault(f"{layer.stack} {layer.number}", []).append(layer)
    return blocks


def head_rows(run, o, problems, contexts):
    """A table: by how much the loss rises without each head."""
    if not ways(run, o, "heads"):
        return "(not with this --knock_out)"
    intact, rows = losses(run, problems, contexts), []
    for layer in layers_of(run.model):
        cells, given = [], contexts if layer.stack == "decoder" else None
        for head in range(layer.module.n_heads):
            with without([layer], "heads", head):
                cells.append(rise_text(losses(run, problems, given) - intact))
        empty = [""] * (run.model.cfg.n_heads - len(cells))
        rows.append([f"{layer.stack} {layer.number}", layer.group, *cells, *empty])
    return table(["", "heads", *range(1, run.model.cfg.n_heads + 1)], rows)


@torch.no_grad()
def sizes_by_offset(model):
    """{"encoder 1": (offsets, mean size of s_o W_s per head and feature)}, of the offsets that questions have."""
    sizes = {}
    for stack in (model.encoder, model.decoder):
        for i, block in enumerate(stack.blocks, 1):
            if block.attention.relational is not None:
                symbols, m = stack.symbols[0 if stack.cfg.shared_symbols else i - 1], block.attention.relational
                W_s = m.W_s if hasattr(m, "W_s") else m.W_v
                s = symbols.library @ W_s.weight.T                     # (offsets, n_ra d_h), without a bias
                offsets = torch.arange(len(s)) - symbols.max_distance
                near = offsets.abs() <= 40
                name = f"{'encoder' if stack is model.encoder else 'decoder'} {i}"
                sizes[name] = offsets[near].numpy(), s[near].pow(2).mean(-1).sqrt().cpu().numpy()
    return sizes


@torch.no_grad()
def draw_question(run, o, out, texts):
    """Draws the relations (of a Transformer the attention) among the characters of a question, in the encoder."""
    question = mathematics.generate("algebra__sequence_next_term", "easy", 1, 0, "val")[0][0]
    if o.prompt_file:
        question = read_text(o.prompt_file).strip()
    elif o.prompt != "auto":
        question = o.prompt
    elif run.options["data"] == "generated":
        level = "easy" if run.options["level"] == "all" else run.options["level"]
        question = mathematics.generate(run.options["module"], level, 1, 0, "val")[0][0]
    if wrong := sorted({c for c in question if not " " <= c <= "~"}):
        raise ValueError(f"the question has characters that the model does not know, {''.join(wrong)!r}: it reads the "
                         f"95 printable characters of ASCII")
    if len(question) > mathematics.LONGEST_QUESTION:
        texts.append(f"the question has {len(question)} characters: cut to its first {mathematics.LONGEST_QUESTION}")
        question = question[:mathematics.LONGEST_QUESTION]
    number = o.layer or 1
    questions = mathematics.tokens([(question, "0")])[0][:, :len(question)].long()
    with watch(run.model, number, "encoder") as layers:
        run.model.encode(questions.to(run.device))
    if not layers:
        raise ValueError(f"layer={number}: the encoder of this model has {run.model.cfg.n_layers}")
    names = [figures.visible(c.encode()) for c in question]
    return figures.draw_pairs(out, f"{run.name}, encoder, layer {number}", layers, names, names)
