"""Other relational architectures: each is what its paper says, and is trained as train_relgames.py trains the DAT."""
import csv
import multiprocessing

import pytest
import torch

import train_relgames
from extras.relational_baselines import MODELS, Abstractor, CoRelNet, D, N, PrediNet, RelationNetwork, main
from toolbox import sweep

TINY = ["--task=occurs", "--train_size=30", "--test_size=40", "--epochs=2", "--seed=1", "--device=cpu"]


@pytest.fixture
def objects():
    torch.manual_seed(0)
    return torch.randn(2, N, D, dtype=torch.float64)


def test_all_have_as_many_parameters_as_the_dat():
    counts = {name: sum(p.numel() for p in make().parameters()) for name, make in MODELS.items()}
    assert all(abs(n / counts["DAT 0+2"] - 1) < 0.01 for n in counts.values()), counts


def test_the_relation_network_sums_over_all_pairs(objects):
    """f( sum_ij g(o_i, o_j) ), g with a ReLU behind its last layer."""
    m = RelationNetwork(16).double().eval()
    total = sum(m.g(torch.cat([objects[:, i], objects[:, j]], -1)).relu() for i in range(N) for j in range(N))
    torch.testing.assert_close(m.read(objects), m.f(total), rtol=0, atol=1e-10)


def test_corelnet_sees_inner_products_alone(objects):
    """A rotation of all objects together changes no inner product, and so no answer; another change does."""
    m = CoRelNet(16).double().eval()
    m.W_z.weight = torch.nn.Parameter(torch.eye(D, dtype=torch.float64) / 3)
    rotation = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    torch.testing.assert_close(m.read(objects @ rotation), m.read(objects), rtol=0, atol=1e-10)
    assert not torch.allclose(m.read(objects * torch.linspace(0.5, 1, D)), m.read(objects))


def test_predinet_compares_two_objects_by_differences(objects):
    """What all objects have in common does not reach the comparison: with the same choice of objects it is the same."""
    m, common = PrediNet(16).double().eval(), torch.randn(D, dtype=torch.float64)
    answer = m.read(objects)
    assert not torch.allclose(m.read(objects.flip(1)), answer)
    with torch.no_grad():                                             # features choose nothing, places do
        m.W_Q.weight.unflatten(1, (N, D + 2))[..., :D] = 0
        m.W_K.weight[:, :D] = 0
    torch.testing.assert_close(m.read(objects + common), m.read(objects), rtol=0, atol=1e-10)
    assert not torch.allclose(m.read(objects.flip(1)), m.read(objects))


def test_the_abstractor_never_reads_a_feature(objects):
    """With equal attention weights everywhere the answer does not depend on the objects."""
    m = Abstractor(16).double().eval()
    assert not torch.allclose(m.read(objects), m.read(objects.flip(0)))
    for rca in m.relate:
        torch.nn.init.zeros_(rca.W_q.weight)
    torch.testing.assert_close(m.read(objects), m.read(objects.flip(0)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_receives_a_gradient(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    model(torch.rand(4, 3, 36, 36), torch.tensor([0, 1, 0, 1]))[1].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_protocol_is_that_of_train_relgames(tmp_path, capsys, monkeypatch):
    """The DAT ends with the very accuracy that train_relgames.py records; repeated, nothing is trained again."""
    monkeypatch.setattr(sweep, "train_all", lambda train, runs, arguments, workers: (        # in this process
        (run, sweep.train_one(train, run, arguments)) for run in runs))
    monkeypatch.setattr(sweep.StepCounter, "counter", multiprocessing.Value("q", 0))
    main([*TINY, "--model=DAT 0+2", f"--out_dir={tmp_path / 'here'}"])
    train_relgames.main([*TINY, "--n_ra=2", "--baseline=False", f"--out_dir={tmp_path / 'there'}"])
    found = []
    for path, column in (("here/baselines.csv", "accuracy"), ("there/results.csv", "accuracy_pentos")):
        with open(tmp_path / path, newline="") as f:
            found += [float(row[column]) for row in csv.DictReader(f)]
    assert len(found) == 2 and found[0] == found[1]
    capsys.readouterr()
    main([*TINY, "--model=DAT 0+2", f"--out_dir={tmp_path / 'here'}"])
    assert "1 runs, 1 of them finished before" in capsys.readouterr().out
    main([*TINY, "--model=DAT 0+2", "--epochs=1", f"--out_dir={tmp_path / 'here'}"])          # kept, not mixed
    assert len((tmp_path / "here/baselines.csv").read_text().splitlines()) == 3
    assert len((tmp_path / "here/baselines.md").read_text().splitlines()) == 3


@pytest.mark.parametrize("option, said", [("--model=RNN", "choose from"), ("--train_size=1", "at least 2")])
def test_wrong_options_are_one_line(option, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main([option])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and said in error
