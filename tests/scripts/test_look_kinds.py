"""look.py on language models, mathematics and images. Relational Games and wrong input are in test_look.py."""
import os
import re
from functools import partial

import pytest
import torch
from test_look import CPU, cell, few_glyphs, language, pictures, refuses, says, seq2seq, vision         # noqa: F401
from test_pretrained import DAT, random_weights, write

import look
from model import LanguageModel, model_config
from toolbox.inside import language as lm_view
from toolbox.inside import mathematics as maths_view
from toolbox.inside import relational_games as view
from toolbox.inside.knock_outs import knocked_out


# ---- language --------------------------------------------------------------------------------------------------------

def test_a_language_model_is_described_and_drawn(tmp_path, capsys, monkeypatch):
    path = language(tmp_path / "last.pt")
    options = (f"--from={path}", f"--data={tmp_path / 'text.txt'}", f"--data_dir={tmp_path / 'cache'}", "--n=6")
    text = says(capsys, *options)
    assert "6 windows of 16 tokens" in text and "without symbols, those of another one" in text
    assert re.search(r"\| 2 \| 2 \| \d\.\d of 4 \| 0\.\d{3} \| 0\.\d{3} to 0\.\d{3} \|", text)
    assert "share of r's variance" in text and says(capsys, *options) == text
    assert pictures(tmp_path / "look") == ["relations.png", "relations_or_symbols.png", "symbols.png"]
    first = re.search(r"\| 1 \| 1 \| (\S+) \|", text[text.index("variance"):])[1]
    assert first == "1.00"                     # in layer 1 relations are a fixed table of characters by characters
    text.encode("cp1252")                      # what consoles of Windows can print


def test_the_share_of_variance_that_two_characters_tell():
    """0 where r is noise, 1 where it is a table of characters by characters, between them the share of the table."""
    g = torch.Generator().manual_seed(0)
    pair, by_pair, noise = torch.arange(40000) % 20, torch.randn(20, generator=g), torch.randn(40000, generator=g)
    r = torch.stack([noise, by_pair[pair], 2 * by_pair[pair] / by_pair.std(correction=0) + noise]).double()
    sums = [torch.zeros(3, 20, dtype=torch.float64).index_add_(1, pair, one) for one in (torch.ones_like(r), r, r ** 2)]
    share = lm_view.share_between(*sums)
    assert share[0] < 0.002 and share[1] == pytest.approx(1) and share[2] == pytest.approx(4 / 5, abs=0.01)


def test_the_untrained_control_of_relations_is_the_model_at_step_0(tmp_path, capsys):
    """An untrained model is its own control: both columns are equal."""
    path = language(tmp_path / "last.pt")
    state = torch.load(path, weights_only=True)
    torch.manual_seed(state["options"]["seed"])
    untrained = LanguageModel(model_config(state["options"])).state_dict()
    g = torch.Generator().manual_seed(0)
    other = {name: 0.5 * torch.randn(p.shape, generator=g) for name, p in untrained.items()}
    for model, equal in ((untrained, True), (other, False)):
        torch.save(state | {"model": model}, path)
        text = says(capsys, f"--from={path}", f"--data={tmp_path / 'text.txt'}", f"--data_dir={tmp_path / 'cache'}",
                    "--n=6")
        rows = re.findall(r"\| 2 \| 1 \| (\S+) \| (\S+) \| ``", text)
        assert len(rows) == 1 and (rows[0][0] == rows[0][1]) == equal


def test_all_relations_of_a_layer_are_taken_out_together(cell, capsys):
    folder = cell(n_ra=2, n_layers=1)
    text = says(capsys, f"--from={folder}", "--n=40")
    row = next(line for line in text.splitlines() if "| 1 | all relations |" in line).split("|")
    model = look.load(folder, look.Options(), CPU).model.eval()
    x, y, _, _ = view.test_images(look.load(folder, look.Options(), CPU), look.Options(n=40))
    with torch.no_grad():
        model.stack.blocks[0].attention.relational.W_r.zero_()
        accuracy = (model(x)[0].argmax(-1) == y).double().mean().item()
    assert float(row[11]) == pytest.approx(accuracy, abs=0.006)
    assert "all relations" not in says(capsys, f"--from={cell(n_ra=1, n_layers=1)}", "--n=40")      # it has one


def test_there_is_no_more_data_than_there_is(few_glyphs, cell, tmp_path, capsys, monkeypatch):
    path, data = language(tmp_path / "lm/last.pt"), f"--data={tmp_path / 'lm/text.txt'}"
    file = tmp_path / "short.txt"
    file.write_text("to be, or not to be: that is the question.")
    text = says(capsys, f"--from={path}", data, f"--data_dir={tmp_path / 'cache'}", "--n=100000000")
    windows = int(re.search(r"there are only ([\d,]+) windows of 16 tokens", text)[1].replace(",", ""))
    assert f": {windows} windows of 16 tokens" in text and 50 < windows < 1000
    assert "there are only 2 windows" in says(capsys, f"--from={path}", f"--prompt_file={file}", "--n=3")
    assert "only 60 test images" in says(capsys, f"--from={vision(tmp_path / 'vit/last.pt')}", "--n=100000000")
    assert "only 40 test images" in says(capsys, f"--from={cell()}", "--n=100000000")
    monkeypatch.setattr(maths_view, "MOST", 5)
    assert "only 5 problems" in says(capsys, f"--from={seq2seq(tmp_path / 'maths/last.pt')}", "--n=100000000")


@pytest.mark.parametrize("options, words", [
    (dict(n_ra=0), "a Transformer: it has no relations"), (dict(ra_type="rca"), "RCA heads: no relations r"),
    (dict(symbols="relative"), "share of r's variance"), (dict(symbols="positional", n_ra=2), "share of r's variance"),
    (dict(tokenizer="chars", alphabet="\n (),.:abehinoqrstu"), "effective number")])
def test_all_kinds_of_language_models(tmp_path, capsys, options, words):
    path = language(tmp_path / "last.pt", **options)
    data = f"--data={tmp_path / 'text.txt'}", f"--data_dir={tmp_path / 'cache'}"
    text = says(capsys, f"--from={path}", *data, "--n=4")
    assert words in text
    assert ("effective number" in text) == ("symbols" not in options and options.get("n_ra") != 0)
    assert pictures(tmp_path / "look")[0] == ("attention.png" if "no relations" in words else "relations.png")


@pytest.mark.figures
def test_a_prompt_and_a_prompt_file(tmp_path, capsys):
    path, file = language(tmp_path / "last.pt"), tmp_path / "prompt.txt"
    file.write_text("to be, $$ or not | to be\t" * 4)
    text = says(capsys, f"--from={path}", f"--prompt_file={file}", "--n=4", "--prompt=" + "to be " * 5, "--layer=2")
    assert f"tokens of {file}" in text and "the prompt has 30 tokens" in text and "cut to its first 16" in text
    assert says(capsys, f"--from={path}", f"--prompt_file={file}", "--n=4")


@pytest.mark.skipif("DAT_TEST_DATA" not in os.environ, reason="GPT-2's tokenizer")
def test_a_published_model(tmp_path, capsys):
    config = DAT | dict(vocab_size=50304)
    write(tmp_path / "model", config, random_weights(config))
    (tmp_path / "story.txt").write_text("Once upon a time there was a little dog. " * 20)
    text = says(capsys, f"--from={tmp_path / 'model'}", f"--prompt_file={tmp_path / 'story.txt'}", "--n=3")
    assert "1 model: model" in text and "effective number" in text and "without relations" in text
    assert (tmp_path / "model/look/symbols.png").exists()


# ---- mathematics, images ---------------------------------------------------------------------------------------------

def test_mathematics(tmp_path, capsys):
    path = seq2seq(tmp_path / "last.pt")
    text = says(capsys, f"--from={path}", "--n=10", "--prompt=What is next in 1, 2, 3?")
    assert "10 held-out problems" in text and "without cross heads" in text and text.count("| decoder 2 |") == 4
    assert pictures(tmp_path / "look") == ["relations.png", "relations_or_symbols.png", "symbols_by_offset.png"]
    assert text == says(capsys, f"--from={path}", "--n=10", "--prompt=What is next in 1, 2, 3?")
    text = says(capsys, f"--from={seq2seq(tmp_path / 'rca/last.pt', ra_type='rca')}", "--n=10", "--prompt=" + "1" * 200)
    assert "RCA heads: no relations r" in text and "200 characters: cut to its first 160" in text
    text = says(capsys, f"--from={seq2seq(tmp_path / 'sa/last.pt', n_ra=0, level='all', n_layers_decoder=1)}", "--n=4")
    assert "it is a Transformer" in text or "is a Transformer" in text and "12 held-out" in text
    assert pictures(tmp_path / "sa/look") == ["attention.png"]


def test_a_decoder_gets_what_the_intact_encoder_computed_only_where_the_encoder_is_intact(tmp_path):
    run = look.load(seq2seq(tmp_path / "last.pt"), look.Options(n=10), CPU)
    problems, _ = maths_view.held_out(run, look.Options(n=10))
    rows = maths_view.knocked_out_by_block(run, look.Options(), problems, maths_view.encoded(run, problems))
    whole = knocked_out(run, look.Options(), maths_view.by_block(run.model), partial(maths_view.losses, run, problems))
    assert len(rows) == len(whole) > 8 and all(row["rise"].abs().max() > 1e-6 for row in rows)
    for row, same in zip(rows, whole):
        assert (row["layer"], row["what"], row["how"]) == (same["layer"], same["what"], same["how"])
        assert torch.allclose(row["rise"], same["rise"], atol=1e-6)


def test_images(few_glyphs, tmp_path, capsys):
    path = vision(tmp_path / "last.pt", pool="mean_cls")
    text = says(capsys, f"--from={path}", "--n=20", "--patch=3")
    assert "20 test images of glyphs" in text and text == says(capsys, f"--from={path}", "--n=20", "--patch=3")
    assert pictures(tmp_path / "look") == ["class_token.png", "patch_relations.png", "relations_or_symbols.png"]
    text = says(capsys, f"--from={vision(tmp_path / 'sa/last.pt', n_ra=0)}", "--n=20")
    assert "no relations: it is a Transformer" in text and "it has no class token" in text
    assert pictures(tmp_path / "sa/look") == ["patch_attention.png"]
    assert "patch=16: these images have patches 0 to 15" in refuses(capsys, f"--from={path}", "--n=20", "--patch=16")
    assert "a prompt is for language" in refuses(capsys, f"--from={path}", "--n=20", "--prompt=A")


def test_a_model_with_a_memory_is_called_by_its_name_and_its_slots_are_drawn(few_glyphs, cell, tmp_path, capsys):
    memory = dict(memory_slots=4, memory_width=4, memory_heads=2)
    text = says(capsys, f"--from={vision(tmp_path / 'ait/last.pt', n_ra=0, **memory)}", "--n=20")
    assert "no relations: it is an Associative Transformer" in text and "layer 2: effective rank" in text
    assert pictures(tmp_path / "ait/look") == ["patch_attention.png", "slots.png"]
    for n_ra in (0, 1):
        folder = cell(n_ra=n_ra, **memory)
        text = says(capsys, f"--from={folder}", "--n=40")
        assert "its memory:" in text and "layer 2: effective rank" in text
        assert "slots.png" in pictures(folder / "look")
